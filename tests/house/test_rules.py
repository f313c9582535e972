"""Each rule of the house catches what it was made for, and lets the good form pass."""

from __future__ import annotations

import pytest

from tests.house import rules

LONG = "def f():\n" + "    x = 1\n" * 10


def door(source, path="hpcpipe/train.py"):
    return rules.door_offences(path, source, {"h5py": ("hpcpipe/checkpoint/",), "cupy": ()}, ("tokenizers",))


def command(markdown):
    return rules.command_offences("x.md", markdown, {"test"}, {"slurm/train.sbatch"}, {"hpcpipe", "benchmarks.step"})


def of(rule, *arguments):
    return lambda source: rule("x.py", source, *arguments)


def table(source, path="hpcpipe/schedule/program.py"):
    return rules.table_offences(path, source, ("hpcpipe/schedule/",))


CASES = [
    (door, "def f():\n    import h5py", "import numpy"),
    (door, "from cupy.cuda import nvrtc", "import math"),
    (door, "from tokenizers import Tokenizer", "def f():\n    from tokenizers import Tokenizer"),
    (
        of(rules.foreign_offences, frozenset({"math"})),
        "if x:\n    import numpy.random",
        "import math\nfrom hpcpipe import model",
    ),
    (table, "import numpy.random", "import numpy as np\nimport numpy.typing as npt\nimport math"),
    (table, "from numpy import linalg", "import numpy"),
    (of(rules.table_offences, ("hpcpipe/schedule/",)), "def f():\n    import numpy", "import math"),
    (of(rules.relative_offences), "from . import arena", "from hpcpipe.runtime import arena"),
    (of(rules.export_offences), '"""Why."""\nfrom hpcpipe.config import load', '"""Why."""'),
    (of(rules.length_offences, 5, 60), LONG, "x = 1\n"),
    (of(rules.length_offences, 99, 10), LONG, "def f():\n    return 1\n"),
    (of(rules.docstring_offences), "x = 1", '"""Why."""'),
    (of(rules.state_offences), "seen = []", "SEEN = []"),
    (of(rules.state_offences), "N = 0\ndef f():\n    global N\n    N = 1", "N = 0\ndef f():\n    n = 1"),
    (of(rules.state_offences), "T = {}\ndef f():\n    T['a'] = 1", "T = {}\ndef f():\n    T = {}\n    T['a'] = 1"),
    (of(rules.state_offences), "T = []\ndef f():\n    T.append(1)", "T = []\ndef f(t):\n    t.append(1)"),
    (of(rules.word_offences, ["TBD"]), "# TBD", "# done, see ATBD"),
    (command, "```\nmake tset\n```", "```\nmake test\n```"),
    (command, "    python -m hpcpipe.trian run.toml", "    python -m hpcpipe train run.toml"),
    (command, "run `sbatch slurm/tarin.sbatch run.toml`", "run `sbatch slurm/train.sbatch run.toml`, make tea"),
    (command, "run `python -m benchmarks.stpe`", "run `python -m benchmarks.step`"),
]


@pytest.mark.parametrize(("rule", "bad", "good"), CASES)
def test_rule_catches_the_bad_and_passes_the_good(rule, bad, good):
    assert len(list(rule(bad))) == 1
    assert list(rule(good)) == []


def test_arrows_are_found_in_every_form():
    source = (
        "import hpcpipe.data\nfrom hpcpipe import model\ndef f():\n    from hpcpipe.comm.link import Link\nimport json"
    )
    assert rules.arrows(source) == {("data", ""), ("model", ""), ("comm", "Link")}
    assert rules.arrows("from hpcpipe.config import UserError") == {("config", "UserError")}


@pytest.mark.parametrize(("path", "room"), [("hpcpipe/train.py", "train"), ("hpcpipe/comm/mpi.py", "comm")])
def test_room(path, room):
    assert rules.room_of(path) == room
