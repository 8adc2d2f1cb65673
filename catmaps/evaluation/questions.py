"""Questions: which of several continuations is likeliest, with no more draws than it takes to tell."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from catmaps.errors import UserError
from catmaps.evaluation.conditional import Draw, Ids, Kind, Row, content_hash, path_place

PATH_PER_END = 8  # draws of the integral to one of the cross-entropy at its end, which varies far less
WAVE = 1024  # questions in work at a time: bounds the rows in memory


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many draws a bound may take.

    Attributes:
        samples: At most so many of the path for every continuation of a question.
        first: So many in the first round; every further round doubles the number.
        z: A question is decided when its best continuation leads every other by so many standard errors of their
            paired difference, by the sum and by the mean per character alike (what `acc` and `acc_norm` compare).
        rolling: Draws of the path for every window of a text.
        seed: Of all draws.
    """

    samples: int = 24
    first: int = 8
    z: float = 2.0
    rolling: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.samples, self.first, self.rolling) < 2 or self.z < 0 or not 0 <= self.seed < 1 << 63:
            raise UserError("--samples and --rolling-samples must be at least 2, --z and --seed not negative")

    def rounds(self, single: bool, lone: bool) -> Iterator[int]:
        """Numbers of draws at the end of each round."""
        drawn = 2 if single else self.samples if lone else min(self.first, self.samples)
        yield drawn
        while drawn < self.samples:
            drawn = self.samples if lone else min(2 * drawn, self.samples)
            yield drawn


