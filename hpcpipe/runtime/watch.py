"""Ends a job that stands still and says where: each rank that waits names the way to the culprit, then the job ends.

Beside the main thread. A rank that has waited for a quarter of the time asks all others where they stand, again and
again; when the time is up, one rank puts the answers together (``Evidence``), every waiting rank says its sentence from
them, and after a moment the job is aborted. Where the folder cannot be used a rank says what it knows itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable

from hpcpipe.runtime.culprit import Crew, Evidence, waited
from hpcpipe.runtime.standing import Meeting, Standing, Where

ENDS = "the job ends, start it again to continue from its newest checkpoint"
GRACE = 2.0  # seconds for every rank to say its sentence before the first ends the job
LATE = 10.0  # seconds after which a folder, or a rank, that should have spoken is no longer waited for


class Watch:
    """Looks at ``where()`` from beside; a rank that is at one point for ``seconds``, waiting, ends the job by ``end``.

    What a rank has to say goes to ``say``. ``look`` is the whole behaviour, given the time.
    """

    def __init__(
        self, seconds: float, where: Callable[[], Where], crew: Crew, meeting: Meeting | None,
        end: Callable[[str], object], say: Callable[[str], object] | None = None,
    ) -> None:  # fmt: skip
        self.seconds, self.where, self.crew, self.meeting, self.end = seconds, where, crew, meeting, end
        self.say = say or _print
        self.ends: float | None = None  # when this rank ends the job, once it has said why
        self.tick = min(1.0, seconds / 20)
        # How often the folder is looked into: when all is well, and when somebody waits for long.
        self.slow, self.fast = seconds / 20, seconds / 200
        self._still = _Still()
        self._heard = self._next = 0.0  # when the folder last let go of us, when to look into it again
        self._questions: dict[int, float] = {}  # recent ones, and when they were first seen
        self._answers: dict[int, int] = {}  # the newest question that each rank has answered
        self._answered = 0
        self._turn: float | None = None  # when I may judge, should the rank that has claimed it not do so
        self._judge = False
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begins to look."""
        guard = _Still()
        for act in (self.look, lambda now: self._guard(now, guard)):
            threading.Thread(target=self._every_tick, args=(act,), daemon=True, name="watch").start()

    def stop(self) -> None:
        """Nothing is reported from here on."""
        self._stopped.set()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _every_tick(self, act: Callable[[float], None]) -> None:
        """Time that passes between two ticks counts up to five of them: a job that is suspended as a whole ages not."""
        now, last = 0.0, time.monotonic()
        while not self._stopped.wait(self.tick):
            clock = time.monotonic()
            now, last = now + min(clock - last, 5 * self.tick), clock
            try:
                act(now)
            except SystemExit:  # this thread has ended the job, and has no more to say
                return

    def look(self, now: float) -> None:
        """One look at where I am, and into the folder."""
        if self.ends is not None:
            if now >= self.ends:
                self.end(ENDS)
            return
        where = self.where()
        seconds = self._still.seconds(where.mark, now)
        me = Standing(
            self.crew.rank, self.crew.hosts[self.crew.rank], os.getpid(), self._answered, seconds, where.turn, where.at,
            where.when, where.wait,
        )  # fmt: skip
        said = self._said(me, now)
        if said:
            self.say(said)
            # The judge ends the job; the others only if that rank cannot.
            self.ends = now + GRACE + self.fast + (0 if self._judge else LATE / 2)

    def _said(self, me: Standing, now: float) -> str:
        """What there is to say now; nothing as long as nobody has waited too long."""
        overdue = me.wait is not None and me.seconds > self.seconds
        try:
            if self.meeting is None:
                raise OSError("there is no folder")
            evidence = self._meet(self.meeting, me, now, overdue)
            # One that all thought silent and that has just begun to wait has been woken up, to be ended.
            if evidence is None or (me.rank in evidence.silent and me.seconds < self.seconds / 4):
                return ""
            return evidence.of(me).sentence(self.crew)
        except (OSError, ValueError, KeyError, TypeError):
            if me.wait is None or me.wait.patient or not overdue:
                return ""
            self._judge = True
            return f"{self.crew.name(me.rank)} {waited(me)}"
        finally:
            self._heard = now

    def _guard(self, now: float, still: _Still) -> None:
        """Ends the job where the folder does not even refuse: a file system that hangs must not hide a hang."""
        where = self.where()
        seconds = still.seconds(where.mark, now)
        if self.ends is not None or where.wait is None or seconds < self.seconds + max(LATE, self.seconds / 5):
            return
        if not where.wait.patient or now - self._heard > self.seconds:
            self.end(f"has waited {seconds:.0f} s for {where.wait.what}; {ENDS}")

    # --- in the folder

    def _meet(self, meeting: Meeting, me: Standing, now: float, overdue: bool) -> Evidence | None:
        """Asks and answers; the evidence, when somebody has ended the job with it and I wait, or when I do."""
        waits = me.wait is not None
        long = waits and me.seconds > self.seconds / 4
        if now < self._next and not overdue:
            return None
        seen = meeting.look()
        self._answers = {**self._answers, **seen.answers}
        if seen.question > self._answered:
            self._answered = seen.question
            meeting.answer(me._replace(answers=seen.question))
            self._questions = {n: t for n, t in self._questions.items() if now - t < self.seconds}
            self._questions[seen.question] = now
        newest = max(self._questions.values(), default=-self.seconds)
        if long and now - newest > self.seconds / 10:
            meeting.ask(seen.question + 1)
        self._next = now + (self.fast if long or now - newest < self.seconds / 4 else self.slow)
        if seen.judged and waits:
            return Evidence.from_dict(meeting.evidence())
        return self._weigh(meeting, me, now) if overdue else None

    def _weigh(self, meeting: Meeting, me: Standing, now: float) -> Evidence | None:
        """All answers, when all have had the time to give one and it is mine to end the job."""
        if now - min(self._questions.values(), default=now) < self.seconds / 4:
            return None
        silent = self._silent(now)
        if me.rank in silent:
            raise OSError("what is written in the folder is not found there")
        recent = {rank: n for rank, n in self._answers.items() if n >= min(self._questions)}
        if not silent and any(s.wait is not None and s.wait.patient for s in (me, *meeting.read(recent).values())):
            return None  # all are awake, and somebody is at files: how long that takes nobody knows
        if not meeting.claim():
            self._turn = self._turn or now + max(GRACE, self.seconds / 10)
            if now < self._turn:
                return None
        standings = meeting.read(recent)
        missing = {rank: now - min(self._questions.values()) for rank in self._ranks() if rank not in standings}
        evidence = Evidence(standings, {**missing, **silent})
        self._judge = True
        with contextlib.suppress(OSError):
            meeting.publish(me.rank, evidence.to_dict())
        return evidence

    def _silent(self, now: float) -> dict[int, float]:
        """Ranks that have left a question open for a quarter of the time, with how long they have."""
        found = {}
        for rank in self._ranks():
            open_since = min((t for n, t in self._questions.items() if n > self._answers.get(rank, 0)), default=now)
            if now - open_since > self.seconds / 4:
                found[rank] = now - open_since
        return found

    def _ranks(self) -> range:
        return range(len(self.crew.hosts))


class _Still:
    """For how long a mark has not changed."""

    def __init__(self) -> None:
        self._mark: Hashable = None
        self._since = 0.0

    def seconds(self, mark: Hashable, now: float) -> float:
        if mark != self._mark:
            self._mark, self._since = mark, now
        return now - self._since


def _print(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        # One write: a line and its end written apart mix with what another thread says.
        print(f"{sentence}\n", end="", file=sys.stderr, flush=True)
