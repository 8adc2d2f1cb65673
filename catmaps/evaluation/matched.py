"""Quality of a frontier's curves at the token entropy of held-out text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from catmaps.evaluation.frontier_rows import FrontierRow, steps_of
from catmaps.text.metrics import Mean


class Crossing(NamedTuple):
    """Where a curve has an entropy: between two neighbouring temperatures, `share` of the way from low to high."""

    low: FrontierRow
    high: FrontierRow
    share: float

    @property
    def temperature(self) -> float:
        assert self.low.temperature is not None
        assert self.high.temperature is not None
        return (1 - self.share) * self.low.temperature + self.share * self.high.temperature


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Quality of one curve at an entropy; `temperature` and figures are None where the curve does not reach it.

    Attributes:
        series, steps, calls: The curve.
        entropy: Nats, of held-out text.
        reached: Lowest and highest entropy of the curve.
        temperature: Interpolated.
        forward, judge: Bits per character with standard errors from the texts of the two rows and from the entropies;
            judge is None without one.
    """

    series: str
    steps: int
    calls: int
    entropy: float
    reached: tuple[float, float]
    temperature: float | None = None
    forward: Mean | None = None
    judge: Mean | None = None

    def __str__(self) -> str:
        name = f"{self.series}, {steps_of(self.steps)}"
        if self.temperature is None:
            low, high = self.reached
            missed = f"{name}: does not reach entropy {self.entropy:.3f}"
            if low == high:
                return f"{missed} (it is a point, at {low:.3f})"
            side, other = ("above", "lower") if low > self.entropy else ("below", "higher")
            return f"{missed} (it stays {side}: {low:.3f} to {high:.3f}); try {other} temperatures"
        words = [f"{label} {m.mean:.3f} ± {m.stderr:.3f}" for label, m in self.figures]
        return f"{name}: {', '.join(words)} bits/char at entropy {self.entropy:.3f}, temperature {self.temperature:.2f}"

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Flat, for JSON."""
        values: dict[str, float | int | str | None] = {
            "series": self.series,
            "steps": self.steps,
            "calls": self.calls,
            "entropy": self.entropy,
            "lowest_entropy": self.reached[0],
            "highest_entropy": self.reached[1],
            "temperature": self.temperature,
        }
        for name, bits in (("forward_bits", self.forward), ("judge_bits", self.judge)):
            values |= {name: bits and bits.mean, f"{name}_stderr": bits and bits.stderr}
        return values

    @property
    def figures(self) -> list[tuple[str, Mean]]:
        return [(label, m) for label, m in (("forward", self.forward), ("judge", self.judge)) if m is not None]


def curves(rows: Sequence[FrontierRow]) -> dict[tuple[str, int], list[FrontierRow]]:
    """Rows of runs by (series, steps), each in order of temperature."""
    grouped: dict[tuple[str, int], list[FrontierRow]] = {}
    for row in rows:
        if row.temperature is not None:
            grouped.setdefault((row.series, row.steps), []).append(row)
    return {name: sorted(own, key=lambda row: row.temperature or 0.0) for name, own in grouped.items()}


def crossing(curve: Sequence[FrontierRow], entropy: float) -> Crossing | None:
    """Where a curve, in order of temperature, has this entropy; of several places that nearest to temperature 1."""
    found = []
    for low, high in pairwise(curve):
        a, b = low.token_entropy, high.token_entropy
        if min(a, b) <= entropy <= max(a, b):
            found.append(Crossing(low, high, (entropy - a) / (b - a) if a != b else 0.0))
    return min(found, key=lambda c: abs(c.temperature - 1), default=None)


def matched(rows: Sequence[FrontierRow], entropy: Mean) -> list[Matched]:
    """All curves of a frontier at one entropy, that of held-out text."""
    results = []
    for (series, steps), curve in curves(rows).items():
        values = [row.token_entropy for row in curve]
        place = crossing(curve, entropy.mean)
        results.append(
            Matched(
                series=series,
                steps=steps,
                calls=curve[0].calls,
                entropy=entropy.mean,
                reached=(min(values), max(values)),
                temperature=place and place.temperature,
                forward=place and interpolate(place, entropy, judged=False),
                judge=place and interpolate(place, entropy, judged=True),
            )
        )
    return results


def interpolate(place: Crossing, entropy: Mean, *, judged: bool) -> Mean | None:
    """Bits at a crossing, linear in entropy.

    Errors of entropies count times the slope. Those of the two rows, which share a seed, are added as if they went
    together; those of bits, of entropies and of the target entropy are taken as independent.
    """
    low, high, share = place
    a, b = low.bits(judged), high.bits(judged)
    if a is None or b is None:
        return None
    rise = high.token_entropy - low.token_entropy
    slope = (b.mean - a.mean) / rise if rise else 0.0
    of_bits = (1 - share) * a.stderr + share * b.stderr
    of_entropy = (1 - share) * low.token_entropy_stderr + share * high.token_entropy_stderr
    stderr = math.hypot(of_bits, slope * of_entropy, slope * entropy.stderr)
    return Mean((1 - share) * a.mean + share * b.mean, stderr)
