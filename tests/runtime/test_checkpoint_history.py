"""History, histograms and their pictures: against numpy, whatever the pieces; what is damaged is told, not counted."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe import charts
from hpcpipe.__main__ import main
from hpcpipe.checkpoint import histogram, history, inspect, write
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import Config, UserError, to_toml
from hpcpipe.plot import look
from tests.runtime.checkpoint_state import State, by_axis, by_tensor, save, state, unsynced  # noqa: F401

STEPS = (10, 20, 30, 40)
NAMES = [name for kind, name in state(0) if kind == "parameter"]


def rms(array: np.ndarray) -> float:
    return float(np.sqrt((array.astype(np.float64) ** 2).mean()))


def states() -> dict[int, State]:
    """Four states of a run, on their way from one to another; the last one is the third again."""
    first, other = state(1), state(2)
    found = {step: {k: first[k] + i * other[k] for k in first} for i, step in enumerate(STEPS[:3])}
    return {**found, 40: found[30]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, one never finished, metrics."""
    out = tmp_path / "run"
    for step, values in states().items():
        save(out, step, values, by_axis(2, 1), loss=50 / step, config=to_toml(Config()))
    write.step_folder(out, 50).mkdir()
    lines: list[dict[str, float]] = [{"step": i, "loss": 40 / i} for i in range(1, 41)]
    lines.append({"step": 40, "validation_loss": 1.5})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def damage(folder: Path) -> None:
    """Another byte in the middle of a shard."""
    file = folder / "shard_0000.h5"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


# --- history


