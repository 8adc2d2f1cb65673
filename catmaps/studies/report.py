"""The report of a study: ranking tables for the terminal, report.md and PNG plots beside study.json."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from catmaps.errors import UserError
from catmaps.studies.fits import Fit, fits, table
from catmaps.studies.measures import Curve
from catmaps.studies.plots import plot_bars, plot_curves, plot_field, plot_laws
from catmaps.studies.ranking import LEVEL, Row, as_record, rank
from catmaps.studies.results import RESULTS, Line, curves, figures, read_results
from catmaps.studies.study import PER_PARAMETER, Study
from catmaps.studies.sweeps import best_values, numeric_field

REPORT = "report.md"
HEADINGS = ("", "arm", "mean", "spread", "seeds", "to baseline", "p", "verdict")
LAW = (
    "Fitted: figure = scale C^-exponent over all trainings of arms that differ in their network alone, "
    "C = 6 x parameters x tokens. Intervals are of 95%, from the scatter about the line."
)
BETWEEN = (
    "Between: of the parabola through the best and its two neighbours, in the field's logarithm if that is its axis; "
    "of a line's values those with most seeds."
)
Lines = dict[tuple[str, int], Line]


@dataclass(frozen=True)
class Report:
    """What was written, and what is shown."""

    file: Path
    plots: list[str]
    ranking: dict[str, list[dict[str, Any]]]
    """By figure."""
    tables: list[Table]


def write_report(study: Study) -> Report:
    """Ranks the arms by every figure and writes report.md and plots into the study's folder.

    Raises:
        UserError: There are no results yet, or matplotlib or scipy is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the report's plots need matplotlib: pip install 'catmaps[report]'") from error
    arms = {arm.name for arm in study.arms}
    lines = {key: line for key, line in read_results(study).items() if key[0] in arms and key[1] in study.seeds}
    names = dict.fromkeys(name for line in lines.values() for name in figures(line))
    if not names:
        raise UserError(f"{study.folder / RESULTS} has no figures yet; `catmaps study run {study.folder}` makes them")
    rankings = {name: rank(study, lines, name) for name in names}
    for old in study.folder.glob("plot-*.png"):
        old.unlink()
    plots = _plots(study, lines, rankings)
    file = study.folder / REPORT
    file.write_text(_page(study, lines, rankings, plots), encoding="utf-8")
    first = next(iter(names))
    return Report(
        file=file,
        plots=[str(study.folder / plot) for plot in plots.values()],
        ranking={name: as_record(rows) for name, rows in rankings.items()},
        tables=[_table(first, rankings[first])],
    )


def _cells(place: int, row: Row) -> tuple[str, ...]:
    """A row as HEADINGS has it."""
    apart = row.difference
    compared, p = "", ""
    if apart is not None:
        compared = f"{apart.mean:+.4f}" + ("" if math.isnan(apart.stderr) else f" ± {apart.stderr:.4f}")
        p = "" if math.isnan(apart.p) else f"{apart.p:.3f}" if apart.p >= 0.001 else "< 0.001"
    spread = "" if math.isnan(row.spread) else f"{row.spread:.4f}"
    number = str(place) if row.better != "neither" else ""
    return (number, row.arm.name, f"{row.mean:.4f}", spread, str(len(row.values)), compared, p, row.verdict)


def _table(name: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"Ranked by {name} ({_way(rows)})", title_justify="left")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i in (1, 7) else "right", no_wrap=1 < i < 7)
    for i, row in enumerate(rows, 1):
        table.add_row(*map(escape, _cells(i, row)), style="bold" if row.arm == row.baseline else None)
    return table


def _plots(study: Study, lines: Lines, rankings: dict[str, list[Row]]) -> dict[str, str]:
    """Title -> file: the first figure's bars, every measure's first over the study's numeric field, all curves."""
    made: dict[str, str] = {}

    def file(title: str) -> Path:
        made[title] = f"plot-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.png"
        return study.folder / made[title]

    first = next(iter(rankings))
    plot_bars(rankings[first], first, file(f"{first}, ranked"))
    numeric = numeric_field(study.arms)
    for name in _leading(lines):
        if numeric is not None and len(rankings[name]) > 1:
            plot_field(rankings[name], numeric, name, file(f"{name} over {numeric}"))
    if laws := _laws(study, lines, rankings):
        points = {fit.name: fit.law.points for fit in laws}
        plot_laws(points, first, file(f"{first} over compute"))
    for name in dict.fromkeys(name for line in lines.values() for name in curves(line)):
        shown: dict[str, list[Curve]] = {}
        for arm in study.arms:
            own = (lines[arm.name, seed] for seed in study.seeds if (arm.name, seed) in lines)
            found = [curve for line in own if (curve := curves(line).get(name)) is not None and curve.points]
            if found:
                shown[arm.name] = found
        if shown:
            plot_curves(shown, name, file(name))
    return made


def _laws(study: Study, lines: Lines, rankings: dict[str, list[Row]]) -> list[Fit]:
    """Power laws of the first figure, where the budget grows with the network."""
    return fits(next(iter(rankings.values())), lines) if PER_PARAMETER in study.budget else []


def _leading(lines: Lines) -> list[str]:
    """The first figure of every measure."""
    measures = (measured["figures"] for line in lines.values() for measured in line["measures"].values())
    return list(dict.fromkeys(next(iter(found)) for found in measures if found))


