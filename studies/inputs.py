"""`belief` or `linear` input, at equal tokens: 27 symbols and a BPE of 4,096, two seeds each.

`linear` has no output skip, as in the published models; `belief` has it.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

from common import in_parallel, record

from catmaps.config import Config, DataConfig, OptimiserConfig, TrainingConfig
from catmaps.evaluation.collect import heldout_score, read_metrics
from catmaps.model import load_run
from catmaps.network.denoiser import NetworkConfig
from catmaps.training.train import find_shards, start, train

Job = tuple[Path, str, Literal["belief", "linear"], int, int]
SHAPES = {"text8": (128, 32), "bpe:4096": (64, 32)}  # tokens per sequence, sequences per step


def one(job: Job) -> dict[str, float]:
    """(out, tokenizer, input, seed, steps) -> figures."""
    out, tokenizer, kind, seed, steps = job
    length, batch = SHAPES[tokenizer]
    config = Config(
        preset="inputs",
        data=DataConfig(tokenizer=tokenizer, length=length),
        network=NetworkConfig(width=128, blocks=4, heads=4, input=kind, skip=kind == "belief"),
        optimiser=OptimiserConfig(warmup=50),
        training=TrainingConfig(
            steps=steps,
            batch=batch,
            micro_batch=batch,
            seed=seed,
            threads=1,
            evaluate_every=0,
            save_every=steps,
        ),
    )
    start(replace(config), out)
    train(out)
    run = load_run(out)
    score = heldout_score(run, find_shards(run.config), 512)
    scale = 1 / math.log(2) / score.characters
    seconds = max(row["seconds"] for row in read_metrics(run))
    return {
        "bits_per_char": score.nats * scale,
        "stderr": score.windows_stderr * scale,
        "minutes": seconds / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/inputs"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokenizers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--name", default="inputs", help="of the record")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs: list[Job] = [
        (options.out / f"{tokenizer.replace(':', '')}-{kind}-{seed}", tokenizer, kind, seed, options.steps)
        for tokenizer in options.tokenizers
        for seed in options.seeds
        for kind in ("belief", "linear")
    ]
    results = in_parallel(one, jobs, options.workers)
    rows = [
        {"tokenizer": tokenizer, "input": kind, "seed": seed, **figures}
        for (_, tokenizer, kind, seed, _), figures in zip(jobs, results, strict=True)
    ]
    for row in rows:
        print(f"{row['tokenizer']:9} {row['input']:7} seed {row['seed']}  {row['bits_per_char']:.4f}", end=" ")
        print(f"+- {row['stderr']:.4f} bits/char  {row['minutes']:.1f} min")
    print(record(options.name, {"rows": rows, "steps": options.steps}))


if __name__ == "__main__":
    main()