@pytest.mark.parametrize("piece", [1 << 20, 20])
def test_history_against_numpy(run: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(inspect, "STREAM", piece)
    found, values = history.facts(run), states()
    assert found["steps"] == list(STEPS) and [t["name"] for t in found["tensors"]] == NAMES
    for row in found["tensors"]:
        tensors = [values[step]["parameter", row["name"]] for step in STEPS]
        assert row["rms"] == pytest.approx([rms(t) for t in tensors], rel=1e-12)
        changes = [rms(b.astype(np.float64) - a) / rms(a) for a, b in pairwise(tensors)]
        assert row["change"][0] is None and row["change"][1:] == pytest.approx(changes, rel=1e-12)
        assert row["change"][3] == 0.0
    whole = [np.concatenate([values[step]["parameter", n].ravel() for n in NAMES]) for step in STEPS]
    assert found["all"]["rms"] == pytest.approx([rms(w) for w in whole], rel=1e-12)
    assert found["all"]["change"][1] == pytest.approx(rms(whole[1].astype(float) - whole[0]) / rms(whole[0]), rel=1e-12)


def test_history_tells_each_checkpoint(run: Path) -> None:
    damage(run / "step_00000020")
    (run / "step_00000030" / "master.h5").write_bytes(b"no master")
    found = json.loads(look(str(run), history=True, json=True))["history"]
    rows = {row["step"]: row for row in found["checkpoints"]}
    assert list(rows) == [10, 20, 30, 40, 50] and found["steps"] == [10, 40]
    assert (rows[10]["loss"], rows[10]["tokens"], rows[10]["shards"], rows[10]["problem"]) == (5.0, 10_000, 2, None)
    assert rows[10]["bytes"] == sum(f.stat().st_size for f in (run / "step_00000010").glob("shard*"))
    assert "shard_0000.h5 is damaged in bytes" in rows[20]["problem"]
    assert "master.h5 is damaged" in rows[30]["problem"] and "never finished" in rows[50]["problem"]
    values = states()  # a checkpoint that is not whole is passed over: 40 stands beside 10
    a, b = (values[step]["parameter", "head.weight"].astype(np.float64) for step in (10, 40))
    row = next(t for t in found["tensors"] if t["name"] == "head.weight")
    assert row["change"] == [None, pytest.approx(rms(b - a) / rms(a), rel=1e-12)]


def test_history_in_words(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = look(str(run), history=True)
    assert re.search(r"^step_00000020 +20 +20,000 +2\.5 +[\d.]+ KiB +\S+ +whole$", said, re.M)
    assert re.search(r"^step_00000050 +50 .*never finished", said, re.M)
    table = [line for line in said.splitlines() if line.startswith("layer.0.mlp.up.weight")]
    assert re.fullmatch(r"\S+ +[\d.]+ +[\d.]+ +[\d.]+ % +[\d.]+ % +0 %", table[0]), table
    monkeypatch.setattr(history, "COLUMNS", 2)
    assert "the last 2 of 3, --json has all" in look(str(run), history=True)


@pytest.mark.parametrize(
    ("where", "at", "gone", "steps"),
    [
        ("_row", 0, 10, [20, 30, 40]),  # before it is read
        ("_row", 1, 10, [20, 30, 40]),  # read and found whole
        ("_sums", 0, 20, [10, 30, 40]),  # the next one waits for its turn
        ("_sums", 2 * len(NAMES), 20, [10, 20, 30, 40]),  # the one before has had its turn: 30 has nothing beside it
    ],
)
def test_a_checkpoint_that_a_live_run_removes_is_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: int, gone: int, steps: list[int]
) -> None:
    calls, whole = [0], getattr(history, where)

    def removing(*args: Any) -> Any:
        if calls[0] == at:
            write.remove(write.step_folder(run, gone))
        calls[0] += 1
        return whole(*args)

    monkeypatch.setattr(history, where, removing)
    found = history.facts(run)
    assert found["steps"] == steps
    problems = {row["step"]: row["problem"] for row in found["checkpoints"]}
    assert problems[gone] == (None if gone in steps else history.GONE)
    assert all(problems[step] is None for step in steps) and "never finished" in problems[50]
    changes = found["all"]["change"]
    assert len(changes) == len(steps)
    assert [i for i, change in enumerate(changes) if change is None] == ([0] if gone not in steps else [0, 2])


def test_a_tensor_that_comes_later_or_in_another_shape(tmp_path: Path) -> None:
    one, two = np.ones((4, 2), np.float32), np.full((2, 4), 3, np.float32)
    save(tmp_path, 1, {("parameter", "a"): one, ("parameter", "b"): one})
    save(tmp_path, 2, {("parameter", "a"): two, ("parameter", "c"): two})
    save(tmp_path, 3, {("parameter", "a"): 2 * two, ("parameter", "c"): 0 * two})
    found = {row["name"]: row for row in history.facts(tmp_path)["tensors"]}
    assert found["a"] == {"name": "a", "rms": [1, 3, 6], "change": [None, None, 1]}
    assert found["b"] == {"name": "b", "rms": [1, None, None], "change": [None, None, None]}
    assert found["c"] == {"name": "c", "rms": [None, 3, 0], "change": [None, None, 1]}


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    for step, value in ((1, 0.0), (2, 1.0), (3, np.nan)):
        save(tmp_path, step, {("parameter", "a"): np.full(3, value, np.float32)}, by_tensor(1))
    found = json.loads(look(str(tmp_path), history=True, histogram=True, json=True))
    assert found["history"]["tensors"][0]["change"] == [None, None, None]  # from zeros, and to NaN
    (row,) = found["histograms"]
    assert (row["nan"], row["min"], row["magnitude"], row["linear"]) == (3, None, None, None)
    assert "not finite" in look(str(tmp_path), history=True)


# --- histograms


def one(tmp_path: Path, array: np.ndarray) -> dict[str, Any]:
    folder = save(tmp_path, 1, {("parameter", "a"): array}, by_axis(3, 0) if array.shape[0] >= 3 else by_tensor(1))
    return histogram.tensor(Checkpoint.open(folder), "parameter", "a")


@pytest.mark.parametrize("piece", [1 << 20, 1000])
def test_histograms_against_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(inspect, "STREAM", piece)
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((70, 90)) * 10.0 ** rng.integers(-6, 3, (70, 90))).astype(np.float32)
    values[3, 4], values[5, 6:8], values[60, 1:4] = np.nan, (np.inf, -np.inf), 0
    found, finite = one(tmp_path, values), values[np.isfinite(values)].astype(np.float64)
    want = {"count": 6300, "nan": 1, "inf": 2, "zeros": 3, "negative": int((finite < 0).sum())}
    assert {key: found[key] for key in want} == want
    assert (found["min"], found["max"]) == (finite.min(), finite.max())
    counts, edges = np.histogram(finite, histogram.BINS)
    assert found["linear"]["counts"] == counts.tolist() and found["linear"]["edges"] == edges.tolist()
    sizes = np.histogram(np.abs(finite[finite != 0]), found["magnitude"]["edges"])[0]
    assert found["magnitude"]["counts"] == sizes.tolist() and sizes.sum() == 6294 and sizes[0] and sizes[-1]
    edges = np.array(found["magnitude"]["edges"])
    assert edges[1:] / edges[:-1] == pytest.approx(2**0.25) and edges[-1] / edges[0] > 1e8


