"""A rank that stands still is found and named by all that wait for it: the way to it, and what ranks write meanwhile.

Time is a number that the tests turn on; a rank whose process is stopped is one that no longer looks.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import loads
from hpcpipe.job import Job
from hpcpipe.runtime import watch as watching
from hpcpipe.runtime.culprit import Crew, Evidence
from hpcpipe.runtime.standing import LAST, Awaited, Meeting, Standing, Where, Whereabouts, clear, meet, row
from hpcpipe.runtime.watch import ENDS, GRACE, Watch
from hpcpipe.schedule.op import Op, Schedule
from hpcpipe.schedule.program import Lifetimes, lower
from hpcpipe.train import train
from small_run import run, run_toml, write_tokens

RANKS, MICROS = 4, 8
ROWS = Path(__file__).resolve().parents[1] / "golden/schedules/1f1b_4_ranks_8_microbatches.txt"
SHORT = Lifetimes("F", "F", "B", "B")
PROGRAMS = lower(Schedule.parse(ROWS.read_text(encoding="utf-8").split("\n\n")[0]), [SHORT] * RANKS)
HOSTS = ("a", "a", "b", "b")
ALL = range(RANKS)


def crew(rank: int) -> Crew:
    return Crew(rank, HOSTS, PROGRAMS)


def whereabouts(rank: int, at: int, size: int = RANKS, runs: int = 1, step: int = 1) -> Where:
    """Where a rank of a job of 1f1b pipelines is that executes an instruction."""
    program = PROGRAMS[rank % RANKS]
    bound: Any = SimpleNamespace(program=program, instructions=program.instructions, at=at, runs=runs)
    mates = {rank % RANKS: tuple(range(rank % RANKS, size, RANKS))} if size > RANKS else {}
    return Whereabouts(bound, None, step, rank - rank % RANKS, size, mates).now()


def before(rank: int, op: str, size: int = RANKS) -> Where:
    """The same, by the WAIT in front of an op."""
    program = PROGRAMS[rank % RANKS]
    waits = (i for i, x in enumerate(program.instructions) if x.kind == "WAIT" and program.standing(i) == op)
    return whereabouts(rank, next(waits), size)


def computing(rank: int, op: str) -> Where:
    program = PROGRAMS[rank]
    return whereabouts(rank, next(i for i, x in enumerate(program.instructions) if "{}{}.{}".format(*x[:3]) == op))


def outside(wait: Awaited | None, turn: int = 3) -> Where:
    return Where((turn, wait), turn, "the work after step 1", "", wait)


def evidence(where: dict[int, Where], silent: dict[int, float], seconds: dict[int, float] | None = None) -> Evidence:
    standings = {
        rank: Standing(rank, HOSTS[rank % RANKS], 1, 5, (seconds or {}).get(rank, 60.0), w.turn, w.at, w.when, w.wait)
        for rank, w in where.items()
    }
    return Evidence(standings, silent)


SUM = Awaited("the sum over all ranks after step 1", ALL, LAST)
CHECKPOINT = Awaited("the checkpoint of step 1", ALL, patient=True)

# --- where a rank stands


def test_every_wait_names_a_rank_and_an_op_that_it_owes() -> None:
    for first in (0, RANKS):
        for rank, program in enumerate(PROGRAMS):
            for at, instruction in enumerate(program.instructions):
                wait = whereabouts(first + rank, at, 2 * RANKS).wait
                if instruction.kind == "WAIT":
                    assert wait is not None
                    (peer,) = wait.ranks
                    assert peer - first == program.awaited(at)[1] and f"rank {peer}" in wait.what
                    assert wait.owed in row(PROGRAMS[peer - first])
                elif instruction.kind == "REDUCE":
                    assert wait == Awaited(
                        f"the gradients of the other copies of stage {rank}", (rank, rank + RANKS), f"W{rank}.7"
                    )
                else:
                    assert wait is None
    assert before(2, "F2.3").wait == Awaited("F1.3 from rank 1", range(1, 2), "F1.3")
    assert before(6, "B2.0", 8).wait == Awaited("B3.0 from rank 7", range(7, 8), "B3.0")
    takes = [w for at in range(len(PROGRAMS[0].instructions)) if (w := whereabouts(0, at).wait) and "take" in w.what]
    assert takes[0] == Awaited("rank 1 to take F0.0", range(1, 2), "F1.0")


def test_where_a_rank_is_between_programs() -> None:
    bound: Any = SimpleNamespace(program=PROGRAMS[1], instructions=PROGRAMS[1].instructions, at=-1, runs=2)
    evaluation: Any = SimpleNamespace(**{**vars(bound), "runs": 1})
    place = Whereabouts(bound, evaluation, 42, 0, RANKS, {})
    assert place.now() == Where((6, None), 7, "the work after step 42", "", None)
    with pytest.raises(ZeroDivisionError), place.waiting("the sum", LAST):
        assert place.now().wait == Awaited("the sum", ALL, LAST)
        1 / 0
    assert place.now().wait is None
    evaluation.at = 0
    assert place.now().when == "the evaluation after step 42"
    evaluation.at, evaluation.runs, bound.at, bound.runs = -1, 0, 0, 3
    assert place.now()[1:] == (6, "F1.0", "step 42", None)
    with place.waiting("the sum", LAST):  # asked for in the next step, whoever is there already has done his part
        assert place.now()[1:] == (5, "F1.0", "", Awaited("the sum", ALL, LAST))


# --- the way to the culprit


def test_a_chain_ends_at_the_silent_rank() -> None:
    found = evidence({r: before(r, f"F{r}.3") for r in (2, 3)} | {0: before(0, "B0.0")}, {1: 45.0})
    end = "rank 1 (host a) has not answered for 45 s and owes B1.0 (stage 1, microbatch 0)"
    assert found.sentence(crew(3)) == (
        f"rank 3 (host b) has waited 60 s in step 1 for F2.3 from rank 2: rank 2 waits for F1.3 from rank 1, {end}"
    )
    assert found.sentence(crew(2)) == f"rank 2 (host b) has waited 60 s in step 1 for F1.3 from rank 1: {end}"
    # Of all that is waited for from a rank, every sentence names what comes first in its own order.
    assert found.sentence(crew(0)) == f"rank 0 (host a) has waited 60 s in step 1 for B1.0 from rank 1: {end}"


def test_a_silent_rank_that_had_answered_is_told_with_its_place() -> None:
    where = {0: before(0, "B0.0"), 1: computing(1, "F1.2"), 2: before(2, "F2.2"), 3: before(3, "F3.2")}
    said = evidence(where, {1: 20.0}).sentence(crew(0))
    assert said.endswith("rank 1 (host a) has not answered for 20 s and stood last at F1.2 (stage 1, microbatch 2)")
    said = evidence(where | {1: computing(1, "F1.1")}, {1: 20.0}).sentence(crew(0))
    assert said.endswith("for 20 s, stood last at F1.1 (stage 1, microbatch 1) and owes F1.2 (stage 1, microbatch 2)")
    # what it answered in an earlier step says nothing any more
    said = evidence(where | {1: computing(1, "F1.1")._replace(turn=1)}, {1: 20.0}).sentence(crew(0))
    assert said.endswith("for 20 s and owes F1.2 (stage 1, microbatch 2)")


def test_a_chain_ends_at_the_rank_that_computes() -> None:
    where = {r: before(r, f"F{r}.2") for r in (2, 3)} | {0: before(0, "B0.0"), 1: computing(1, "F1.2")}
    said = evidence(where, {}, {1: 80.0}).sentence(crew(3))
    assert said.endswith(
        "rank 2 waits for F1.2 from rank 1, rank 1 (host a) has been at F1.2 (stage 1, microbatch 2) for 80 s"
    )


def test_a_circle_names_everybody_in_it() -> None:
    where = {0: before(0, "B0.0"), 1: before(1, "F1.2"), 2: before(2, "F2.2"), 3: before(3, "F3.2")}
    assert evidence(where, {}).sentence(crew(3)) == (
        "rank 3 (host b) has waited 60 s in step 1 for F2.2 from rank 2: rank 2 waits for F1.2 from rank 1, "
        "rank 1 (host a) waits for F0.2 from rank 0, rank 0 (host a) waits for B1.0 from rank 1, and so in a circle"
    )


def test_a_sum_is_held_up_by_those_that_have_not_come() -> None:
    where = {r: outside(SUM) for r in (0, 3)}
    said = evidence(where | {1: outside(SUM)}, {2: 50.0}).sentence(crew(0))
    assert said == (
        "rank 0 (host a) has waited 60 s for the sum over all ranks after step 1: rank 2 (host b) has not answered for "
        "50 s and owes the sum over all ranks after step 1: it is at W2.7 (stage 2, microbatch 7) or later"
    )
    # somebody who has not come waits in turn, or works
    said = evidence(where | {2: before(2, "B2.7")}, {1: 50.0}).sentence(crew(3))
    assert "rank 1 (host a) has not answered for 50 s and owes the sum over all ranks" in said
    said = evidence(where | {2: computing(2, "W2.7"), 1: before(1, "B1.7")}, {}).sentence(crew(3))
    assert said.endswith("rank 2 (host b) has been at W2.7 (stage 2, microbatch 7) for 60 s")
    # who is in the next step already holds up nobody
    ahead = whereabouts(1, 0, runs=2)._replace(wait=None)
    said = evidence({r: outside(SUM) for r in (0, 2)} | {1: ahead}, {3: 44.0}).sentence(crew(0))
    assert "rank 3 (host b) has not answered" in said


def test_a_rank_owes_the_earliest_of_what_is_waited_for() -> None:
    """Ranks that begin the next step before the sum of the last one is there wait for a rank that owes that sum."""
    next_step = before(2, "F2.0")._replace(turn=4)
    where = {0: outside(SUM), 2: next_step, 3: outside(SUM)._replace(at="W3.0")}
    said = [evidence(where, {1: 40.0}).sentence(crew(rank)) for rank in (0, 2, 3)]
    assert all("owes the sum over all ranks after step 1: it is at W1.7 (stage 1, microbatch 7) or" in s for s in said)
    assert "for F1.0 from rank 1: rank 1 (host a) has not" in said[1]


def test_replicas_wait_for_each_others_gradients() -> None:
    size = 2 * RANKS
    programs = [next(i for i, x in enumerate(p.instructions) if x.kind == "REDUCE") for p in PROGRAMS]
    where = {rank: whereabouts(rank, programs[rank % RANKS], size) for rank in range(size) if rank != 6}
    found = evidence(where, {6: 33.0})
    said = found.sentence(Crew(2, HOSTS * 2, PROGRAMS))
    assert said.endswith(
        "in step 1 for the gradients of the other copies of stage 2: rank 6 (host b) has not answered for 33 s and "
        "owes W2.7 (stage 2, microbatch 7)"
    )


def test_when_nobody_is_to_blame_it_is_the_network() -> None:
    said = evidence({r: outside(SUM) for r in ALL}, {}).sentence(crew(0))
    assert said.endswith(": nobody holds that up: what carries the messages stands still")
    where = {r: outside(SUM, 5) for r in ALL} | {3: before(3, "F3.0"), 2: before(2, "F2.0"), 1: outside(None, 4)}
    said = evidence(where, {}).sentence(crew(3))
    assert said.endswith("rank 2 (host b) waits for F1.0 from rank 1, nobody holds that up: what carries the messages "
                         "stands still")  # fmt: skip


def test_who_else_is_silent() -> None:
    found = evidence({3: before(3, "F3.2")}, {0: 40.0, 1: 41.0, 2: 42.0})
    assert found.sentence(crew(3)).endswith(
        "rank 2 (host b) has not answered for 42 s and owes F2.2 (stage 2, microbatch 2); "
        "nor has rank 0 (host a), rank 1 (host a)"
    )


def test_a_long_chain_is_shortened() -> None:
    n = 40
    rows = tuple((Op("F", r, 0), Op("B", r, 0), Op("W", r, 0)) for r in range(n))
    programs = lower(Schedule("long", rows, tuple(range(n)), 1), [SHORT] * n)

    def waits(r: int) -> Where:
        return Where(
            0, 2, f"F{r}.0", "step 1", Awaited(f"F{r - 1}.0 from rank {r - 1}", range(r - 1, r), f"F{r - 1}.0")
        )

    found = Evidence({r: Standing(r, "h", 1, 1, 9.0, *waits(r)[1:]) for r in range(1, n)}, {0: 7.0})
    said = found.sentence(Crew(n - 1, ["h"] * n, programs))
    assert "rank 35 waits for F34.0 from rank 34, and so on over 30 ranks, rank 4 waits for F3.0 from rank 3" in said
    assert said.endswith("rank 0 (host h) has not answered for 7 s and owes F0.0 (stage 0, microbatch 0)")


def test_evidence_travels_as_json() -> None:
    found = evidence({0: outside(SUM), 2: before(2, "F2.1"), 3: computing(3, "F3.0")}, {1: 3.5})
    assert Evidence.from_dict(json.loads(json.dumps(found.to_dict()))) == found


# --- the ranks of a job, on a clock of the test


class Crowd:
    """Watches of all ranks over one folder; ``where`` is what each of them would say, ``stopped`` look no longer."""

    def __init__(self, folder: Path, where: dict[int, Where], seconds: float = 60.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.where, self.now = folder, where, 0.0
        self.stopped: set[int] = set()
        self.said: dict[int, tuple[float, str]] = {}
        self.ended: list[tuple[float, int, str]] = []
        self.watches = {r: self._watch(r, seconds) for r in where}

    def _watch(self, rank: int, seconds: float) -> Watch:
        return Watch(
            seconds, lambda: self.where[rank], crew(rank), Meeting(self.folder),
            end=lambda text: self.ended.append((self.now, rank, text)),
            say=lambda text: self.said.setdefault(rank, (self.now, text)) and None,
        )  # fmt: skip

    def until(self, end: float) -> None:
        """Lets time go on, second by second, to ``end`` or to the end of the job."""
        while self.now < end and not self.ended:
            self.now += 1
            for rank, watch in self.watches.items():
                if rank not in self.stopped:
                    watch.look(self.now)

    def files(self) -> list[str]:
        return sorted(f.name for f in self.folder.iterdir())


def hang(where: dict[int, Where] | None = None) -> dict[int, Where]:
    """All wait for rank 1."""
    usual = {0: before(0, "B0.0"), 1: before(1, "F1.2"), 2: before(2, "F2.2"), 3: before(3, "F3.2")}
    return usual | (where or {})


def test_all_that_wait_name_the_stopped_rank_before_anyone_ends_the_job(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang())
    crowd.stopped = {1}
    crowd.until(200)
    assert sorted(crowd.said) == [0, 2, 3]
    for at, text in crowd.said.values():
        assert 60 < at < 65
        assert "rank 1 (host a) has not answered for 4" in text
        assert text.endswith("s and owes F1.2 (stage 1, microbatch 2)")
    (end,) = crowd.ended
    assert end[0] >= max(at for at, _ in crowd.said.values()) and end[0] < 60 + GRACE + 5 and end[2] == ENDS


def test_a_rank_that_stops_later_is_told_with_its_last_place(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang({1: computing(1, "F1.2")}))
    crowd.until(25)
    crowd.stopped = {1}
    crowd.until(200)
    assert sorted(crowd.said) == [0, 2, 3]
    assert all(
        text.endswith("and stood last at F1.2 (stage 1, microbatch 2)") and "has not answered for 3" in text
        for _, text in crowd.said.values()
    )


def test_a_rank_that_computes_answers(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang({1: computing(1, "F1.2")}))
    crowd.until(200)
    assert sorted(crowd.said) == [0, 2, 3]
    assert all("has been at F1.2 (stage 1, microbatch 2) for 5" in text for _, text in crowd.said.values())
    assert len(crowd.ended) == 1


def test_ranks_that_began_to_wait_later_say_it_too(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, {r: outside(None, turn=1) for r in ALL} | {2: before(2, "F2.2")})
    crowd.stopped = {1}
    crowd.until(50)
    crowd.where |= hang()
    crowd.until(200)
    assert sorted(crowd.said) == [0, 2, 3] and all("rank 1 (host a) has not" in text for _, text in crowd.said.values())


def test_a_healthy_run_touches_no_file(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang())
    for step in range(100):  # somebody always waits, but never for long
        crowd.where = {r: w._replace(mark=step) for r, w in crowd.where.items()}
        crowd.until(crowd.now + 14)
        assert crowd.files() == []
    assert not crowd.said and not crowd.ended


def test_a_slow_rank_that_comes_in_time_costs_nothing_and_leaves_no_trace_in_later_reports(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang({1: computing(1, "F1.2")}))
    for step in range(5):
        crowd.where = {r: w._replace(mark=step) for r, w in crowd.where.items()}
        crowd.until(crowd.now + 55)
    assert not crowd.said and not crowd.ended
    quiet = crowd.files()
    assert len(quiet) <= 2 * RANKS + 1  # two answers of each and the question
    crowd.where = {r: w._replace(mark="idle", wait=None) for r, w in crowd.where.items()}
    crowd.until(crowd.now + 2000)
    assert len(crowd.files()) == len(quiet)
    # the old answer of the rank that stops now says nothing of where it stands
    crowd.where = hang()
    crowd.stopped = {1}
    crowd.until(crowd.now + 200)
    assert sorted(crowd.said) == [0, 2, 3]
    assert all("and owes F1.2" in text for _, text in crowd.said.values())


def test_a_rank_that_was_stopped_and_goes_on_is_forgiven(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang())
    crowd.stopped = {1}
    crowd.until(55)
    crowd.stopped = set()
    crowd.where = {r: w._replace(mark="on") for r, w in crowd.where.items()}
    crowd.until(80)
    assert not crowd.said and not crowd.ended


def test_at_a_checkpoint_ranks_wait_as_long_as_the_others_answer(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, {r: outside(CHECKPOINT) for r in ALL} | {2: outside(None)})
    crowd.until(1000)
    assert not crowd.said and not crowd.ended
    crowd.stopped = {2}
    crowd.until(1100)
    assert sorted(crowd.said) == [0, 1, 3]
    assert all(
        "for the checkpoint of step 1: rank 2 (host b) has not answered for " in text
        and text.endswith(
            "s, stood last at the work after step 1 (stage 2) and owes the checkpoint of step 1 (stage 2)"
        )
        for _, text in crowd.said.values()
    )


def test_who_waits_for_a_rank_that_is_at_files_waits_as_long_as_it_answers(tmp_path: Path) -> None:
    """A rank writes its share of a checkpoint and holds its update back; the others have gone on to the next step."""
    disk = Awaited("the checkpoint of step 1 to be written here", (), patient=True)
    crowd = Crowd(tmp_path, hang({1: outside(disk)}))
    crowd.until(1000)
    assert not crowd.said and not crowd.ended
    crowd.stopped = {1}
    crowd.until(1100)
    assert sorted(crowd.said) == [0, 2, 3]
    assert all("rank 1 (host a) has not answered for " in text for _, text in crowd.said.values())


def test_a_rank_that_wakes_up_too_late_blames_nobody(tmp_path: Path) -> None:
    """Launchers wake a stopped process before they kill it."""
    crowd = Crowd(tmp_path, hang())
    crowd.stopped = {1}
    while not crowd.said:
        crowd.until(crowd.now + 1)
    crowd.stopped = set()
    crowd.where[1] = before(1, "F1.3")
    crowd.until(200)
    assert sorted(crowd.said) == [0, 2, 3]


def test_a_judge_that_dies_is_replaced(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang())
    crowd.stopped = {1}
    crowd.until(59)
    assert Meeting(tmp_path).claim()  # by a rank that is gone before it has told
    crowd.until(200)
    assert sorted(crowd.said) == [0, 2, 3] and len(crowd.ended) == 1


def test_the_others_end_the_job_when_the_judge_cannot(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path, hang())
    crowd.stopped = {1}
    while not crowd.said:
        crowd.until(crowd.now + 1)
    judge = next(iter(crowd.said))
    crowd.stopped = {1, judge}
    crowd.until(200)
    assert crowd.ended and crowd.ended[0][1] != judge


# --- a folder that cannot be used


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Meeting, "_write", fails)
    yield


def plainly(crowd: Crowd) -> None:
    """Everybody says what it knows itself, then the job ends."""
    assert sorted(crowd.said) == [0, 2, 3] and len(crowd.ended) >= 1
    assert crowd.said[3][1] == "rank 3 (host b) has waited 61 s in step 1 for F2.2 from rank 2"


def test_on_a_full_disk_ranks_say_what_they_know(tmp_path: Path, full_disk: None) -> None:
    crowd = Crowd(tmp_path, hang())
    crowd.stopped = {1}
    crowd.until(200)
    plainly(crowd)


def test_without_a_folder_ranks_say_what_they_know(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "gone", hang())
    (tmp_path / "gone").rmdir()
    crowd.stopped = {1}
    crowd.until(200)
    plainly(crowd)
    # but nobody is blamed for a slow disk
    crowd = Crowd(tmp_path / "gone", {r: outside(CHECKPOINT) for r in ALL})
    (tmp_path / "gone").rmdir()
    crowd.until(1000)
    assert not crowd.said and not crowd.ended


def test_a_file_system_that_hangs_does_not_hide_a_hang() -> None:
    told: list[str] = []
    for wait, ends in ((before(3, "F3.2").wait, 72), (CHECKPOINT, 72), (None, 10**9)):
        watch = Watch(60, lambda wait=wait: outside(wait), crew(3), None, told.append)  # look() never comes back
        guard = watching._Still()
        for now in range(1, 100):
            watch._guard(now, guard)
            assert bool(told) == (now > ends), now
            if told:
                assert told.pop() == f"has waited 72 s for {wait.what if wait else ''}; {ENDS}"
                break


def test_a_job_that_is_suspended_as_a_whole_does_not_age(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 5000.0, 5001.0])
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    watch, seen = Watch(60, lambda: outside(None), crew(0), None, print), list[float]()
    ticks = iter([False] * 4 + [True])
    watch._stopped = SimpleNamespace(wait=lambda _: next(ticks))  # type: ignore[assignment]
    watch._every_tick(seen.append)
    assert seen == [1, 2, 7, 8]


def test_leftovers_of_earlier_runs_go_and_foreign_files_stay(tmp_path: Path) -> None:
    old = tmp_path / "standing" / "17"
    crowd = Crowd(old, hang())
    crowd.stopped = {1}
    crowd.until(200)
    assert len(crowd.files()) > 4
    (old / "rank_0_7.json.part").touch()
    meetings = LocalWorld(2).run(lambda link: meet(tmp_path, link))
    assert meetings[0] is not None and meetings[1] is not None and meetings[0].folder == meetings[1].folder
    assert list((tmp_path / "standing").iterdir()) == [meetings[0].folder]
    meetings[0].remove()
    assert list(tmp_path.iterdir()) == []
    old.mkdir(parents=True)
    (old / "notes.txt").touch()
    clear(tmp_path / "standing")
    assert [f.name for f in old.iterdir()] == ["notes.txt"]


class Blind:
    """A link of a rank on a node that does not see the folder."""

    def __init__(self, link: Link) -> None:
        self.rank, self.size, self.gather, self.link = link.rank, link.size, link.gather, link

    def bcast(self, value: Any) -> Any:
        found = self.link.bcast(value)
        return found / "gone" if isinstance(found, Path) else found


def test_a_folder_that_cannot_be_made_or_seen_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "standing").touch()
    assert LocalWorld(3).run(lambda link: meet(tmp_path, link)) == [None] * 3
    assert meet(tmp_path, LocalWorld(1).links[0]) is None
    (tmp_path / "standing").unlink()

    def elsewhere(link: Link) -> Meeting | None:  # a file system of its own
        blind: Any = Blind(link)
        return meet(tmp_path, blind if link.rank == 1 else link)

    assert LocalWorld(3).run(elsewhere) == [None] * 3


# --- in a run


def test_a_run_that_ends_well_leaves_no_folder(tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "tokens")
    run(data, tmp_path / "out", 3, train__steps=2, checkpoint__every=1)
    assert not (tmp_path / "out/standing").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit ends a watch too
@pytest.mark.parametrize(
    ("method", "ranks", "settings", "words"),
    [
        ("feed", 3, {}, "in step 3 for F1.0 from rank 1"),
        ("sum_ties", 3, {}, "for the sum over all ranks after step 3"),
        ("sum_ties", 3, {"optimizer__early": True}, "in step 4 for F1.0 from rank 1"),
        ("feed", 4, {"pipeline__replicas": 2}, "in step 3 for the gradients of the other copies of stage 1"),
    ],
)
def test_in_a_run_the_one_that_is_busy_is_named(
    method: str, ranks: int, settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, real = write_tokens(tmp_path / "tokens"), getattr(Job, method)

    def busy(job: Job, *args: Any) -> Any:
        world: Any = job.link.world  # type: ignore[attr-defined]
        while job.link.rank == 1 and job.program.runs == 2 + (method == "sum_ties") and world.failure is None:
            time.sleep(0.01)
        return real(job, *args)

    monkeypatch.setattr(Job, method, busy)
    settings = {"optimizer__early": False, "train__steps": 5, "pipeline__timeout": 2.0} | settings
    config = loads(run_toml(data, tmp_path / "out", "untied", **settings))

    def rank(link: Link) -> None:
        train(config, link)

    with pytest.raises(SystemExit):
        LocalWorld(ranks).run(rank)
    said = sorted(line for line in capfd.readouterr().err.splitlines() if "has waited" in line)
    host = LocalWorld(1).links[0].hostname
    assert [line[:6] for line in said] == [f"rank {rank}" for rank in range(ranks) if rank != 1]
    end = f"rank 1 (host {host}) has been at the work after step {2 if method == 'feed' else 3} (stage 1) for "
    assert all(end in line for line in said), said
    assert said[-1].startswith(f"rank {ranks - 1} (host {host}) has waited 2 s {words}: rank 1 "), said
