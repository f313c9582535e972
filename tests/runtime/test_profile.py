"""``train --profile``: the trace of the last step has everything that every rank did in it, and the run is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcpipe import profile
from hpcpipe.__main__ import main, parser
from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import UserError, loads
from hpcpipe.planner.plan import plan, resolve
from hpcpipe.profile import Timed
from hpcpipe.train import train
from tests.small_run import VOCAB, Result, collect, run, run_toml, write_tokens
from tests.trace_file import hold_to_the_step, of, read


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


def profiled(data: Path, out: Path, ranks: int, file: str = "", **settings: object) -> Result:
    """The run of small_run, with a trace of its last step."""
    config = loads(run_toml(data, out, **settings))

    def rank(link: Link) -> None:
        train(config, link, file)

    LocalWorld(ranks).run(rank)
    return collect(out)


LAYOUTS = [
    (2, {}),
    (2, {"model": "untied", "eval__every": 4, "eval__microbatches": 2}),
    (4, {"pipeline__replicas": 2}),
    (3, {"model": "untied", "pipeline__schedule": "zb_h2", "optimizer__early": True}),
    (2, {"pipeline__schedule": "zb_v", "checkpoint__every": 1}),
]


@pytest.mark.parametrize(("ranks", "settings"), LAYOUTS)
def test_a_trace_has_all_that_was_done_in_the_last_step(
    data: Path, tmp_path: Path, ranks: int, settings: dict[str, object]
) -> None:
    plain = run(data, tmp_path / "plain", ranks, **settings)
    again = profiled(data, tmp_path / "run", ranks, **settings)
    assert (again.losses, again.tensors) == (plain.losses, plain.tensors)
    file = tmp_path / "run" / "trace.json"
    slices = hold_to_the_step(file, tmp_path / "run")
    assert not (tmp_path / "plain" / "trace.json").exists()
    assert {e["name"] for e in slices["save"]} >= {"write step_00000004", "commit step_00000004"}
    made = plan(resolve(loads(run_toml(data, tmp_path / "run", **settings)), VOCAB), ranks, 1)
    assert sum(e["args"]["flops"] for e in slices["compute"]) == pytest.approx(made.flops / made.replicas)
    reduced = {e["name"] for e in slices.get("reduce", []) if e["name"].startswith("reduce")}
    assert reduced == ({"reduce stage 0", "reduce stage 1"} if "pipeline__replicas" in settings else set())
    asked = any(e["name"] == "sum of the step before" for e in slices.get("reduce", []))
    assert asked == ("optimizer__early" in settings)
    assert any(e["name"] == "validation" for e in slices["beside the ops"]) == ("eval__every" in settings)


def test_what_was_predicted_lies_under_what_was_done_and_ranks_tell_their_hosts(data: Path, tmp_path: Path) -> None:
    profiled(data, tmp_path / "run", 2, str(tmp_path / "mine.json"))
    assert not (tmp_path / "run" / "trace.json").exists()
    found = read(tmp_path / "mine.json")
    order = {e["pid"]: e["args"]["sort_index"] for e in found if e["name"] == "process_sort_index"}
    title = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    shown = [title[pid] for pid in sorted(title, key=lambda pid: order[pid])]
    assert shown[1::2] == ["rank 0, predicted", "rank 1, predicted"]
    assert [word.split(" on ")[0] for word in shown[::2]] == ["rank 0", "rank 1"] and " on " in shown[0]
    below = [e for e in of(found, "X") if e["pid"] > 2]
    assert sorted(e["name"] for e in below) == sorted(e["name"] for e in of(found, "X") if e["name"][1].isdigit())[::2]


def test_a_run_that_has_nothing_to_do_writes_no_trace(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", 2)
    profiled(data, tmp_path / "run", 2)
    assert not (tmp_path / "run" / "trace.json").exists()


def test_a_file_that_cannot_be_written_is_known_before_the_first_step(data: Path, tmp_path: Path) -> None:
    for file, words in (("lost/t.json", "no such folder, or not writable"), (".", "is a folder; name a file")):
        with pytest.raises(UserError, match=words):
            profiled(data, tmp_path / "run", 2, str(tmp_path / file))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_trace_that_fails_at_the_end_is_a_sentence_and_the_run_is_complete(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("trace: t.json cannot be written (No space left on device); choose another file")

    monkeypatch.setattr(profile, "write", full)
    with pytest.raises(UserError, match="No space left"):
        profiled(data, tmp_path / "run", 2)
    assert (tmp_path / "run" / "done.json").exists()


def test_the_option_of_the_verb() -> None:
    parse = parser().parse_args
    assert [parse(["train", "a.toml", *more]).profile for more in ([], ["--profile"], ["--profile", "t.json"])] == [
        None,
        "",
        "t.json",
    ]
    with pytest.raises(SystemExit):
        main(["plan", "a.toml", "--profile"])


def test_only_named_methods_are_timed_and_only_their_last_time_is_kept() -> None:
    settled: list[int] = []
    timed = Timed([3, 1, 2], {"append": "append {}", "sort": "sort"}, lambda: settled.append(1))
    timed.append(7)
    timed.sort()
    timed.sort()
    assert timed.pop() == 7 and timed.index(3) == 2
    assert list(timed.last) == ["append 7", "sort"] and len(settled) == 3
    assert timed.last["append 7"][1] <= timed.last["sort"][0] <= timed.last["sort"][1]
