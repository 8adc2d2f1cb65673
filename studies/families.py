"""Flow or discrete? Four families on one trunk: autoregressive, masked diffusion, uniform diffusion, and the base flow.

Same data in the same order, optimiser, steps and tokens; networks of the same sizes, within 2% of parameters. Measured:
bits per character on test text (exact for the autoregressive family, else an upper bound) and the quality of samples
per network call. An arm is a folder: what is trained, scored or sampled is not done again, what was stopped goes on.
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import RESULTS, in_parallel, record
from families_plot import write_plots
from rich.console import Console
from rich.table import Table

from catmaps.config import Config, DataConfig, OptimiserConfig, TrainingConfig
from catmaps.evaluation.collect import build_judge, heldout_score, measure, read_metrics
from catmaps.evaluation.quality import control_rows
from catmaps.flow.objective import ObjectiveConfig
from catmaps.generation import default_sampling
from catmaps.model import CONFIG, Run, compile_blocks, load_run, read_config
from catmaps.network.denoiser import NetworkConfig
from catmaps.text import tokenizers
from catmaps.training.train import cache_folder, find_shards, start, train

FAMILIES = ("autoregressive", "masked", "uniform", "flow")
SHAPES = {"text8": (128, 64), "bpe:4096": (64, 32)}  # tokens per sequence, sequences per step
SIZES = {
    "tiny": NetworkConfig(width=32, blocks=1, heads=2, conditioning=16),  # to try the study out
    "mini": NetworkConfig(width=64, blocks=3, heads=2),
    "small": NetworkConfig(width=128, blocks=4, heads=4),
    "medium": NetworkConfig(width=256, blocks=5, heads=4),
}


class Arm(NamedTuple):
    tokenizer: str
    size: str
    family: Any
    seed: int

    @property
    def name(self) -> str:
        return f"{self.tokenizer.replace(':', '')}-{self.size}-{self.family}-{self.seed}"


class Job(NamedTuple):
    """What a process does with an arm."""

    arm: Arm
    out: Path
    steps: int
    calls: tuple[int, ...]
    windows: int
    texts: int
    compile: bool


def config_of(job: Job) -> Config:
    length, batch = SHAPES[job.arm.tokenizer]
    return Config(
        preset="families",
        family=job.arm.family,
        data=DataConfig(tokenizer=job.arm.tokenizer, length=length),
        network=SIZES[job.arm.size],
        objective=ObjectiveConfig(clean=0),  # every position counts, as for the others
        optimiser=OptimiserConfig(warmup=min(60, job.steps // 4 + 1), ema=0.99),
        training=TrainingConfig(
            steps=job.steps,
            batch=batch,
            micro_batch=batch,
            seed=job.arm.seed,
            compile=job.compile,
            threads=1,
            save_every=max(1, job.steps // 8),
            evaluate_every=max(1, job.steps // 8),
        ),
    )


def trained(job: Job) -> Run:
    """The arm's run; begun, taken up or left as it is."""
    folder, config = job.out / job.arm.name, config_of(job)
    if (folder / CONFIG).exists():
        if read_config(folder) != config:
            raise SystemExit(f"{folder} was trained with other options: choose another --out, or remove it")
    else:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before its configuration was written
        start(config, folder)
    if not any(row["step"] == job.steps and "loss" in row for row in _metrics(folder)) or not _saved(folder, job.steps):
        outcome = train(folder)
        if not outcome.complete:
            raise RuntimeError(f"{folder} stopped at step {outcome.step}, saved; repeat the command to go on")
    return load_run(folder)


def _metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _saved(folder: Path, step: int) -> bool:
    return (folder / "checkpoints" / f"step{step}").is_dir() and (folder / "model.safetensors").exists()


