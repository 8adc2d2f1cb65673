"""results.jsonl: a line per arm and seed, written whole or not at all; where its figures come from."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from catmaps.errors import UserError
from catmaps.studies.measures import Curve, Figure
from catmaps.studies.study import Job, Study

RESULTS, RESULT = "results.jsonl", "result.json"
Line = dict[str, Any]


def machine() -> dict[str, Any]:
    """Processor, cores, versions and commit of the code that runs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"processor": model, "cores": os.cpu_count(), "commit": commit, **versions}


def asked(study: Study, job: Job) -> Line:
    """What study.json says of a training: what a line must agree with to count as its result."""
    overrides = study.common | job.arm.overrides
    return {"preset": study.preset, "from": study.base, "budget": study.budget, "overrides": overrides}


def begin_line(study: Study, job: Job, steps: int) -> Line:
    """The line of a training that has not begun."""
    head = {"study": study.name, "arm": job.arm.name, "seed": job.seed, **asked(study, job), "steps": steps}
    return {**head, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "measures": {}, "rungs": {}}


def figures(line: Line) -> dict[str, Figure]:
    """All figures of a line by name, the first measure's first."""
    return {
        name: Figure(figure["value"], float("nan") if figure["stderr"] is None else figure["stderr"], figure["better"])
        for measured in line["measures"].values()
        for name, figure in measured["figures"].items()
    }


def curves(line: Line) -> dict[str, Curve]:
    """All curves of a line by name."""
    return {
        name: Curve(curve["x"], curve["y"], [(x, y) for x, y in curve["points"]])
        for measured in line["measures"].values()
        for name, curve in measured["curves"].items()
    }


def lacking(study: Study, line: Line) -> list[tuple[str, dict[str, Any]]]:
    """Measures that study.json asks for and a line has not, or has with other options."""
    have = {name: measured["options"] for name, measured in line["measures"].items()}
    return [(name, options) for name, options in study.measures if have.get(name) != json.loads(json.dumps(options))]


def write_json(value: Any, file: Path) -> None:
    """Atomic: the file is either the old or the new one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    draft.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(draft, file)


def read_results(study: Study) -> dict[tuple[str, int], Line]:
    """Lines by (arm, seed), those of arms that are no longer in study.json too.

    Raises:
        UserError: A line that cannot be read; names it.
    """
    file = study.folder / RESULTS
    if not file.exists():
        return {}
    found = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            found[line["arm"], line["seed"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged in line {number}; remove that line and run the study again") from error
    return found


def update_results(study: Study, out: Path, line: Line) -> None:
    """Puts a line in its place in results.jsonl: in the study's order, others behind. Safe beside other processes."""
    with FileLock(out / ".results.lock"):
        lines = read_results(study) | {(line["arm"], line["seed"]): line}
        order = {(arm.name, seed): i for i, (arm, seed) in enumerate((a, s) for a in study.arms for s in study.seeds)}
        keys = sorted(lines, key=lambda key: order.get(key, len(order)))
        file = study.folder / RESULTS
        draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
        draft.write_text("".join(json.dumps(lines[key]) + "\n" for key in keys), encoding="utf-8")
        os.replace(draft, file)


def must_agree(study: Study, job: Job, line: Line) -> None:
    """UserError if a line was trained with what study.json no longer says; names the first field."""
    now = asked(study, job)
    pairs = {name: (line.get(name), now[name]) for name in ("preset", "from", "budget")}
    before, after = line.get("overrides", {}), now["overrides"]
    pairs |= {name: (before.get(name), after.get(name)) for name in [*before, *after]}
    for name, (then, wanted) in pairs.items():
        if then != wanted:
            raise changed(study, job, name, then, wanted)


def changed(study: Study, job: Job, name: str, then: Any, wanted: Any) -> UserError:
    return UserError(
        f"{job.name} of study {study.name} was trained with {name} {json.dumps(then)}, {study.file} says "
        f"{json.dumps(wanted)}: give the arm or the study another name, or remove its line and its run"
    )
