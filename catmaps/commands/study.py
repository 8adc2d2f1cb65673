"""`catmaps study run` and `catmaps study report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from catmaps.cli import parse
from catmaps.errors import UserError


@dataclass(frozen=True)
class RunStudy:
    """Train and measure what is missing of a study. Repeated, it goes on where it was stopped."""

    study: tyro.conf.Positional[Path]
    """Folder of a study.json."""
    workers: int = 2
    """Processes, of one thread each."""
    arms: tuple[str, ...] = ()
    """Only these; default: all."""
    seeds: tuple[int, ...] = ()
    """Only these; default: all."""
    out: Path | None = None
    """Folder of the runs; default: runs/studies/NAME."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.studies.results import RESULTS
        from catmaps.studies.running import Interrupted, run_study
        from catmaps.studies.study import read_study

        if self.workers < 1:
            raise UserError(f"--workers must be at least 1, not {self.workers}")
        study = read_study(self.study)
        out = self.out or Path("runs/studies") / study.name
        try:
            done = run_study(study, out, workers=self.workers, arms=self.arms, seeds=self.seeds)
        except Interrupted as stop:
            print(f"stopped, saved. Continue: catmaps study run {self.study}")
            return {"study": study.name, "complete": False, "exit_status": stop.args[0]}
        results = study.folder / RESULTS
        counts = f"{len(done.trained)} trained, {done.done_before} done before, {len(done.failed)} failed"
        print(f"{counts}: {results}. Next: catmaps study report {self.study}")
        return {
            "study": study.name,
            "results": str(results),
            "trained": done.trained,
            "done_before": done.done_before,
            "failed": done.failed,
            "complete": not done.failed,
            "exit_status": 1 if done.failed else 0,
        }


@dataclass(frozen=True)
class ReportStudy:
    """Rank the arms of a study against its baseline; write report.md and its plots beside study.json."""

    study: tyro.conf.Positional[Path]
    """Folder of a study.json with results.jsonl."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from rich.console import Console

        from catmaps.studies.report import write_report
        from catmaps.studies.study import read_study

        study = read_study(self.study)
        report = write_report(study)
        # The console is made here: stdout may be redirected while the command runs.
        Console(width=120).print(*report.tables)
        print(f"report: {report.file}")
        return {"study": study.name, "report": str(report.file), "plots": report.plots, "ranking": report.ranking}


KINDS = {"run": RunStudy, "report": ReportStudy}


def read(name: str, args: list[str]) -> RunStudy | ReportStudy:
    if args and args[0] in ("-h", "--help"):
        args = ["run", "--help"]
    if not args or args[0] not in KINDS:
        raise UserError("which study command? catmaps study run FOLDER, or catmaps study report FOLDER")
    return parse(KINDS[args[0]], args[1:], f"catmaps {name} {args[0]}")