def test_bins_of_size_begin_where_they_say(tmp_path: Path) -> None:
    values = np.array([1, 2**0.25 * (1 - 1e-6), 2**0.25 * (1 + 1e-6), -1.5, 2, 2**-149, 3.4e38], np.float32)
    sizes = one(tmp_path, values)["magnitude"]
    held = [(edge, count) for edge, count in zip(sizes["edges"], sizes["counts"], strict=False) if count]
    assert [count for _, count in held] == [1, 2, 1, 1, 1, 1]
    assert [edge for edge, _ in held] == pytest.approx([2**-149, 1, 2**0.25, 2**0.5, 2, 2**127.75], rel=1e-15, abs=0)


@pytest.mark.parametrize(
    ("values", "low", "high"), [([1.0] * 5, 0.5, 1.5), ([0.0] * 5, -0.5, 0.5), ([-3e38] * 4, -4.5e38, -1.5e38)]
)
def test_values_that_are_all_the_same(tmp_path: Path, values: list[float], low: float, high: float) -> None:
    found = one(tmp_path, np.array(values, np.float32))
    edges = found["linear"]["edges"]
    assert (edges[0], edges[-1]) == (pytest.approx(low), pytest.approx(high))
    assert max(found["linear"]["counts"]) == len(values) and (found["magnitude"] is None) == (values[0] == 0)


def test_values_too_far_apart_for_equal_bins(tmp_path: Path) -> None:
    found = one(tmp_path, np.array([-1.7e308, 1.7e308, 5e-324]))
    assert found["linear"] is None and sum(found["magnitude"]["counts"]) == 3
    assert found["magnitude"]["edges"][0] == 5e-324 and found["magnitude"]["edges"][-1] is None


def test_no_more_than_a_piece_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, {("parameter", "a"): np.full((3000, 5), step, np.float32)})
    monkeypatch.setattr(inspect, "STREAM", 1000)
    whole, sizes = Checkpoint.read, []

    def reading(*arguments: Any, **named: Any) -> Any:
        values = whole(*arguments, **named)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(Checkpoint, "read", reading)
    look(str(tmp_path), history=True, histogram=True)
    assert max(sizes) == 1000 and sum(sizes) == 15_000 * (1 + 2 + 2)  # alone, beside the first one, two passes


def test_histograms_in_words(run: Path) -> None:
    said = look(str(run / "step_00000020"), histogram=True, only="layer.*").splitlines()
    assert said[0] == f"step 20, {run / 'step_00000020'}" and len(said) == 2 + 2 * 3
    drawn = re.search(
        r"^layer\.0\.mlp\.up\.weight +p +-\S+  \|(.{24})\|  \+\S+ +\S+ to \S+ +\|.{24}\| +0 +0 +0$", said[5]
    )
    assert drawn and "@" in drawn[1]
    assert [line.split()[0] for line in said[3:5]] == ["m1", "m2"]


def test_only_what_is_asked_for(run: Path) -> None:
    found = json.loads(look(str(run), only="*norm1*", json=True))
    assert [t["name"] for t in found["history"]["tensors"]] == ["layer.0.norm1.weight"]
    assert [(h["name"], h["kind"]) for h in found["histograms"]] == [
        ("layer.0.norm1.weight", kind) for kind in ("parameter", "moment1", "moment2")
    ]
    assert found["checkpoint"]["step"] == 40 and found["checkpoint"]["attributes"]["loss"] == 1.25
    assert [p["mean"] for p in found["curves"]["loss"]] == [40 / i for i in range(1, 41)]
    assert found["curves"]["validation_loss"] == [{"step": 40, "mean": 1.5, "least": 1.5, "largest": 1.5}]


# --- pictures


def test_a_page_needs_nothing_but_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / "step_00000040")
    file = tmp_path / "page.html"
    assert main(["inspect", str(run), "--plot", str(file)]) == 0
    assert re.fullmatch(rf"{re.escape(str(file))}, [\d.]+ KiB\n", capsys.readouterr().out)
    text = file.read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    families = ["embed.weight", "layer.*.norm1.weight", "layer.*.mlp.up.weight", "head.weight"]
    moved, valued = [f"{f}, over the steps" for f in families], [f"{f}, at step 30" for f in families]
    assert captions == ["training", *moved, *valued]
    assert text.count("<svg") == text.count("</svg>") == len(captions) and "<script" not in text
    outside = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", text) + re.findall(r"@import.*", text)
    used = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text)
    assert outside == [] and set(used) <= set(re.findall(r'id="([^"]+)"', text))
    rows = re.findall(r"<tr><td>(\d+)</td>.*?<td>([^<]*)</td></tr>", text)
    assert [step for step, _ in rows] == ["10", "20", "30", "40", "50"] and rows[2][1] == "whole"
    assert "shard_0000.h5 is damaged" in rows[3][1] and "[optimizer]" in text


