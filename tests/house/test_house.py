"""The shape of the house, held against the source: who knows whom, which libraries enter where, how long things get."""

from __future__ import annotations

import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest

from tests.house import rules

ROOT = Path(__file__).resolve().parents[2]

# ---- the house as data: a new arrow, door or exception is a line in review -------------------------------------------

# Floors from the top. An arrow goes down; rooms of one floor do not know each other.
FLOORS = (
    ("__main__",),
    ("train", "generate"),
    ("steps", "saving", "rehearsal", "profile", "plot"),
    ("job", "predict", "prepare", "report", "hugging_face"),
    ("resume", "measure", "seat"),
    ("planner",),
    ("model", "runtime", "checkpoint", "data", "corpus", "placement", "progress", "charts", "trace"),
    ("layers", "backends", "schedule", "comm", "config"),
    ("settings",),
)

# Who imports whom, exactly: an arrow that is not drawn fails, and so does one that nobody uses. config.UserError, how a
# sentence reaches the user, is everybody's and not drawn.
ARROWS = {
    "__main__": {
        "train", "generate", "predict", "prepare", "report", "plot", "hugging_face", "planner", "checkpoint", "comm",
        "config",
    },
    "train": {"steps", "saving", "rehearsal", "profile", "job", "comm", "config"},
    "steps": {"job", "runtime", "schedule", "comm"},
    "saving": {"job", "checkpoint", "config"},
    "rehearsal": {"job", "planner", "schedule"},
    "profile": {"job", "planner", "runtime", "schedule", "trace"},
    "job": {
        "resume", "measure", "seat", "planner", "model", "runtime", "checkpoint", "data", "progress", "schedule",
        "comm", "config",
    },
    "generate": {"data"},
    "resume": {"checkpoint", "comm", "config"},
    "seat": {"placement", "backends", "comm", "config"},
    "measure": {"planner", "runtime", "backends", "schedule", "comm", "config"},
    "predict": {"model", "runtime", "checkpoint", "data", "backends", "schedule", "comm", "config"},
    "prepare": {"corpus", "data"},
    "hugging_face": {"model", "checkpoint", "data", "config"},
    "plot": {"report", "charts", "checkpoint"},
    "report": {"charts", "model", "checkpoint", "schedule", "config"},
    "planner": {"model", "runtime", "data", "placement", "layers", "backends", "schedule", "trace", "config"},
    "model": {"layers", "config"},
    "runtime": {"backends", "schedule", "comm", "config"},
    "checkpoint": {"config"},
    "data": {"config"},
    "corpus": set(),
    "placement": set(),
    "progress": set(),
    "charts": set(),
    "trace": {"schedule"},
    "layers": set(),
    "backends": set(),
    "schedule": set(),
    "comm": set(),
    "config": {"settings"},
    "settings": set(),
}  # fmt: skip

DOORS = {
    "mpi4py": ("hpcpipe/comm/mpi.py",),
    "h5py": ("hpcpipe/checkpoint/",),
    "ctypes": ("hpcpipe/backends/cpu.py",),
    "cupy": ("hpcpipe/backends/cuda/cupy_driver.py", "hpcpipe/backends/cuda/modules.py", "hpcpipe/comm/nccl.py"),
    "nvmath": ("hpcpipe/backends/cuda/products_cublaslt.py",),
    "cudnn": ("hpcpipe/backends/cuda/fused_attention.py",),
    "pynvml": ("hpcpipe/placement/devices.py",),
    "tokenizers": ("hpcpipe/prepare.py", "hpcpipe/data.py"),
    "pyarrow": ("hpcpipe/corpus.py",),
    "matplotlib": ("hpcpipe/charts.py",),
}
LAZY = ("tokenizers", "pyarrow", "matplotlib", "cupy", "nvmath", "cudnn", "pynvml")
# None of these for `hpcpipe --help`.
HEAVY = ("numpy", "h5py", "mpi4py", "tokenizers", "matplotlib", "ctypes", "multiprocessing", "asyncio")

# Standard library only: rooms and files that a laptop, a scheduler's prologue or a test can run on nothing.
PURE = (
    "hpcpipe/schedule/",
    "hpcpipe/planner/",
    "hpcpipe/layers/",
    "hpcpipe/checkpoint/layout.py",
    "hpcpipe/config.py",
    "hpcpipe/settings.py",
)
PURE_BUT = {"tomli"}  # the standard library's own parser, for Python 3.10
TABLES = ("hpcpipe/schedule/",)  # pure too, but tables of a million ops are columns of numpy

FORBIDDEN_NAMES = ("utils", "util", "common", "helpers", "helper", "core", "manager", "misc", "base")
UNFINISHED = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
SOMEBODYS_PATHS = tuple("/" + word + "/" for word in ("tm" + "p", "ho" + "me", "ro" + "ot", "wo" + "rk"))

