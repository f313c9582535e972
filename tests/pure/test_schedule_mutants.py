"""Mutants: whatever is changed in a table or a program is refused, unless it does what it should all the same.

The judge is a small interpreter that shares nothing with ``validate``, ``lower`` and ``check``. It executes rows or
programs on symbols, with rendezvous semantics, and compares what every op is given with what it must be. Both sides
must say the same of every mutant: nothing wrong passes, nothing right is refused.
"""

import random
import re
from collections import defaultdict

import pytest

from hpcpipe.schedule.check import check
from hpcpipe.schedule.families import SCHEDULES, build
from hpcpipe.schedule.op import Op, Schedule, ScheduleError
from hpcpipe.schedule.program import POOLS, Lifetimes, Program, Slot, lower
from hpcpipe.schedule.replay import validate

NAMES = list(SCHEDULES)
TABLES, PROGRAMS = 300, 400  # mutants of each name
WRITES = {"F": ("Y", "SAVED", "KEPT"), "B": ("DX", "OWED"), "W": ()}


# --- the judge


class WrongError(Exception):
    """What the judge finds wrong."""


def arrives(kind, stage, micro, depth):
    """The ops whose results an op works on, by the mathematics of a chain of ``depth`` stages."""
    first, last = stage % depth == 0, stage % depth == depth - 1
    if kind == "F":
        return [] if first else [("F", stage - 1, micro)]
    if kind == "B":
        return [("F", stage, micro)] + ([] if last else [("B", stage + 1, micro)])
    return [("B", stage, micro)]


def everything(schedule):
    return {(k, s, m) for k in "FBW" for s in range(schedule.stages) for m in range(schedule.micros)}


def judge_ops(schedule, rows):
    """Each op once, at home, none before what it works on, and each stage's weight gradients summed in order."""
    depth, done, place, summed = schedule.depth, set(), [0] * len(rows), defaultdict(list)
    every, moved = everything(schedule), True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while place[rank] < len(row):
                kind, stage, micro = op = tuple(row[place[rank]])
                if op not in every or op in done or schedule.placement[stage] != rank:
                    raise WrongError(f"{op} on rank {rank}")
                if not done.issuperset(arrives(*op, depth)):
                    break
                if kind == "W" or (kind == "F" and stage % depth == depth - 1):
                    summed[kind, stage].append(micro)
                done.add(op)
                place[rank] += 1
                moved = True
    if done != every:
        raise WrongError(f"{len(every - done)} ops never run")
    if any(micros != sorted(micros) for micros in summed.values()):
        raise WrongError("sums in another order")


def meant(pool, stage, micro):
    """The tensor that a stage means by a pool: its X is the Y of the stage before, its DY the DX of the one after."""
    return {"X": ("Y", stage - 1, micro), "DY": ("DX", stage + 1, micro)}.get(pool, (pool, stage, micro))


class Message:
    def __init__(self, tensor, mine, theirs):
        self.tensor, self.mine, self.theirs, self.number = tensor, mine, theirs, len(mine)
        mine.append(self)

    @property
    def over(self):
        return len(self.theirs) > self.number


