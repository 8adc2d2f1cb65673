"""`catmaps steer`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Steer:
    """Write texts towards a reward r: draws from p(text) exp(r(text)), by particles (docs/steering.md).

    Rewards: contains:TEXT (each wrong letter of it costs STRENGTH nats), word-length:N (STRENGTH nats per letter that
    the mean word is off), valid-words (STRENGTH nats for all words being words of the training text).
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run: a map or a base."""
    reward: str
    """NAME or NAME:ARGUMENT."""
    strength: float = 8.0
    """Nats of reward, see above. More reward, fewer particles that count."""
    num: int = 4
    """How many texts."""
    particles: int = 16
    """Per text; more are nearer to the tilted law."""
    steps: int | None = None
    """Steps of every particle; default: 8 for a map, 64 for a base or with a gradient."""
    noise: float | None = None
    """Of a map: variance of the noise that renoising adds, a share of the path's; default: as `catmaps sample`."""
    gradient: bool = False
    """Drift along the gradient of the reward (contains only)."""
    best: bool = False
    """Take the best particle instead of a draw by weight: higher reward, but no draw from the tilted law."""
    infill: str | None = None
    """Text with blanks, [[N]] for N tokens; the rest of it stays as it is."""
    length: int | None = None
    """Tokens per text; default: the run's window."""
    seed: int = 0
    batch: int = 64
    """Particles that move together."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        import time

        from catmaps.errors import UserError
        from catmaps.goals import default_steering, read_goal, steer
        from catmaps.infill import Template
        from catmaps.model import load_run

        for name in ("num", "particles", "batch", "steps", "length"):
            value = {"steps": self.steps, "length": self.length}.get(name, vars(self)[name])
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if self.infill is not None and self.length is not None:
            raise UserError("--length is for texts without --infill")
        run = load_run(self.run_)
        if run.baseline is not None:
            raise UserError(f"run {self.run_} is a {run.kind}: flows alone can be steered")
        goal = read_goal(self.reward, self.strength, run.tokenizer, lambda: _words(run))
        config = default_steering(run, goal, particles=self.particles, gradient=self.gradient)
        own = {"noise": self.noise, "seed": self.seed, "batch": self.batch, "best": self.best}
        config = replace(config, steps=self.steps or config.steps, **own)
        template = None if self.infill is None else Template.read(self.infill, run.tokenizer)
        began, texts, measures, effective = time.monotonic(), [], [], []
        for found in steer(run, config, self.num, length=self.length, template=template):
            for row, spread in zip(found.texts.cpu(), found.particles.effective.T.tolist(), strict=True):
                texts.append(run.tokenizer.decode(row.numpy()))
                measures.append(goal.measure(texts[-1]))
                effective.append(min(spread))
                print(f"[{len(texts)}] {texts[-1]}")
        mean = sum(measures) / len(measures)
        print(
            f"{goal.name}: {mean:.3f} on average; at least {min(effective):.1f} of {self.particles} particles counted"
        )
        return {
            "run": str(self.run_),
            "reward": self.reward,
            "strength": self.strength,
            "move": config.tilt.move,
            "particles": self.particles,
            "steps": config.steps,
            "noise": config.sampling.variance(run),
            "seed": self.seed,
            "seconds": time.monotonic() - began,
            "texts": texts,
            "measure": goal.name,
            "measures": measures,
            "least_effective_particles": effective,
        }


def _words(run: Any) -> frozenset[str]:
    from catmaps.evaluation.collect import build_judge
    from catmaps.training.train import cache_folder, find_shards

    return build_judge(find_shards(run.config), run.tokenizer, cache_folder()).words


def read(name: str, args: list[str]) -> Steer:
    return parse(Steer, args, f"catmaps {name}")