FILE_LINES, FUNCTION_LINES, README_LINES = 400, 60, 200

# ---- the files -------------------------------------------------------------------------------------------------------

SOURCES = sorted((ROOT / "hpcpipe").rglob("*.py"))
SUFFIXES = (".py", ".c", ".h", ".cu", ".cuh", ".cpp", ".md", ".sbatch", ".sh")
WRITTEN = ("hpcpipe", "native", "benchmarks", "tests", "slurm", "docs", ".ci")
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def written() -> list[Path]:
    """Everything a person wrote."""
    below = [f for folder in WRITTEN for f in (ROOT / folder).rglob("*") if f.suffix in SUFFIXES]
    return sorted(f for f in [*below, *ROOT.glob("*.py"), *ROOT.glob("*.md")] if f.is_file())


@cache
def drawn() -> dict[str, set[str]]:
    """The arrows found in the source."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        if name(path) == "hpcpipe/__init__.py":
            continue
        room = rules.room_of(name(path))
        targets = {t for t, what in rules.arrows(read(path)) if (t, what) != ("config", "UserError")}
        found.setdefault(room, set()).update(targets - {room})
    return found


def over(rule, files=SOURCES) -> list[str]:
    return [offence for f in files for offence in rule(name(f), read(f))]


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_arrows_go_down():
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    assert set(ARROWS) == set(floor)
    assert [(a, b) for a, targets in ARROWS.items() for b in targets if floor[b] <= floor[a]] == []


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_a_room_knows_exactly_its_arrows(room):
    assert drawn().get(room) == ARROWS[room]


def test_every_room_is_on_a_floor():
    assert set(drawn()) - set(ARROWS) == set()


def test_heavy_libraries_enter_by_their_door():
    assert over(partial(rules.door_offences, doors=DOORS, lazy=LAZY)) == []


def test_pure_rooms_know_only_the_standard_library():
    pure = [f for f in SOURCES if name(f).startswith(PURE)]
    standard = frozenset(sys.stdlib_module_names | PURE_BUT | {"numpy"})
    assert over(partial(rules.foreign_offences, standard=standard), pure) == []


def test_pure_rooms_know_numpy_for_their_tables_only():
    pure = [f for f in SOURCES if name(f).startswith(PURE)]
    assert over(partial(rules.table_offences, tables=TABLES), pure) == []
    for table in TABLES:  # a room that needs it no longer must not be excepted
        assert any("import numpy" in read(f) for f in pure if name(f).startswith(table))


def test_the_command_line_imports_nothing_heavy():
    program = "import sys; from hpcpipe.__main__ import parser; parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(loaded.stdout.split()) & set(HEAVY) == set()


def test_files_are_named_by_their_noun():
    assert [name(f) for f in written() if f.stem in FORBIDDEN_NAMES or f.parent.name in FORBIDDEN_NAMES] == []


def test_nothing_is_re_exported():
    assert over(rules.export_offences, [f for f in SOURCES if f.name == "__init__.py"]) == []


def test_imports_are_written_in_full():
    assert over(rules.relative_offences) == []


def test_files_and_functions_are_short():
    files = [*SOURCES, *ROOT.glob("*.py"), *(ROOT / ".ci").glob("*.py")]
    assert over(partial(rules.length_offences, lines=FILE_LINES, function_lines=FUNCTION_LINES), files) == []


def test_every_module_says_why_it_exists():
    assert over(rules.docstring_offences, [f for f in SOURCES if f.name != "__init__.py"]) == []


def test_no_state_at_module_level():
    assert over(rules.state_offences) == []


def test_nothing_is_left_unfinished():
    assert over(partial(rules.word_offences, words=UNFINISHED), written()) == []


def test_no_path_of_somebodys_machine():
    assert over(partial(rules.word_offences, words=SOMEBODYS_PATHS), written()) == []


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES


def test_documents_show_commands_that_exist():
    targets = {
        line.split(":")[0] for line in read(ROOT / "Makefile").splitlines() if line[:1].isalpha() and ":" in line
    }
    files = {name(f) for folder in ("slurm", ".ci", "benchmarks") for f in (ROOT / folder).rglob("*")}
    python = [*SOURCES, *(ROOT / "benchmarks").rglob("*.py")]
    modules = {
        name(f).removesuffix(".py").removesuffix("/__init__").removesuffix("/__main__").replace("/", ".")
        for f in python
    }
    rule = partial(rules.command_offences, targets=targets, files=files, modules=modules)
    assert over(rule, DOCUMENTS) == []
    assert sum(len(rules.commands(read(d))) for d in DOCUMENTS) >= 5  # the parser still finds them