class Question:
    """Continuations of prompts under common random numbers, and what their draws have been so far.

    If every continuation is one token, the path is left out (t_max = 0): the cross-entropy at t = 0 is then the
    likelihood itself, and nearly free of noise. Otherwise the bound is (14) with t_max = 0.9.

    Args:
        prompts: Token ids, one array for each continuation; they may be the same.
        continuations: Token ids; none means the empty continuation, which is certain.
        characters: Of each continuation, for the mean per character.
        budget: How many draws.
        key: What it shares random numbers with; by default its own prompts.
    """

    def __init__(
        self,
        prompts: Sequence[Ids],
        continuations: Sequence[Ids],
        characters: Sequence[int],
        budget: Budget,
        key: int | None = None,
    ) -> None:
        self.prompts, self.continuations, self.budget = list(prompts), list(continuations), budget
        self.single = all(len(continuation) <= 1 for continuation in continuations)
        self.key = budget.seed, content_hash(min(prompts, key=lambda ids: ids.tolist())) if key is None else key
        self.weights = np.array([np.ones(len(continuations)), 1 / np.maximum(characters, 1)])
        self.path = np.zeros((len(continuations), 0))
        self.end = np.zeros((len(continuations), 0))
        self._rounds = budget.rounds(self.single, len(continuations) == 1)

    @property
    def samples(self) -> int:
        """Draws of every continuation so far; if all are single tokens, of their cross-entropy."""
        return self.end.shape[1] if self.single else self.path.shape[1]

    def round(self) -> list[Row] | None:
        """The rows of the next round; None if there is none."""
        total = next(self._rounds, None)
        if total is None:
            return None
        if self.single:
            return self._rows("first", self.end.shape[1], total)
        ends = max(1, total // PATH_PER_END)
        return self._rows("path", self.path.shape[1], total) + self._rows("end", self.end.shape[1], ends)

    def _rows(self, kind: Kind, start: int, stop: int) -> list[Row]:
        return [
            Row(kind, prompt, continuation, self.key, index)
            for prompt, continuation in zip(self.prompts, self.continuations, strict=True)
            for index in range(start, stop)
            if len(continuation)
        ]

    def add(self, rows: Sequence[Row], values: Float[np.ndarray, "_"]) -> None:
        """Takes the values of a round's rows."""
        real = np.array([len(continuation) > 0 for continuation in self.continuations])
        path = np.array([row.kind == "path" for row in rows], dtype=bool)
        for name, found in (("path", values[path]), ("end", values[~path])):
            old = self.path if name == "path" else self.end
            new = np.zeros((len(real), found.size // max(1, real.sum())))
            new[real] = found.reshape(int(real.sum()), -1) if found.size else 0.0
            joined = np.concatenate([old, new], 1)
            self.path, self.end = (joined, self.end) if name == "path" else (self.path, joined)

    @property
    def nats(self) -> Float[np.ndarray, "c"]:
        """Upper bound on -log p of each continuation."""
        return _mean(self.path) + _mean(self.end)

    @property
    def stderr(self) -> Float[np.ndarray, "c"]:
        """Standard error of `nats`."""
        return np.sqrt(self._variance(self.path, self.end))

    def _variance(self, path: Float[np.ndarray, "c n"], end: Float[np.ndarray, "c m"]) -> Float[np.ndarray, "c"]:
        """Of the sum of both means.

        Draws of the path are stratified: neighbours in time differ by their noise and hardly by their time, so that
        half the mean square of their differences is the variance that counts (Wolter 1985, successive differences).
        """
        order = np.argsort([path_place(self.key, index) for index in range(path.shape[1])])
        steps = np.diff(path[:, order]) if len(order) > 1 else path
        of_path = np.square(steps).sum(-1) / (2 * max(1, steps.shape[1]) * max(1, len(order)))
        # One draw gives no estimate; its square is one of the second moment, which is not smaller.
        of_end = end.var(-1, ddof=1) / end.shape[1] if end.shape[1] > 1 else np.square(end).sum(-1)
        return of_path + of_end

    def lead(self) -> float:
        """By how many standard errors of the paired difference the best continuation leads the closest other one.

        The smaller of two leads, by the sum and by the mean per character.
        """
        leads = []
        for weight in self.weights[:, :, None]:
            best = int((weight[:, 0] * self.nats).argmin())
            path, end = (weight * draws - (weight * draws)[best] for draws in (self.path, self.end))
            ahead, error = _mean(path) + _mean(end), np.sqrt(self._variance(path, end))
            certain = np.where(ahead > 0, np.inf, 0.0)  # without noise
            leads.append(np.delete(np.where(error > 0, ahead / np.where(error > 0, error, 1.0), certain), best))
        return float(np.concatenate(leads).min(initial=np.inf))

    @property
    def decided(self) -> bool:
        return len(self.continuations) > 1 and self.lead() >= self.budget.z

    @property
    def finished(self) -> bool:
        """Nothing left to draw for: decided, or known without noise."""
        return self.decided or not self.stderr.any()


def _mean(draws: Float[np.ndarray, "c n"]) -> Float[np.ndarray, "c"]:
    return draws.mean(-1) if draws.shape[-1] else draws.sum(-1)


def answer(questions: Sequence[Question], draw: Draw, report: Callable[[int, int], None] | None = None) -> None:
    """Draws for all questions, round by round, until each is finished or its budget is spent.

    Args:
        questions: In any order; they hold the results.
        draw: Computes rows.
        report: Sees (questions finished, all) after every round.

    Raises:
        UserError: A bound is not finite: the run is damaged.
    """

    def place(question: Question) -> tuple[int, int]:
        return max(
            len(p) + len(c) for p, c in zip(question.prompts, question.continuations, strict=True)
        ), question.key[1]

    ordered, finished = sorted(questions, key=place), 0
    for first in range(0, len(ordered), WAVE):
        at_work = ordered[first : first + WAVE]
        while at_work:
            rounds = [(question, rows) for question in at_work if (rows := question.round()) is not None]
            values = draw([row for _, rows in rounds for row in rows])
            if not np.isfinite(values).all():
                raise UserError(
                    "the run gives bounds that are not finite: its weights are damaged, resume or train it anew"
                )
            start = 0
            for question, rows in rounds:
                question.add(rows, values[start : start + len(rows)])
                start += len(rows)
            finished += len(at_work)
            at_work = [question for question, _ in rounds if not question.finished]
            finished -= len(at_work)
            if report is not None:
                report(finished, len(ordered))


def likeliest(questions: Sequence[Question], draw: Draw) -> list[bool]:
    """Whether greedy decoding would write each question's only continuation.

    Greedy decoding of a flow: from left to right, every token is the likeliest at t = 0, with what is left of it clean
    and what is right of it noise. An empty continuation is always written.
    """
    right, place = [True] * len(questions), 0
    while True:
        at_work = [i for i, one in enumerate(questions) if right[i] and place < len(one.continuations[0])]
        if not at_work:
            return right
        rows = []
        for one in (questions[i] for i in at_work):
            done, rest = one.continuations[0][:place], one.continuations[0][place:]
            rows.append(Row("greedy", np.concatenate([one.prompts[0], done]), rest, one.key, place))
        for i, value in zip(at_work, draw(rows), strict=True):
            right[i] = bool(value)
        place += 1
