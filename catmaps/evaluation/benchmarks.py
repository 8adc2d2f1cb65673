"""Runs tasks of lm-eval on a `CatmapsLM` and sums up what came out, with what it is to be read beside."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from catmaps.errors import UserError
from catmaps.evaluation.harness import Harness, Record

Sample = dict[str, Any]
"""One item of a task in lm-eval's sample log."""


@dataclass(frozen=True)
class TaskResult:
    """What a task, or a group of tasks, gave."""

    metrics: dict[str, float]
    """By lm-eval's names; perplexities and bits are upper bounds, like the likelihoods they are made of."""
    stderr: dict[str, float]
    """Standard errors over items, where there is one."""
    items: int
    chance: float | None = None
    """Accuracy without reading the question: the commonest label if the answers are always the same, else one in so
    many; None for other tasks."""
    requests: int = 0
    """Distinct continuations and texts that were scored or written."""
    truncated: int = 0
    """Requests whose prompt has lost its beginning."""
    undecided: int = 0
    """Questions whose best answer the budget could not tell from the others."""
    mean_samples: float | None = None
    """Draws per continuation, mean over questions."""
    monte_carlo_stderr: float | None = None
    """Of bits_per_byte, from the random times and noise alone."""


@dataclass(frozen=True)
class Evaluation:
    """Results by task, and the sample logs, to which what is on record about every item has been added."""

    results: dict[str, TaskResult]
    samples: dict[str, list[Sample]] = field(repr=False)
    fewshot: dict[str, int]
    lm_eval_version: str


def evaluate(
    lm: Harness,
    tasks: Sequence[str],
    *,
    include: Sequence[Path] = (),
    defaults: bool = True,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Evaluates tasks by lm-eval's `simple_evaluate`.

    Args:
        lm: An instance of `CatmapsLM`.
        tasks: Names of tasks, groups or tags.
        include: Folders of task files.
        defaults: Whether lm-eval's own tasks are known too; looking for them takes some seconds.
        num_fewshot: Solved examples before each question; None: as the task says.
        limit: Items per task.

    Raises:
        UserError: A task is unknown or its data cannot be had; and what `CatmapsLM` refuses.
    """
    import datasets
    import lm_eval
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    manager = TaskManager(include_path=[str(path) for path in include], include_defaults=defaults)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(
                f"no task {name}; `lm-eval ls tasks` lists lm-eval's, --offline-tasks adds those named local_"
            )
        try:
            manager.load([name])
        except Exception as error:  # whatever the libraries of data sets raise
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"the data of task {name} cannot be had ({type(error).__name__}: {said}); without a network use "
                "--offline-tasks"
            ) from error
    seed, lm.records = lm.budget.seed, []
    found: Any = simple_evaluate(
        model=lm,  # pyright: ignore[reportArgumentType]
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed % (1 << 32),
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    samples: dict[str, list[Sample]] = found["samples"]
    results = {}
    for name, values in found["results"].items():
        records = [record for record in lm.records if record.task == name]
        kind = found["configs"].get(name, {}).get("output_type")
        results[name] = _result(values, samples.get(name, []), records, kind)
        _add_records(samples.get(name, []), records)
    return Evaluation(results, samples, dict(found["n-shot"]), lm_eval.__version__)


def _result(
    values: dict[str, Any], samples: Sequence[Sample], records: Sequence[Record], kind: str | None
) -> TaskResult:
    metrics = {key.partition(",")[0]: value for key, value in values.items() if "," in key and _is_number(value)}
    stderr = {name.replace("_stderr", ""): value for name, value in metrics.items() if name.endswith("_stderr")}
    metrics = {name: value for name, value in metrics.items() if not name.endswith("_stderr")}
    noise = None
    if kind == "loglikelihood_rolling" and "bits_per_byte" in metrics:
        size = sum(sample["bits_per_byte"][1] for sample in samples) * math.log(2)
        noise = math.hypot(*(record.stderr[0] for record in records)) / size
        stderr |= {"bits_per_byte": _ratio_stderr([sample["bits_per_byte"] for sample in samples]) / math.log(2)}
    questions = [record for record in records if record.decided is not None]
    drawn = [record.samples for record in records if record.nats]
    return TaskResult(
        metrics,
        stderr,
        items=len(samples) or int(values.get("sample_len", 0)),
        chance=_chance(samples) if kind == "multiple_choice" else None,
        requests=sum(max(1, len(record.nats)) for record in records),
        truncated=sum(record.truncated for record in records),
        undecided=sum(not record.decided for record in questions),
        mean_samples=sum(drawn) / len(drawn) if drawn else None,
        monte_carlo_stderr=noise,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ratio_stderr(pairs: Sequence[tuple[float, int]]) -> float:
    """Standard error of a ratio of sums over items, here nats over bytes."""
    if len(pairs) < 2:
        return float("nan")
    ratio = sum(top for top, _ in pairs) / sum(bottom for _, bottom in pairs)
    rest = [top - ratio * bottom for top, bottom in pairs]
    n, mean = len(pairs), sum(bottom for _, bottom in pairs) / len(pairs)
    return math.sqrt(sum(r * r for r in rest) / (n - 1) / n) / mean


def _chance(samples: Sequence[Sample]) -> float | None:
    if not samples:
        return None
    answers = [tuple(continuation for _, continuation, *_ in sample["arguments"]) for sample in samples]
    if len(set(answers)) == 1 and len(answers) > 1:
        return max(Counter(str(sample["target"]) for sample in samples).values()) / len(samples)
    return sum(1 / len(answer) for answer in answers) / len(samples)


def _add_records(samples: Sequence[Sample], records: Sequence[Record]) -> None:
    by_item: dict[int | str | None, list[Record]] = {}
    for record in records:
        by_item.setdefault(record.doc, []).append(record)
    for sample in samples:
        sample["catmaps"] = [asdict(record) for record in by_item.get(sample["doc_id"], [])]


def write_samples(evaluation: Evaluation, out: Path) -> list[Path]:
    """One samples_TASK.jsonl per task; returns the files."""
    files = []
    for name, samples in evaluation.samples.items():
        files.append(out / f"samples_{name.replace('/', '_')}.jsonl")
        files[-1].write_text("".join(json.dumps(sample, default=str) + "\n" for sample in samples), encoding="utf-8")
    return files
