"""`catmaps report`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Report:
    """Measure a run and write one self-contained page: curves, bound, samples, their quality, a trajectory."""

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    out: Path | None = None
    """File to write; default: report.html in the run's folder, or here for a model of the package."""
    num: int = 512
    """Samples per number of calls."""
    texts: int = 32
    """Long texts per number of calls, for entropy and distinct-2."""
    windows: int = 512
    """Windows of test text for the bound."""
    calls: tuple[int, ...] = (1, 2, 4, 8, 64)
    """Numbers of network calls."""
    base: Path | None = None
    """A map's base, for comparison; default: the one it was distilled from, if it is still there."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from dataclasses import asdict

        from rich.console import Console

        from catmaps.commands.progress import progress
        from catmaps.errors import UserError
        from catmaps.evaluation.collect import collect, report_rows, row_name
        from catmaps.evaluation.report import write_report
        from catmaps.model import load_run
        from catmaps.models import is_packaged, located
        from catmaps.training.train import cache_folder, find_shards

        if not self.calls or min(self.calls) < 1 or self.num < 1 or self.texts < 1 or self.windows < 2:
            raise UserError("--calls, --num and --texts must be at least 1, --windows at least 2")
        run = load_run(self.run_)
        origin = self.base or (Path(run.config.base) if run.config.base else None)
        there = origin is not None and (self.base is not None or located(origin).exists())
        base = load_run(origin) if origin is not None and there else None
        shards = find_shards(run.config)
        counts = {"num": self.num, "num_texts": self.texts, "windows": self.windows, "calls": self.calls}
        with progress(len(report_rows(run, base, self.calls))) as drawn_row:
            data, bound = collect(run, base, shards, cache_folder(), drawn_row=drawn_row, **counts)
        out = self.out or (Path() if is_packaged(run.path) else run.path) / "report.html"
        write_report(out, data)
        rows = {row_name(row.series, row.calls): row.quality for row in data.rows}
        # The console is made here: stdout may be redirected while the command runs.
        Console().print(_summary({**rows, **data.controls}))
        per_char = bound.nats / math.log(2) / bound.characters
        print(f"test NELBO {per_char:.4f} bits/char (upper bound); report: {out}")
        return {
            "run": str(self.run_),
            "report": str(out),
            "bound": bound.as_dict(),
            "quality": {name: asdict(row) for name, row in {**rows, **data.controls}.items()},
        }


def _summary(rows: dict[str, Any]) -> Any:
    """The main figures, narrow enough for any terminal; the page has them all."""
    from rich.table import Table

    table = Table(title="Samples beside texts of known worth", title_justify="left")
    table.add_column("text")
    for heading in ("forward\nbits", "reverse\nbits", "token\nentropy", "distinct-2", "valid\nwords"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        figures = (row.forward_bits, row.reverse_bits, row.token_entropy, row.distinct_2)
        table.add_row(name, *(f"{value:.3f}" for value in figures), f"{row.valid_word_rate:.1%}")
    return table


def read(name: str, args: list[str]) -> Report:
    return parse(Report, args, f"catmaps {name}")
