"""The queue of the server, and the threads that empty it in batches.

On CPUs each worker is a thread whose matrix products run on one core: for small networks that is faster, and far
steadier beside other load, than one batch on all cores.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from catmaps.model import Run
from catmaps.scoring import bound_given, integrand_of
from catmaps.server.pieces import Abandoned, Ids, Piece, draw_pieces, least_rows, most_rows

LINGER, LONGEST_LINGER = 0.05, 0.15
"""How long a worker waits for more rows after the last one came, and at most, in shares of a usual batch's time:
clients that were answered together ask again together."""


@dataclass(eq=False)
class Scored:
    """A text whose bound is wanted, given its `known` tokens: a job of its own."""

    piece: Piece
    seed: int

    @property
    def key(self) -> Hashable:
        return id(self)

    @property
    def abandoned(self) -> bool:
        return self.piece.abandoned


Work = Piece | Scored


@dataclass(frozen=True)
class Shares:
    """A bound: nats, its standard error, and what each position adds."""

    nats: float
    stderr: float
    per_token: list[float]


@dataclass(eq=False)
class Done:
    """A piece of text as drawn, or a bound."""

    ids: Ids | None
    shares: Shares | None
    seconds: float
    """Of its batch."""
    rows: int
    """That its batch held."""


@dataclass(eq=False)
class Job:
    """Work that somebody waits for."""

    work: Work
    done: "Future[Done]" = field(default_factory=Future)


Observe = Callable[[int, int, float], None]
"""Told of every batch: rows, network calls, seconds."""


class Batcher:
    """Draws and scores what is submitted, in `workers` threads.

    Args:
        run: A flow.
        workers: Threads; on CPUs one core each.
        rows: The most of a batch.
        observe: Told of every batch, in its thread.
    """

    def __init__(self, run: Run, *, workers: int, rows: int, observe: Observe) -> None:
        self._run, self._rows, self._observe = run, rows, observe
        self._integrand = integrand_of(run.flow_network)
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._usual = 0.05
        self._closing = False
        self._threads = [threading.Thread(target=self._work, name=f"draw-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Rows that wait."""
        return len(self._queue)

    def submit(self, work: Work) -> "Future[Done]":
        """Puts work into the queue. RuntimeError once closed."""
        job = Job(work)
        with self._changed:
            if self._closing:
                raise RuntimeError("the queue is closed")
            self._queue.append(job)
            self._changed.notify_all()
        return job.done

    def close(self) -> None:
        """Finishes what is queued and ends the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        if self._run.device.type == "cpu":
            torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        while jobs := self._next():
            began = time.monotonic()
            try:
                results = self._do([job.work for job in jobs])
            except Abandoned as gone:
                for job in jobs:
                    job.done.set_exception(gone)
                continue
            except Exception as error:  # the batch's fault is every row's, and not the thread's end
                for job in jobs:
                    job.done.set_exception(error)
                continue
            seconds = time.monotonic() - began
            self._usual = 0.8 * self._usual + 0.2 * min(seconds, 1.0)
            self._observe(len(jobs), self._calls(jobs[0].work), seconds)
            for job, (ids, shares) in zip(jobs, results, strict=True):
                job.done.set_result(Done(ids, shares, seconds, len(jobs)))

    def _next(self) -> list[Job]:
        """The next batch; none once closed and empty."""
        with self._changed:
            self._waiting += 1
            try:
                while True:
                    self._changed.wait_for(lambda: self._queue or self._closing)
                    self._linger()
                    if jobs := self._take():
                        return jobs
                    if self._closing and not self._queue:
                        return []
            finally:
                self._waiting -= 1

    def _linger(self) -> None:
        """Waits for rows that are about to come."""
        until = time.monotonic() + LONGEST_LINGER * self._usual
        while not self._closing and len(self._queue) < self._rows and time.monotonic() < until:
            before = len(self._queue)
            self._changed.wait(LINGER * self._usual)
            if len(self._queue) <= before:
                return

    def _take(self) -> list[Job]:
        """Rows like the oldest one, as many as a batch holds; workers that are idle leave each other their share."""
        alive = [job for job in self._queue if not job.work.abandoned and not job.done.cancelled()]
        if not alive:
            self._queue.clear()
            return []
        first = alive[0].work
        like = [job for job in alive if job.work.key == first.key]
        most = 1
        if isinstance(first, Piece):
            share = max(-(-len(like) // self._waiting), least_rows(first))
            most = most_rows(first, self._run, min(share, self._rows))
        taken = like[:most]
        left = set(map(id, taken))
        self._queue = deque(job for job in alive if id(job) not in left)
        return [job for job in taken if job.done.set_running_or_notify_cancel()]

    def _do(self, works: Sequence[Work]) -> list[tuple[Ids | None, Shares | None]]:
        if isinstance(works[0], Scored):
            return [(None, self._score(work)) for work in works if isinstance(work, Scored)]
        return [(ids, None) for ids in draw_pieces(self._run, [work for work in works if isinstance(work, Piece)])]

    def _score(self, work: Scored) -> Shares:
        tokens, known = (torch.from_numpy(part)[None] for part in (work.piece.tokens, work.piece.known))
        given = known if bool(known.any()) else None
        bound = bound_given(self._run, tokens, given, seed=work.seed, integrand=self._integrand)
        return Shares(bound.nats.item(), bound.stderr.item(), bound.per_token[0].tolist())

    @staticmethod
    def _calls(work: Work) -> int:
        return work.settings.config.calls if isinstance(work, Piece) else 18
