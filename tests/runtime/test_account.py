"""Where the time of a step goes: every second of a program's clock is in one part, and waits are told apart."""

from __future__ import annotations

import numpy as np
import pytest

from hpcpipe.runtime.account import PARTS, Account
from hpcpipe.schedule.families import SCHEDULES, build
from hpcpipe.schedule.program import Lifetimes, Program, lower

KEEPS_X = Lifetimes("W", "F", "W", "B")


def programs(name: str, ranks: int, micros: int) -> tuple[Program, ...]:
    schedule = build(name, 0, ranks, micros)
    return lower(schedule, [KEEPS_X] * schedule.stages)


def run(program: Program, seconds: dict[str, float]) -> np.ndarray:
    """A clock on which each instruction takes what its kind says."""
    spent = [seconds.get(i.kind, 0.0) for i in program.instructions]
    return np.concatenate([[5.0], 5.0 + np.cumsum(spent)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_second_is_in_one_part(name: str) -> None:
    rng = np.random.default_rng(3)
    for program in programs(name, 4, 6):
        account = Account(program)
        clock = 7.0 + np.concatenate([[0.0], np.cumsum(rng.random(len(program.instructions)))])
        released = clock[account.receives] + rng.uniform(-1, 2, len(account.receives))
        parts = account.parts(clock, released)
        assert len(parts) == PARTS.index("optimizer")
        assert (parts >= 0).all()
        assert parts.sum() == pytest.approx(clock[-1] - clock[0], rel=1e-12)


def test_a_wait_is_idle_until_the_sender_lets_go_and_exposed_from_then_on() -> None:
    program = programs("1f1b", 2, 4)[1]
    account, clock = Account(program), run(program, {"F": 1.0, "B": 1.0, "W": 1.0, "WAIT": 10.0, "SEND": 0.5})
    begin = clock[account.receives]
    waits, sends = len(account.receives), sum(i.kind == "SEND" for i in program.instructions)
    backs = sum(i.kind == "WAIT" for i in program.instructions) - waits  # until a sent message is taken
    for late, idle in ((-1.0, 0.0), (0.0, 0.0), (4.0, 4.0), (10.0, 10.0), (99.0, 10.0)):
        compute, exposed, *idles = account.parts(clock, begin + late)
        assert compute == 12.0
        assert sum(idles) == pytest.approx(waits * idle)
        assert exposed == pytest.approx(waits * (10 - idle) + 0.5 * sends + 10 * backs)


def test_idle_time_is_told_apart_by_where_it_is() -> None:
    """Rank 0 of four: its first B is waited for in the warm-up, its last Bs in the cool-down, the others between."""
    program = programs("1f1b", 4, 6)[0]
    account, clock = Account(program), run(program, {"WAIT": 1.0})
    waits = [i for i in program.instructions if i.kind == "WAIT" and i.slot is not None and i.slot.pool == "DY"]
    assert len(account.receives) == len(waits) == 6
    _, _, warmup, steady, cooldown = account.parts(clock, np.full(6, np.inf))
    assert (warmup, steady, cooldown) == (1.0, 1.0, 4.0)
    _, _, warmup, steady, cooldown = Account(programs("gpipe", 4, 6)[0]).parts(
        run(programs("gpipe", 4, 6)[0], {"WAIT": 1.0}), np.full(6, np.inf)
    )
    assert (warmup, steady, cooldown) == (1.0, 0.0, 5.0)


def test_the_longest_wait_is_named() -> None:
    program = programs("1f1b", 4, 6)[2]
    account = Account(program)
    spent = np.full(len(program.instructions), 0.1)
    at = int(account.receives[5])
    spent[at] = 3.0
    worst = account.worst(np.concatenate([[0.0], np.cumsum(spent)]))
    assert worst.seconds == pytest.approx(3.0)
    assert worst.what == str(program.awaited(at)[0]) and worst.what[0] in "FB"


def test_a_rank_alone_waits_for_nothing() -> None:
    (program,) = programs("1f1b", 1, 3)
    account = Account(program)
    assert account.worst(run(program, {"F": 1.0})).what == ""
    assert list(account.parts(run(program, {"F": 1.0, "W": 2.0}), np.zeros(0))) == [9.0, 0.0, 0.0, 0.0, 0.0]
