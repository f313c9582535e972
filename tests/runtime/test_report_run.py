"""The page about a run that really was one: what its newest checkpoint says is on it."""

from __future__ import annotations

from pathlib import Path

from hpcpipe.report import page
from small_run import run, write_tokens


def test_a_run_says_what_it_is(tmp_path: Path) -> None:
    out = tmp_path / "<run>"
    run(write_tokens(tmp_path / "data"), out, 2, "llama", train__steps=2)
    text, notes = page(out)
    assert notes == [] and "<h1>&lt;run&gt;</h1>" in text
    assert "llama, 10,800 parameters: 2 layers, 4 heads (2 kv), width 24, ffn 40, vocabulary 61" in text
    assert "1f1b, 2 stages on 2 ranks, 6 microbatches each" in text
    assert "step_00000002, saved " in text and "[optimizer]" in text
    assert "measured</h2>" in text
    master = out / "step_00000002" / "master.h5"
    master.write_bytes(master.read_bytes()[:100])
    text, (note,) = page(out)
    assert note.startswith("what the newest checkpoint, step_00000002, says is left out: ")
    assert "step_00000002</td>" in text and "10,800" not in text
