"""docs/sharp_bits.md: its blocks of code do on 2 ranks what it says, and messages are as quoted."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.mpi_ranks import ROOT, run_ranks

pytestmark = pytest.mark.mpi

TEXT = (ROOT / "docs" / "sharp_bits.md").read_text(encoding="utf-8")
# Title, code, and what is quoted directly behind it: the message of a block that is refused.
BLOCKS = re.findall(r'```python title="(.+?)"\n(.*?)```(?:\n\n```text\n(.*?)```)?', TEXT, re.S)

PROGRAM = """
import json, sys
from mpi_dasgd.errors import MpiDasgdError

beginning, blocks = json.loads(sys.argv[1])
for title, code, quoted in blocks:
    names = {}
    exec(beginning, names)
    message = ""
    try:
        exec(compile(code, title, "exec"), names)
    except MpiDasgdError as error:
        message = str(error).replace(f"rank {names['rank']},", "rank 0,")
    assert message == " ".join(quoted.split()), f"{title}: {code} gave {message!r}"
    try:
        names["training"].close()
    except MpiDasgdError:
        assert message  # the model is still as it was refused
    print("as written")
"""


def test_blocks_do_what_the_page_says() -> None:
    (_, beginning, _), *blocks = BLOCKS
    assert len(blocks) > 10
    assert all(bool(quoted) == (title == "refused") for title, _, quoted in blocks)
    done = run_ranks(2, PROGRAM, json.dumps([beginning, blocks]), timeout=120)
    assert done.stdout.count("as written") == 2 * len(blocks)