class Judge:
    """Executes programs: a rank goes on until a WAIT whose other half has not been started."""

    def __init__(self, schedule, programs):
        self.schedule, self.programs = schedule, programs
        self.sends, self.posts = defaultdict(list), defaultdict(list)
        self.holds = [{} for _ in programs]  # of each rank: what is in a slot
        self.under_way = [{} for _ in programs]  # and the message that is
        self.done = [[] for _ in programs]
        self.reduced = []
        place, moved = [0] * len(programs), True
        while moved:
            moved = False
            for rank, program in enumerate(programs):
                while place[rank] < len(program.instructions) and self.step(rank, program.instructions[place[rank]]):
                    place[rank] += 1
                    moved = True
        if any(n < len(p.instructions) for n, p in zip(place, programs, strict=True)):
            raise WrongError("deadlock")
        self.end()

    def step(self, rank, i):
        """Whether the rank gets through the instruction."""
        if i.kind == "REDUCE":
            self.reduced.append(i.stage)
            if sum(op[:2] == ("W", i.stage) for op in self.done[rank]) < self.schedule.micros:
                raise WrongError("reduced too early")
            return True
        if i.kind in "FBW":
            self.compute(rank, i)
            return True
        return self.message(rank, i)

    def compute(self, rank, i):
        for pool, slot in zip(POOLS, i.slots, strict=True):
            reads = slot is not None and pool not in WRITES[i.kind]
            if reads and self.holds[rank].get(slot) != meant(pool, i.stage, i.micro):
                raise WrongError(f"{i[:3]} reads {self.holds[rank].get(slot)} as {pool}")
        for pool, slot in zip(POOLS, i.slots, strict=True):
            if slot is not None and pool in WRITES[i.kind]:
                if slot in self.under_way[rank]:
                    raise WrongError(f"{i[:3]} writes what is under way")
                self.holds[rank][slot] = meant(pool, i.stage, i.micro)
        self.done[rank].append(i[:3])

    def message(self, rank, i):
        edge = self.programs[rank].channel.get(i.slot[:2])
        if edge is None:
            raise WrongError("no such channel")
        tensor, out = meant(i.slot.pool, i.stage, i.micro), edge.direction == "send"
        key = (rank, edge.peer, edge.tag) if out else (edge.peer, rank, edge.tag)
        mine, theirs = (self.sends, self.posts) if out else (self.posts, self.sends)
        here = self.under_way[rank]
        if i.kind == "WAIT":
            return self.wait(rank, i.slot, tensor, out)
        if i.slot in here or (i.kind == "SEND") != out:
            raise WrongError(f"{i.kind} in a slot under way, or against its direction")
        if out and self.holds[rank].get(i.slot) != tensor:
            raise WrongError(f"sends {self.holds[rank].get(i.slot)} as {tensor}")
        here[i.slot] = Message(tensor, mine[key], theirs[key])
        if not out:
            self.holds[rank][i.slot] = None  # it may come at any time
        return True

    def wait(self, rank, slot, tensor, out):
        if slot not in self.under_way[rank]:
            raise WrongError("waits for nothing")
        message = self.under_way[rank][slot]
        if not message.over:
            return False
        if message.tensor != tensor or message.theirs[message.number].tensor != tensor:
            raise WrongError("waits for something else")
        del self.under_way[rank][slot]
        if not out:
            self.holds[rank][slot] = tensor
        return True

    def end(self):
        if any(self.under_way) or any(len(self.sends[k]) != len(self.posts[k]) for k in {*self.sends, *self.posts}):
            raise WrongError("something is still under way")
        judge_ops(self.schedule, self.done)
        if sorted(self.reduced) != list(range(self.schedule.stages)):
            raise WrongError("not every stage is reduced once")
        held = {tensor for holds in self.holds for tensor in holds.values()}
        depth = self.schedule.depth
        last = range(depth - 1, self.schedule.stages, depth)
        if not held.issuperset(("Y", s, m) for s in last for m in range(self.schedule.micros)):
            raise WrongError("a loss is lost")


def accepted(judge, *given):
    """Whether ``judge`` raises nothing, and what it says."""
    try:
        judge(*given)
    except (ScheduleError, WrongError) as error:
        return False, str(error)
    return True, ""


# --- tables


def shapes(name, rng, ranks, micros):
    """A random schedule of a name."""
    ranks = rng.randint(1, ranks)
    ranks += SCHEDULES[name].chains == 2 and ranks % 2
    family = SCHEDULES[name]
    stages = 0 if family.per_rank else family.usual * ranks + rng.choice((0, 0, 1))
    return build(name, stages, ranks, rng.randint(1, micros))


def changed_table(schedule, rng):
    """(what was done, the mutant)."""
    rows = [list(row) for row in schedule.rows]
    here = rng.randrange(len(rows))
    at = rng.randrange(len(rows[here]))
    kind, stage, micro = op = rows[here][at]
    what = rng.choice(("dropped", "doubled", "swapped", "next", "moved", "renamed", "restaged", "retyped"))
    if what == "dropped":
        del rows[here][at]
    elif what == "doubled":
        rows[here].insert(rng.randint(0, len(rows[here])), op)
    elif what in ("swapped", "next"):
        other = rng.randrange(len(rows[here])) if what == "swapped" else min(at + 1, len(rows[here]) - 1)
        rows[here][at], rows[here][other] = rows[here][other], op
    elif what == "moved":
        there = rng.randrange(len(rows))
        del rows[here][at]
        rows[there].insert(rng.randint(0, len(rows[there])), op)
    else:
        other = {
            "renamed": Op(kind, stage, rng.randint(0, schedule.micros)),
            "restaged": Op(kind, rng.randint(0, schedule.stages), micro),
            "retyped": Op(rng.choice("FBW"), stage, micro),
        }
        rows[here][at] = other[what]
    return f"{op} on rank {here} {what}", Schedule(
        schedule.name, tuple(map(tuple, rows)), schedule.placement, schedule.micros, schedule.chains
    )