def _page(study: Study, lines: Lines, rankings: dict[str, list[Row]], plots: dict[str, str]) -> str:
    parts = [f"# {study.name}", study.question, _how(study, lines)]
    first = next(iter(rankings))
    parts.append(f"## Ranked by {first} ({_way(rankings[first])})")
    parts.append(_markdown(HEADINGS, [_cells(place, row) for place, row in enumerate(rankings[first], 1)]))
    parts.append(_meaning(study))
    field = numeric_field(study.arms)
    if PER_PARAMETER not in study.budget and field is not None and (best := best_values(rankings[first], field)):
        parts += [f"## Best {field}", _markdown(("arms", "best tried", "best between", "seeds"), best), BETWEEN]
    others = {name: rows for name, rows in rankings.items() if name != first}
    for measure in dict.fromkeys(name for line in lines.values() for name in line["measures"]):
        names = dict.fromkeys(name for line in lines.values() for name in _figures_of(line, measure) if name in others)
        if names:
            parts += [f"## {measure}", _others(study, {name: others[name] for name in names})]
    if laws := _laws(study, lines, rankings):
        parts += ["## Over compute", _markdown(*table(laws)), LAW]
    if dropped := _dropped(study, lines):
        parts += ["## Dropped on the way", dropped]
    if failed := [(arm, str(seed), line["failed"]) for (arm, seed), line in lines.items() if "failed" in line]:
        parts += ["## Failed", _markdown(("arm", "seed", "why"), failed)]
    parts += ["## Plots", *(f"![{title}]({file})" for title, file in plots.items())]
    parts += ["## Arms", _arms(study, lines)]
    return "\n\n".join(parts) + "\n"


def _way(rows: Sequence[Row]) -> str:
    return "no way is better" if rows[0].better == "neither" else f"{rows[0].better} is better"


def _figures_of(line: Line, measure: str) -> list[str]:
    return list(line["measures"].get(measure, {"figures": {}})["figures"])


def _others(study: Study, rankings: dict[str, list[Row]]) -> str:
    """Arms by figures: mean ± standard error, and the verdict where an arm is told apart from its baseline."""

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        error = "" if math.isnan(row.error) else f" ± {row.error:.3f}"
        apart = row.difference is not None and row.difference.p < LEVEL
        return f"{row.mean:.3f}{error}" + (f", {row.verdict}" if apart else "")

    found = {f"{name} ({_way(rows)})": {row.arm.name: row for row in rows} for name, rows in rankings.items()}
    arms = [arm.name for arm in study.arms if any(arm.name in rows for rows in found.values())]
    if len(found) > len(arms):  # the longer side goes down the page
        return _markdown(("", *arms), [[name, *(cell(rows.get(arm)) for arm in arms)] for name, rows in found.items()])
    return _markdown(("arm", *found), [[arm, *(cell(rows.get(arm)) for rows in found.values())] for arm in arms])


def _how(study: Study, lines: Lines) -> str:
    """Budget, what was trained where."""
    kind, amount = next(iter(study.budget.items()))
    budget = {
        "tokens": f"{amount:,.0f} tokens",
        PER_PARAMETER: f"{amount:g} tokens per parameter (the vocabulary's aside)",
        "cpu_minutes": f"{amount:g} CPU minutes, turned into steps by a pilot,",
    }[kind]
    start = f"distilling {study.base} by preset {study.preset}" if study.base else f"preset {study.preset}"
    common = ", ".join(f"{name} {value}" for name, value in study.common.items())
    machines = sorted({f"{m['processor']}, torch {m['torch']}, commit {m['commit']}" for m in _machines(lines)})
    dates = sorted({line["date"] for line in lines.values()})
    done = sum(bool(line.get("complete")) for line in lines.values())
    return "\n".join(
        [
            f"- {start}; {budget} per arm and seed; {done} of {len(study.arms) * len(study.seeds)} trained to the end",
            *([f"- all arms: {common}"] if common else []),
            f"- {dates[0]} to {dates[-1]}; {'; '.join(machines)}",
        ]
    )


def _machines(lines: Lines) -> list[dict[str, Any]]:
    return [line["machine"] for line in lines.values()]


def _meaning(study: Study) -> str:
    seeds = (
        "Spread: standard deviation over seeds. To baseline: mean of the seeds' differences ± its standard error; p: "
        "paired t-test, after Holm over all comparisons."
        if len(study.seeds) > 1
        else "One seed: errors are those of measuring alone; other seeds may differ by more."
    )
    return f"{seeds} Told apart: p below {LEVEL:g}."


def _dropped(study: Study, lines: Lines) -> str:
    rows = [(arm, str(seed), line) for (arm, seed), line in lines.items() if "dropped" in line]
    cells = []
    for arm, seed, line in rows:
        rung = line["rungs"].get(f"{line['dropped']:g}", {"figures": {}, "steps": 0})
        figure = next((f"{name} {found['value']:.4f}" for name, found in rung["figures"].items()), "")
        cells.append((arm, seed, f"{line['dropped']:g}", str(rung["steps"]), figure))
    return _markdown(("arm", "seed", "share of the budget", "steps", "figure"), cells) if cells else ""


def _arms(study: Study, lines: Lines) -> str:
    rows = []
    for arm in study.arms:
        own = [lines[arm.name, seed] for seed in study.seeds if (arm.name, seed) in lines]
        done = [line for line in own if line.get("complete")]
        overrides = ", ".join(f"{name} {value}" for name, value in arm.overrides.items()) or "as the preset"
        if not done:
            rows.append((arm.name, overrides, "", "", "", ""))
            continue
        steps, tokens = done[0]["steps"], done[0]["tokens"] / 1e6
        minutes = sum(line["cpu_seconds"] for line in done) / len(done) / 60
        size = f"{done[0]['parameters'] / 1e6:.2f}M"
        rows.append((arm.name, overrides, size, f"{steps:,}", f"{tokens:.1f}M", f"{minutes:.1f}"))
    return _markdown(("arm", "fields", "parameters", "steps", "tokens", "CPU minutes"), rows)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
