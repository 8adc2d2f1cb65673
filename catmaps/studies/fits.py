"""Power laws over compute, figure = scale C^-exponent with C = 6 x parameters x tokens, by least squares of logarithms.

Points are finished trainings, each at its own budget, all seeds. Intervals are those of Student's t from the scatter
about the line, so they hold for the sizes that were trained and say nothing about bends beyond them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from catmaps.studies.ranking import Row
from catmaps.studies.results import Line
from catmaps.studies.sweeps import spoken

FLOPS_PER_PARAMETER = 6  # forward and backward, a token; attention's own products and the vocabulary's are left out
LEAST_SIZES = 3


@dataclass(frozen=True)
class PowerLaw:
    """A line in log-log space, through the points' centre."""

    x: Float[np.ndarray, "n"]
    """Compute, FLOPs."""
    y: Float[np.ndarray, "n"]
    """The figure, positive."""
    exponent: float
    stderr: float
    scatter: float
    """Standard deviation of log y about the line."""

    @property
    def freedom(self) -> int:
        return len(self.x) - 2

    @property
    def points(self) -> tuple[list[float], list[float], list[float]]:
        """x, y and the fitted y."""
        return self.x.tolist(), self.y.tolist(), [self.at(x)[0] for x in self.x.tolist()]

    def at(self, x: float) -> tuple[float, float]:
        """The fitted figure there, and the standard error of its logarithm."""
        centre, away = np.log(self.x).mean(), np.log(self.x) - np.log(self.x).mean()
        apart = math.log(x) - centre
        error = self.scatter * math.sqrt(1 / len(self.x) + apart**2 / (away**2).sum())
        return math.exp(np.log(self.y).mean() - self.exponent * apart), error


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The fit; None with fewer than three different x or with figures that have no logarithm."""
    xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
    if len(set(x)) < LEAST_SIZES or min(*x, *y) <= 0:
        return None
    away, height = np.log(xs) - np.log(xs).mean(), np.log(ys) - np.log(ys).mean()
    slope = (away * height).sum() / (away**2).sum()
    scatter = math.sqrt(((height - slope * away) ** 2).sum() / (len(x) - 2))
    return PowerLaw(xs, ys, -slope, scatter / math.sqrt((away**2).sum()), scatter)


@dataclass(frozen=True)
class Fit:
    """The law of the arms that differ in their network alone."""

    name: str
    law: PowerLaw
    is_baseline: bool


def fits(rows: Sequence[Row], lines: dict[tuple[str, int], Line]) -> list[Fit]:
    """A law for every choice of the fields that are not the network's, where three sizes have been trained."""
    groups: dict[str, list[tuple[float, float]]] = {}
    baselines: set[str] = set()
    for row in rows:
        name = spoken({field: value for field, value in row.arm.overrides.items() if not field.startswith("network.")})
        for seed, figure in row.values.items():
            line = lines[row.arm.name, seed]
            compute = float(FLOPS_PER_PARAMETER) * line["parameters"] * line["tokens"]
            groups.setdefault(name, []).append((compute, figure.value))
        if row.arm == row.baseline:
            baselines.add(name)
    found = ((name, power_law(*zip(*points, strict=True))) for name, points in groups.items())
    return [Fit(name, law, name in baselines) for name, law in found if law is not None]


def common_compute(laws: Sequence[Fit]) -> float:
    """The middle of the range of compute that all laws have points in, geometrically."""
    low, high = max(fit.law.x.min() for fit in laws), min(fit.law.x.max() for fit in laws)
    return math.sqrt(low * high)


def table(laws: Sequence[Fit]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows: exponent, the figure at a compute common to all, and its ratio to the baseline's; 95%."""
    from scipy.stats import t

    compute = common_compute(laws)
    base = next((fit.law for fit in laws if fit.is_baseline), None)
    rows = []
    for fit in laws:
        law, (value, error) = fit.law, fit.law.at(compute)
        wide = float(t.ppf(0.975, law.freedom))
        ratio = ""
        if base is not None and not fit.is_baseline:
            other, its_error = base.at(compute)
            both = float(t.ppf(0.975, min(law.freedom, base.freedom))) * math.hypot(error, its_error)
            ratio = f"{value / other:.3f} ({_between(value / other, both)})"
        exponent = f"{law.exponent:.4f} ± {wide * law.stderr:.4f}"
        rows.append(
            (fit.name or "all", str(len(law.x)), exponent, f"{value:.3f} ({_between(value, wide * error)})", ratio)
        )
    return ("arms", "points", "exponent", f"at {compute:.1e} FLOPs", "of the baseline's"), rows


def _between(value: float, log_error: float) -> str:
    return f"{value * math.exp(-log_error):.3f} to {value * math.exp(log_error):.3f}"
