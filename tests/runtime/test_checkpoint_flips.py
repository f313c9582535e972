"""One flipped bit at a thousand places of a checkpoint: each is noticed, named by file, bytes and tensor, and survived.

The places are spread over all files, in values and between them (HDF5 headers, tables, the text before the master).
What is said must hold the place that was hit, and every tensor that it did not hit must read as it was.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hpcpipe import resume
from hpcpipe.__main__ import main
from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.checkpoint import shard, write
from hpcpipe.checkpoint.read import Checkpoint, newest_good
from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import UserError
from small_run import run, write_tokens
from tests.runtime.checkpoint_state import State, by_axis, load, same, save, state, unsynced  # noqa: F401

PATIENCE = 60  # seconds that one damaged checkpoint may take
RANGE = re.compile(r"bytes (\d+) to (\d+)")

Span = tuple[int, int, str]  # first byte, end, tensor


def turn(file: Path, bit: int) -> None:
    """One bit becomes the other, in place."""
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        (byte,) = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """The file with one bit turned; afterwards as it was."""
    turn(file, bit)
    try:
        yield
    finally:
        turn(file, bit)


@contextmanager
def deadline() -> Iterator[None]:
    """Whoever takes longer than PATIENCE hangs, and fails."""

    def late(*_: object) -> None:
        raise AssertionError(f"no answer within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def values_in(checkpoint: Checkpoint) -> dict[str, list[Span]]:
    """Where the values of tensors lie, by file."""
    found: dict[str, list[Span]] = {}
    for key, tensor in checkpoint.layout.items():
        for part in tensor.parts:
            end = part.offset + shard.nbytes(part, np.dtype(tensor.dtype).itemsize)
            found.setdefault(checkpoint.shards[part.shard].file, []).append((part.offset, end, " ".join(key)))
    return found


def places(folder: Path, spans: dict[str, list[Span]], count: int, seed: int) -> list[tuple[Path, int]]:
    """(file, bit): the ends of all files, one in each tensor, then a third each in master, between values, anywhere."""
    rng, shards, master = random.Random(seed), [folder / name for name in sorted(spans)], folder / "master.h5"
    found = [(f, bit) for f in (*shards, master) for bit in (0, 8 * f.stat().st_size - 1)]
    found += [(f, rng.randrange(8 * low, 8 * end)) for f in shards for low, end, _ in spans[f.name]]
    while len(found) < count:
        file = (master, *shards)[len(found) % 3 and rng.randint(1, len(shards))]
        bit = rng.randrange(8 * file.stat().st_size)
        inside = any(low <= bit // 8 < end for low, end, _ in spans.get(file.name, []))
        if len(found) % 3 != 1 or not inside:
            found.append((file, bit))
    return found


def check_told(said: str, file: Path, bit: int, spans: dict[str, list[Span]]) -> str:
    """The sentence names the file, a range that holds the byte, and the tensor of that byte; returns the tensor."""
    assert str(file) in said
    ranges = [(int(low), int(end)) for low, end in RANGE.findall(said)]
    assert any(low <= bit // 8 < end for low, end in ranges), f"byte {bit // 8} of {file.name}: {said}"
    hit = next((title for low, end, title in spans.get(file.name, []) if low <= bit // 8 < end), "")
    others = {title for parts in spans.values() for _, _, title in parts} - {hit}
    assert (not hit or hit in said) and not any(title in said for title in others), said
    return hit


def check_reads(checkpoint: Checkpoint, values: State, hit: str) -> None:
    """The tensor that was hit is refused, with its bytes; all others read as they were saved."""
    refused = []
    for key, array in values.items():
        try:
            assert checkpoint.read(*key).tobytes() == array.tobytes(), "wrong values were read without a word"
        except UserError as error:
            assert RANGE.search(str(error)) and " ".join(key) in str(error)
            refused.append(" ".join(key))
    assert refused == ([hit] if hit else [])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A run folder with a small step 20 and a step 40 of shards that have several blocks."""
    out, values = tmp_path_factory.mktemp("run"), state(2, scale=240)
    save(out, 20, state(1))
    save(out, 40, values, by_axis(2, 0))
    return out, values


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_a_flipped_bit_anywhere_is_noticed_named_and_survived(saved: tuple[Path, State], count: int) -> None:
    out, values = saved
    folder = write.step_folder(out, 40)
    whole = Checkpoint.open(folder)
    spans = values_in(whole)
    assert min(len(s.blocks) for s in whole.shards) > 1 and {f.name for f in folder.iterdir()} == {*spans, "master.h5"}
    hits = set()
    for file, bit in places(folder, spans, count, seed=count):
        with flipped(file, bit), deadline():
            found, warnings = newest_good(out)
            assert found and found.step == 20 and len(warnings) == 1 and "step_00000040 is passed over" in warnings[0]
            hit = check_told(warnings[0], file, bit, spans)
            hits.add(hit)
            if file.name == "master.h5":
                assert whole.verify()[0] in warnings[0]  # also by whoever had opened it before
                with pytest.raises(UserError, match=r"master\.h5 is damaged"):
                    Checkpoint.open(folder)
            check_reads(whole, values, hit)
    assert hits == {"", *(" ".join(key) for key in values)}  # headers, and every tensor once at least
    found, warnings = newest_good(out)
    assert found and found.step == 40 and warnings == [] and same(load(found), values)