@pytest.mark.parametrize("name", NAMES)
def test_tables(name):
    rng, refused, equivalent = random.Random(f"table {name}"), 0, 0
    for _ in range(TABLES):
        schedule = shapes(name, rng, 4, 5)
        what, mutant = changed_table(schedule, rng)
        right, why = accepted(judge_ops, mutant, mutant.rows)
        passes, message = accepted(validate, mutant)
        assert passes == right, f"{what}: the judge says {why or 'right'}, validate {message or 'nothing'}\n{mutant}"
        if right:
            equivalent += 1
            accepted_programs(mutant, rng)
        else:
            refused += 1
            shown(mutant, message)
            with pytest.raises(ScheduleError):
                lower(mutant, [Lifetimes("W", "F", "W", "B")] * mutant.stages)
    assert refused > TABLES / 2 and equivalent > TABLES / 20


def shown(mutant, message):
    """The message has the grid, a line for each rank, and brackets around ops that are at fault where they stand."""
    head, *lines = message.splitlines()
    grid = [line for line in lines if re.match(r"  rank \d+:", line)]
    assert [int(line.split()[1][:-1]) for line in grid] == list(range(mutant.ranks))
    marked = [(int(line.split()[1][:-1]), Op.parse(op)) for line in grid for op in re.findall(r"\[(.+?)\]", line)]
    assert marked or " missing: " in head
    for rank, op in marked:
        assert op in mutant.rows[rank] and str(op) in message.split("  rank 0:")[0]


def accepted_programs(schedule, rng):
    programs = lower(schedule, lifetimes(schedule, rng))
    check(programs)
    Judge(schedule, programs)


# --- programs


def lifetimes(schedule, rng):
    return [Lifetimes(*(rng.choice("FBW") for _ in range(2)), *(rng.choice("BW") for _ in range(2)))] * schedule.stages


def is_message(i):
    return i.kind in ("POST", "SEND", "WAIT")


def another_slot(program, i, rng):
    """The instruction with one of its slots another one of its pool; None where each pool has only one."""
    slots = i.slots if i.slots else (i.slot,)
    can = [n for n, slot in enumerate(slots) if slot is not None and program.counts[slot[:2]] > 1]
    if not can:
        return None
    which = rng.choice(can)
    stage, pool, number = slots[which]
    count = program.counts[stage, pool]
    other = Slot(stage, pool, (number + rng.randrange(1, count)) % count)
    return i._replace(slots=(*slots[:which], other, *slots[which + 1 :])) if i.slots else i._replace(slot=other)


def changed_programs(programs, rng):
    """(what was done, the mutant); None where there was nothing to do."""
    rank = rng.randrange(len(programs))
    program = programs[rank]
    rows = list(program.instructions)
    messages = [n for n, i in enumerate(rows) if is_message(i)]
    ops = [n for n, i in enumerate(rows) if not is_message(i)]
    what = rng.choice(("dropped", "doubled", "moved", "moved", "another slot", "another slot", "reduced", "worked"))
    if what in ("reduced", "worked"):  # the same to an op, or to a REDUCE
        messages = [n for n in ops if (rows[n].kind == "REDUCE") == (what == "reduced")]
        what = rng.choice(("dropped", "doubled", "moved"))
    if what == "another slot":
        at = rng.randrange(len(rows))
        other = another_slot(program, rows[at], rng)
        if other is None:
            return None
        rows[at] = other
    elif not messages:
        return None
    else:
        at = rng.choice(messages)
        i = rows[at]
        if what != "doubled":
            del rows[at]
        if what != "dropped":
            far = rng.choice((1, 1, 2, 3, 5, len(rows)))
            rows.insert(max(0, min(len(rows), at + rng.choice((-far, far)))), i)
    mutant = Program.of(rank, rows, program.counts, program.edges)
    return f"rank {rank}, instruction {at} {what}", (*programs[:rank], mutant, *programs[rank + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_programs(name):
    rng, refused, equivalent = random.Random(f"program {name}"), 0, 0
    schedule, programs = None, ()
    for n in range(PROGRAMS):
        if n % 4 == 0:
            schedule = shapes(name, rng, 4, 5)
            programs = lower(schedule, lifetimes(schedule, rng))
            Judge(schedule, programs)
        change = changed_programs(programs, rng)
        if change is None:
            continue
        what, mutant = change
        right, why = accepted(Judge, schedule, mutant)
        passes, message = accepted(check, mutant)
        assert passes == right, f"{what}: the judge says {why or 'right'}, check {message or 'nothing'}\n{schedule}"
        refused, equivalent = refused + (not right), equivalent + right
    assert refused > PROGRAMS / 3 and equivalent > PROGRAMS / 40
