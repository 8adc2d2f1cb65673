"""Ranks arms by a figure: means and spreads over seeds, differences to the baseline, and whether they are told apart.

Over two seeds or more a difference is the mean of the seeds' differences, with their standard error, and its p-value
that of the paired t-test. With one seed all that is known is the error of measuring: that of the difference is taken
from both arms' (as if they were independent, which for the same windows is too much), and nothing is known of other
seeds. p-values are Holm's, over all arms that are compared with one baseline.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from catmaps.errors import UserError
from catmaps.studies.measures import Figure
from catmaps.studies.results import Line, figures
from catmaps.studies.study import Arm, Study

LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of an arm to its baseline, over the seeds that both have."""

    mean: float
    stderr: float
    p: float
    """Two-sided; NaN where nothing is known."""
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm in the ranking of a figure."""

    arm: Arm
    baseline: Arm
    values: dict[int, Figure]
    """By seed."""
    difference: Difference | None
    """None for baselines, and where no seed is in common."""
    better: str

    @property
    def mean(self) -> float:
        return sum(figure.value for figure in self.values.values()) / len(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN for one."""
        return _deviation([figure.value for figure in self.values.values()])

    @property
    def error(self) -> float:
        """Standard error of the mean: over seeds, or for one seed of measuring."""
        if len(self.values) > 1:
            return self.spread / math.sqrt(len(self.values))
        return next(iter(self.values.values())).stderr

    @property
    def verdict(self) -> str:
        """In words."""
        if self.arm == self.baseline:
            return "baseline"
        if self.difference is None:
            return "nothing to compare with"
        if not self.difference.p < LEVEL:
            return "not told apart"
        lower = self.difference.mean < 0
        if self.better == "neither":
            word = "lower" if lower else "higher"
        else:
            word = "better" if lower == (self.better == "lower") else "worse"
        return word if self.difference.seeds > 1 else f"{word} on this seed"


def rank(study: Study, lines: dict[tuple[str, int], Line], name: str) -> list[Row]:
    """The arms that have a figure, best first (as in study.json if no way is better)."""
    known = {
        arm.name: {
            seed: found
            for seed in study.seeds
            if (line := lines.get((arm.name, seed))) is not None and (found := figures(line).get(name)) is not None
        }
        for arm in study.arms
    }
    rows = []
    for arm in study.arms:
        if not (values := known[arm.name]):
            continue
        baseline = study.baseline_of(arm)
        compared = None if baseline == arm else difference(values, known[baseline.name])
        better = next(iter(values.values())).better
        rows.append(Row(arm=arm, baseline=baseline, values=values, difference=compared, better=better))
    rows = _holm(rows)
    if rows and rows[0].better != "neither":
        rows.sort(key=lambda row: row.mean if row.better == "lower" else -row.mean)
    return rows


def difference(values: dict[int, Figure], baseline: dict[int, Figure]) -> Difference | None:
    """Of the means over common seeds, paired by seed; None if there are none."""
    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        return None
    apart = [values[seed].value - baseline[seed].value for seed in seeds]
    mean = sum(apart) / len(apart)
    if len(apart) > 1:
        stderr = _deviation(apart) / math.sqrt(len(apart))
        return Difference(mean=mean, stderr=stderr, p=t_test(mean, stderr, len(apart) - 1), seeds=len(apart))
    stderr = math.hypot(values[seeds[0]].stderr, baseline[seeds[0]].stderr)
    # A normal's: windows are many.
    p = math.nan if math.isnan(stderr) else math.erfc(abs(mean) / stderr / math.sqrt(2)) if stderr else float(mean == 0)
    return Difference(mean=mean, stderr=stderr, p=p, seeds=1)


def t_test(mean: float, stderr: float, freedom: int) -> float:
    """Two-sided p-value of mean / stderr under Student's t."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise UserError("the report needs scipy: pip install 'catmaps[report]'") from error
    if stderr == 0:
        return float(mean == 0)
    return float(2 * t.sf(abs(mean) / stderr, freedom))


def _holm(rows: Sequence[Row]) -> list[Row]:
    """p-values adjusted for the number of comparisons with the same baseline (Holm 1979)."""
    adjusted: dict[str, Difference] = {}
    for baseline in {row.baseline.name for row in rows}:
        group = [(row.arm.name, row.difference) for row in rows if row.baseline.name == baseline]
        known = sorted(((n, d) for n, d in group if d is not None and not math.isnan(d.p)), key=lambda nd: nd[1].p)
        largest = 0.0
        for i, (name, found) in enumerate(known):
            largest = max(largest, min(1.0, (len(known) - i) * found.p))
            adjusted[name] = replace(found, p=largest)
    return [replace(row, difference=adjusted.get(row.arm.name, row.difference)) for row in rows]


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for one value."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def as_record(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The ranking as JSON."""
    return [
        {
            "arm": row.arm.name,
            "baseline": row.baseline.name,
            "mean": row.mean,
            "spread": row.spread,
            "seeds": len(row.values),
            "difference": None if row.difference is None else row.difference.mean,
            "stderr": None if row.difference is None else row.difference.stderr,
            "p": None if row.difference is None else row.difference.p,
            "verdict": row.verdict,
        }
        for row in rows
    ]