def test_a_resume_by_several_ranks_falls_back_and_says_so(saved: tuple[Path, State]) -> None:
    """The ranks share the proof; all of them end with the same checkpoint and the same sentence."""
    out, _ = saved
    folder = write.step_folder(out, 40)
    spans = values_in(Checkpoint.open(folder))

    def find(link: Link) -> tuple[int, list[str]]:
        found, warnings = resume.find(out, link)
        return (found.step if found else 0), warnings

    for file, bit in places(folder, spans, 50, seed=5):
        with flipped(file, bit), deadline():
            told = LocalWorld(3).run(find)
        assert all(t == told[0] for t in told) and told[0][0] == 20
        check_told(told[0][1][0], file, bit, spans)
    assert LocalWorld(3).run(find) == [(40, [])] * 3


def test_inspect_tells_and_does_not_stumble(saved: tuple[Path, State], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = saved
    folder = write.step_folder(out, 40)
    spans = values_in(Checkpoint.open(folder))
    for file, bit in places(folder, spans, 60, seed=7):
        with flipped(file, bit), deadline():
            code = main(["inspect", str(folder)])
        told = capsys.readouterr()
        assert str(file) in told.out + told.err and "Traceback" not in told.err
        assert code == (2 if file.name == "master.h5" else 0)


@pytest.mark.parametrize("where", ["values", "headers", "master"])
def test_a_run_goes_on_from_the_one_before_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    monkeypatch.setattr(CpuBackend, "matmul_peak", lambda self, seconds: 1e11)  # told, not used
    data, often = write_tokens(tmp_path / "data"), {"checkpoint__every": 2, "checkpoint__keep": 0, "train__steps": 6}
    plain = run(data, tmp_path / "plain", 2, **often)
    shutil.copytree(tmp_path / "plain", tmp_path / "hurt")
    folder = write.step_folder(tmp_path / "hurt", 6)
    file = folder / ("master.h5" if where == "master" else "shard_0001.h5")
    byte = values_in(Checkpoint.open(folder))["shard_0001.h5"][0][0] + 5 if where == "values" else 99
    capsys.readouterr()
    turn(file, 8 * byte + 3)
    again = run(data, tmp_path / "hurt", 2, **often)
    told = capsys.readouterr().out
    assert "step_00000006 is passed over" in told and str(file) in told and "at step 4\n" in told
    assert again.losses[-2:] == plain.losses[-2:] and again.tensors == plain.tensors
    assert Checkpoint.open(folder).verify() == []  # saved anew over the damaged one
