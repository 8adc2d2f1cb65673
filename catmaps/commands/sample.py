"""`catmaps sample`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Sample:
    """Write texts. A map jumps (renoise, 4 steps); a base is followed (euler, 64 steps), as are baselines (64 steps;
    autoregressive: one call per token).

    Example: catmaps sample runs/map --steps 2 --num 4 --seed 1
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    steps: int | None = None
    """Steps of the sampler: network calls (heun: 2 steps - 1)."""
    num: int = 8
    """How many texts."""
    seed: int = 0
    sampler: Literal["flow_map", "euler", "heun", "renoise", "localisation"] | None = None
    temperature: float = 1.0
    """Divides the logits and multiplies the variance of the first noise: below 1 is cleaner and less diverse."""
    length: int | None = None
    """Tokens per text; default: as in training."""
    batch: int = 64
    """Texts drawn together."""
    show_trajectory: bool = False
    """Also print the likeliest text after every step of the first sample."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        import time

        from catmaps.errors import UserError
        from catmaps.generation import default_sampling, generate
        from catmaps.model import load_run

        if self.num < 1 or (self.length is not None and self.length < 1):
            raise UserError("--num and --length must be at least 1")
        run = load_run(self.run_)
        if run.baseline is not None and self.show_trajectory:
            raise UserError(f"run {self.run_} is a {run.kind}, which has no trajectory; leave out --show-trajectory")
        if run.baseline is not None and run.baseline.sequential and self.steps is not None:
            raise UserError(f"run {self.run_} makes one call per token; leave out --steps")
        config = default_sampling(run, self.steps)
        if self.sampler is not None:
            config = replace(config, sampler=self.sampler)
        config = replace(config, seed=self.seed, temperature=self.temperature, batch=self.batch)
        drafts: list[tuple[float, str]] = []

        def watch(t: float, endpoint: Any) -> None:
            if self.show_trajectory and len(drafts) < config.steps:
                drafts.append((t, run.tokenizer.decode(endpoint[0].argmax(-1).cpu().numpy())))
                print(f"t = {t:.3f}  {drafts[-1][1]}")

        began, texts = time.monotonic(), []
        for batch in generate(run, self.num, config, length=self.length, watch=watch):
            for row in batch:
                texts.append(run.tokenizer.decode(row.numpy()))
                print(f"[{len(texts)}] {texts[-1]}")
        return {
            "run": str(self.run_),
            "sampler": config.sampler,
            "steps": config.steps,
            "network_calls": config.calls,
            "seed": self.seed,
            "temperature": self.temperature,
            "seconds": time.monotonic() - began,
            "texts": texts,
            "trajectory": [{"t": t, "text": text} for t, text in drafts],
        }


def read(name: str, args: list[str]) -> Sample:
    return parse(Sample, args, f"catmaps {name}")