def one(job: Job) -> dict[str, Any]:
    """All figures of an arm. Each is written to figures.json as it is known, and read back if it is there."""
    run = trained(job)
    file = run.path / "figures.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    shards = find_shards(run.config)
    judge = build_judge(shards, run.tokenizer, cache_folder())
    length = run.config.data.length

    def keep(key: str, value: Any) -> None:
        known[key] = value
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(known, indent=1))
        draft.replace(file)

    if f"bound {job.windows}" not in known:
        score = heldout_score(run, shards, job.windows)
        scale = 1 / math.log(2) / score.characters
        bound = {"bits_per_char": score.nats * scale, "stderr": score.windows_stderr * scale}
        keep(f"bound {job.windows}", {**bound, "monte_carlo": score.monte_carlo_stderr * scale})
    if run.baseline is None or not run.baseline.sequential:
        compile_blocks(run.network) if job.compile else None
    for calls in dict.fromkeys(default_sampling(run, n).calls for n in job.calls):
        if f"quality {calls} {job.texts}" not in known:
            sampling = replace(default_sampling(run, calls), seed=job.arm.seed)
            figures, texts = measure(run, judge, sampling, job.texts)
            keep(f"quality {calls} {job.texts}", {"calls": calls, **asdict(figures), "example": texts[0]})
    metrics = read_metrics(run)
    qualities = [known[key] for key in known if key.startswith("quality") and key.endswith(f" {job.texts}")]
    return {
        **job.arm._asdict(),
        "parameters": sum(run.network.num_parameters()),
        "tokens": job.steps * run.config.training.batch * length,
        "seconds": max(row["seconds"] for row in metrics),
        "cpu_seconds": max(row["cpu_seconds"] for row in metrics),
        "bound": known[f"bound {job.windows}"],
        "curve": [[row["tokens"], row["nelbo_bits_per_char"]] for row in metrics if "nelbo_bits_per_char" in row],
        "quality": sorted(qualities, key=lambda row: row["calls"]),
    }


def prepare(tokenizer: str, texts: int) -> dict[str, Any]:
    """Builds shards and judge before processes would race for them; the quality of texts of known worth."""
    shards = find_shards(Config(data=DataConfig(tokenizer=tokenizer, length=SHAPES[tokenizer][0])))
    own = tokenizers.load(shards)
    judge, rng = build_judge(shards, own, cache_folder()), np.random.default_rng(0)
    length, characters = SHAPES[tokenizer][0], judge.drawn[:20_000]
    if tokenizer != "text8":
        length = max(1, round(length * len(characters) / len(own.encode(characters))))
    return {name: asdict(row) for name, row in control_rows(judge, length, texts, rng).items()}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Families at equal tokens and steps (bits per character)")
    for heading in ("tokenizer", "size", "family", "parameters", "minutes", "NLL or NELBO", "calls", "forward"):
        table.add_column(heading, justify="left" if heading in ("tokenizer", "size", "family") else "right")
    table.add_column("reverse", justify="right")
    table.add_column("entropy", justify="right")
    for row in rows:
        head = (row["tokenizer"], row["size"], row["family"], f"{row['parameters'] / 1e6:.2f}M")
        bound = f"{row['bound']['bits_per_char']:.3f} ± {row['bound']['stderr']:.3f}"
        for i, quality in enumerate(row["quality"]):
            first = (*head, f"{row['seconds'] / 60:.1f}", bound) if i == 0 else ("",) * 6
            figures = (quality[name] for name in ("forward_bits", "reverse_bits", "token_entropy"))
            table.add_row(*first, str(quality["calls"]), *(f"{figure:.3f}" for figure in figures))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/families"), help="folder of the arms")
    parser.add_argument("--steps", type=int, default=1200, help="the budget, the same for every arm")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["mini", "small"])
    parser.add_argument("--tokenizers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calls", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--texts", type=int, default=256, help="samples per arm and number of calls")
    parser.add_argument("--windows", type=int, default=512, help="of test text for the bound")
    parser.add_argument("--workers", type=int, default=2, help="one-core processes")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--name", default="families", help="of the record and the pictures")
    options = parser.parse_args()
    controls = {name: prepare(name, options.texts) for name in options.tokenizers}
    arms = [
        Arm(tokenizer, size, family, seed)
        for seed in options.seeds
        for size in options.sizes
        for tokenizer in options.tokenizers
        for family in options.families
    ]
    rest = (tuple(options.calls), options.windows, options.texts, not options.no_compile)
    rows = in_parallel(one, [Job(arm, options.out, options.steps, *rest) for arm in arms], options.workers)
    show(rows)
    print(record(options.name, {"rows": rows, "controls": controls, "steps": options.steps}))
    for picture in write_plots(rows, controls, RESULTS / options.name):
        print(picture)


if __name__ == "__main__":
    main()