def pixels(file: Path) -> np.ndarray:
    from matplotlib.image import imread

    return np.asarray(imread(file))


def test_a_png_has_a_row_for_each_family_with_something_in_it(tmp_path: Path) -> None:
    values = {("parameter", f"layer.{i}.up.weight"): np.full((4, 4), i, np.float32) for i in range(30)}
    values[("parameter", "embed.weight")] = np.arange(12, dtype=np.float32).reshape(3, 4)
    folder, file = save(tmp_path / "run", 7, values), tmp_path / "a.png"
    assert look(str(folder), plot=str(file)).startswith(f"{file}, ")
    found = pixels(file)
    coloured = (found[..., :3].max(-1) - found[..., :3].min(-1) > 0.3).any(1)  # lines; text and axes are grey
    bands = np.flatnonzero(np.diff(coloured.astype(int)) == 1).size
    assert found.shape[1] == 1309 and bands == 2
    save(tmp_path / "run", 8, values)
    look(str(tmp_path / "run"), plot=str(file))
    assert pixels(file).shape[0] > 2 * found.shape[0]  # the loss and the moves, too


def test_a_picture_of_very_many_families_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcpipe import plot

    monkeypatch.setattr(plot, "MOST", 2)
    values = {("parameter", name): np.ones(2, np.float32) for name in ("a", "b", "c")}
    folder = save(tmp_path / "run", 1, values)
    assert "the picture has the first 2 of 3 rows" in look(str(folder), plot=str(tmp_path / "a.png"))
    assert "rows" not in look(str(folder), plot=str(tmp_path / "a.html"))


# --- sentences


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plot", "x.pdf"], "x.pdf is to be drawn: end its name in .png or .html"),
        (["--only", "layer.7.*"], "no tensor of"),
        (["--history", "--diff", "x"], "--history does not go with --diff, --merge or --stats"),
        (["--plot", "lost/x.png"], "lost/x.png cannot be written (No such file or directory); choose another name"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["inspect", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_folders_that_have_no_history(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the history is that of a run folder"):
        look(str(run / "step_00000010"), history=True)
    for step in STEPS:
        damage(run / f"step_000000{step}")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        look(str(run), histogram=True, history=True)
    with pytest.raises(UserError, match=r"the values in .*step_00000040 are not counted: .* is damaged in bytes"):
        look(str(run), histogram=True)
    page = tmp_path / "a.html"
    assert look(str(run), history=True, plot=str(page)).count("is damaged") == len(STEPS)
    assert page.read_text(encoding="utf-8").count("is damaged") == len(STEPS)


def test_without_matplotlib_there_is_a_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "whole" in look(str(run), history=True)
    with pytest.raises(UserError, match="need matplotlib"):
        look(str(run), plot=str(tmp_path / "a.png"))
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("values", "bins"), [(24, 5), (450, 5), (500, 25), (1000, 50), (2000, 100)])
def test_few_values_are_drawn_in_wider_bins(values: int, bins: int) -> None:
    edges = np.linspace(-1, 1, 101)
    counts = np.histogram(np.random.default_rng(0).uniform(-1, 1, values), edges)[0]
    wide, joined = charts._joined(edges.tolist(), counts.tolist())
    assert len(joined) == bins and sum(joined) == values and len(wide) == bins + 1 and wide[-1] == edges[-1]
    assert joined == [sum(counts[i : i + 100 // bins]) for i in range(0, 100, 100 // bins)]


def test_of_many_lines_some_are_drawn_and_the_ends_are_named() -> None:
    shown = charts._shaded([f"layer {i}" for i in range(80)])
    assert len(shown) == charts.SHADES and len({colour for _, colour, _ in shown}) == charts.SHADES
    assert [label for _, _, label in shown if label] == ["layer 0", "layer 79"]
    assert charts._shaded(["embed"]) == [("embed", charts.FIRST, "embed")]
