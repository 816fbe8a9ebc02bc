"""A setting is declared in one place: the sections of the configuration."""

from __future__ import annotations

import ast

from mpi_dasgd.config import schema
from tests.support.mpi_ranks import ROOT

PACKAGE = ROOT / "mpi_dasgd"


def test_no_other_class_declares_the_keys_of_a_section() -> None:
    sections = {
        name: set(section.annotation.model_fields)  # type: ignore[union-attr]
        for name, section in schema.Config.model_fields.items()
    }
    again = [
        f"{path.relative_to(PACKAGE)}: {node.name} declares {sorted(keys & fields)} of [{name}]"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "config" / "schema.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        # fields of dataclasses and models; what has no default is no setting
        for fields in [
            {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and item.value is not None
            }
        ]
        for name, keys in sections.items()
        if len(keys & fields) > 2
    ]
    assert not again
