"""A trained model that is asked: the logits of its checkpoint, whatever wrote it, and text from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.backends.reference import ReferenceBackend
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError, loads
from hpcpipe.data import Dataset
from hpcpipe.predict import Predictor, open_predictor
from hpcpipe.prepare import prepare
from small_run import VOCAB, run, write_tokens

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"train__steps": 8, "eval__every": 8, "eval__microbatches": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module", params=["gpt2", "llama", "untied"])
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with dropout, of which nothing may be left when the model is asked."""
    out = tmp_path_factory.mktemp(request.param)
    run(data, out, 1, request.param, model__dropout=0.2, **SETTINGS)
    return out


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCAB, 16).astype(np.int32)


def with_backend(out: Path, backend: object, length: int = 16) -> Predictor:
    checkpoint = Checkpoint.open(out)
    return Predictor(checkpoint, loads(str(checkpoint.attributes["config"])).model, length, backend)


def test_logits_are_those_of_the_definition(trained: Path, ids: np.ndarray) -> None:
    predictor, tokenizer = open_predictor(str(trained), 5)
    found = predictor(ids)
    assert found.shape == (16, VOCAB) and found.dtype == np.float32
    assert tokenizer.name == "tokenizer.json" and tokenizer.parent == trained
    for backend in (ReferenceBackend("float32"), ReferenceBackend("float64")):
        np.testing.assert_allclose(found, with_backend(trained, backend)(ids), rtol=0, atol=1e-5)
    assert np.ptp(found) > 0.1  # it has learned something to be right about


def test_threads_change_no_bit(trained: Path, ids: np.ndarray) -> None:
    found = {with_backend(trained, CpuBackend(threads))(ids).tobytes() for threads in (1, 3)}
    assert len(found) == 1


def test_rows_do_not_depend_on_what_follows(trained: Path, ids: np.ndarray) -> None:
    predictor, _ = open_predictor(str(trained), 16)
    nine = predictor(ids[:9]).copy()
    five = predictor(ids[:5]).copy()
    assert nine.shape == (9, VOCAB) and five.shape == (5, VOCAB)
    assert five.tobytes() == nine[:5].tobytes()
    assert predictor(ids)[:9].tobytes() == nine.tobytes()
    assert predictor(ids[:1]).tobytes() == nine[:1].tobytes()


def test_rows_do_not_depend_on_the_window(trained: Path, ids: np.ndarray) -> None:
    short = with_backend(trained, CpuBackend(1), length=6)(ids[:6])
    long = with_backend(trained, CpuBackend(1), length=16)(ids[:6])
    np.testing.assert_allclose(short, long, rtol=0, atol=1e-6)


def test_the_validation_loss_is_that_of_the_logits(trained: Path, data: Path) -> None:
    """The loss that training told for its last step, computed again from the checkpoint by other means."""
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    stated = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
    predictor, _ = open_predictor(str(trained), 16)
    dataset, losses = Dataset.open(data), []
    for micro in range(3):
        ids, targets = dataset.batch("val", 0, micro, 0, batch=6, microbatch=2, replicas=1, length=16, seed=11)
        assert ids is not None and targets is not None
        for row in range(2):
            part = slice(16 * row, 16 * row + 16)
            logits = predictor(ids[part]).astype(np.float64)
            losses += list(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(16), targets[part]])
    assert np.mean(losses) == pytest.approx(stated, rel=1e-6)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_checkpoint_of_any_layout_gives_the_same_bits(
    data: Path, tmp_path: Path, ids: np.ndarray, model: str
) -> None:
    found = []
    for ranks in (1, 3):
        run(data, tmp_path / str(ranks), ranks, model, train__steps=3)
        found.append(open_predictor(str(tmp_path / str(ranks)), 16)[0](ids).tobytes())
    assert found[0] == found[1]


def test_a_step_folder_can_be_asked_too(data: Path, tmp_path: Path, ids: np.ndarray) -> None:
    run(data, tmp_path, 1, "llama", train__steps=4, checkpoint__every=2, checkpoint__keep=0)
    newest, older = (open_predictor(str(tmp_path / name), 1)[0](ids).copy() for name in ("", "step_00000002"))
    assert newest.tobytes() == open_predictor(str(tmp_path / "step_00000004"), 1)[0](ids).tobytes()
    assert newest.tobytes() != older.tobytes()


def test_a_window_is_as_long_as_the_text_but_not_longer_than_the_context(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, 1, "llama", train__steps=1, model__context=200)
    assert [open_predictor(str(tmp_path), n)[0].length for n in (1, 64, 65, 1000)] == [64, 64, 128, 200]


def test_nothing_to_ask_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        open_predictor(str(tmp_path), 5)


# --- from text to text


@pytest.fixture(scope="module")
def storyteller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text that repeats itself, with a tokenizer of its own."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"story {i}: " + "one two three four " * 40, encoding="utf-8")
    data = prepare([str(folder)], folder / "tokens", vocab_size=280, val_fraction=0.1, say=lambda _: None).path
    out = tmp_path_factory.mktemp("run")
    run(data, out, 2, "llama", train__steps=40, optimizer__lr=0.02)
    return out


def generated(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcpipe", "generate", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_generate_continues_a_text(storyteller: Path) -> None:
    asked = (str(storyteller), "--prompt", "one two ", "--tokens", "30", "--seed", "3")
    first, second = generated(*asked), generated(*asked)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("one two ") and first.stdout.endswith("\n")
    assert len(first.stdout) > len("one two \n") + 15
    assert set(first.stdout.split()) & {"three", "four"}  # it has read its data


def test_the_likeliest_text_does_not_depend_on_the_seed(storyteller: Path) -> None:
    found = {
        generated(str(storyteller), "--prompt", "one", "--tokens", "9", "--temperature", "0", "--seed", seed).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_a_missing_run_is_one_sentence_on_stderr(tmp_path: Path) -> None:
    done = generated(str(tmp_path / "nothing"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("hpcpipe: ") and done.stderr.count("\n") == 1
