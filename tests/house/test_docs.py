"""The documents say what the program does: generated pages are up to date, commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hpcpipe.__main__ import parser
from hpcpipe.config import Config, loads, to_toml

ROOT = Path(__file__).resolve().parents[2]


def test_the_configuration_page_lists_every_key() -> None:
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert to_toml(Config(), comments=True) in page, "docs/config.md is old: paste to_toml(Config(), True)"


def test_toml_examples_load() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            loads(block, str(page))


def test_commands_in_the_documents_parse() -> None:
    seen = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in re.findall(r"^(?:mpirun -n \d+ |srun )?hpcpipe .*$", page.read_text(encoding="utf-8"), re.M):
            words = shlex.split(line, comments=True)
            arguments = words[words.index("hpcpipe") + 1 :]
            assert parser().parse_args(arguments).run, line
            seen += 1
    assert seen >= 5
