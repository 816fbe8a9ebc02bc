"""Reads a configuration from TOML files and ``key=value`` overrides, and writes it as TOML."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mpi_dasgd.config.deprecated import current_key, renamed
from mpi_dasgd.config.schema import Config, Section
from mpi_dasgd.errors import UserError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Config", "describe", "load"]


def load(path: str | Path | Mapping[str, Any] | None, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: TOML file; or what one holds, as a mapping whose keys may be ``section.key`` and whose
            values may be None for the default; None for the defaults.
        overrides: ``section.key=value`` each; later ones win. Values are TOML, or else strings.

    Raises:
        UserError: if the file is missing or malformed, a key unknown, or a value out of range.
    """
    data: dict[str, Any] = {}
    if isinstance(path, Mapping):
        data, path = _nested(path), None
    elif path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"configuration file {path}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"configuration file {path} is not TOML: {error}") from error
    for section, values in data.items():
        if isinstance(values, dict):
            data[section] = _renamed(section, values, path or "configuration")
    for override in overrides:
        _set(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        source = "configuration" if path is None else str(path)
        lines = [_explain(item) for item in error.errors()]
        raise UserError(f"{source}: " + f"\n{source}: ".join(lines)) from None


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections by name, from keys that may name the section too; None is left out."""
    data: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None:
            continue
        *sections, key = str(name).split(".")
        section = data
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"configuration: {name!r}: {part!r} is a value, not a section")
        if isinstance(value, Mapping) and isinstance(section.get(key), dict):
            section[key] |= _nested(value)
        else:
            section[key] = _nested(value) if isinstance(value, Mapping) else value
    return data


def _renamed(section: str, values: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Translate old names before the overrides, which may name the same key as it is now."""
    try:
        return renamed(section, values)
    except ValueError as error:
        raise UserError(f"{path}: {section}: {error}") from error


def _set(data: dict[str, Any], override: str) -> None:
    """Set the key that an override names, under its present name."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"override {override!r}: expected section.key=value, as in optimizer.lr=0.05"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    field = _fields(sections).get(current_key(".".join(sections), last))
    if field is not None and field.annotation in (str, str | None) and not isinstance(value, str):
        value = text  # a name such as 3 or nan
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
    if sections == ["budget"]:
        data.clear()  # one budget replaces another
    data |= renamed(".".join(sections), {last: value})


def _explain(item: Mapping[str, Any]) -> str:
    """Return one validation error in words: the key, the value given, what was expected."""
    key_path = tuple(part for part in item["loc"] if isinstance(part, str))
    name = ".".join(str(part) for part in item["loc"] if part not in ("int", "float", "bool"))
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        valid = list(_fields(key_path[:-1]))
        return f"{name}: unknown key{nearest(key_path[-1], valid)} (valid here: {', '.join(valid)})"
    if item["type"] == "literal_error":
        field = _fields(key_path[:-1]).get(key_path[-1])
        valid = [str(v) for v in get_args(field.annotation)] if field else []
        hint = nearest(str(value), valid)
        return f"{name}: {value!r} is not known{hint} (valid: {', '.join(valid)})"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name}: {message}" + ("" if item["type"] == "value_error" else f", got {value!r}")


def _fields(path: Iterable[str]) -> Mapping[str, Any]:
    """Return the fields of a section; none if `path` does not name a section."""
    model: type[BaseModel] = Config
    for part in path:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return {}
        model = inner
    return model.model_fields


def describe(config: Config) -> Iterator[str]:
    """Yield TOML lines: every key with its value and meaning, and its default if different."""
    for section, field in Config.model_fields.items():
        values = getattr(config, section)
        yield f"[{section}]"
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, Section)
        defaults = model()
        for key, info in model.model_fields.items():
            value, default = getattr(values, key), getattr(defaults, key)
            comment = info.description or ""
            if value != default:
                comment += f"; default {_toml(default) or 'unset'}"
            text = _toml(value)
            yield (f"{key} = {text}" if text else f"# {key} =") + f"  # {comment}"
        yield ""


def _toml(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case tuple() | list():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case dict():
            return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return str(value)
