"""Do jumps learn better with gradients set apart, adaptive weights, or other constants? From one base, equal steps.

Arms of PSD distillation:
  plain      the sum of all losses: `catmaps distill`
  surgery    where the gradient of jumps and anchors opposes that of the diagonal, its component along the latter is
             taken off before both are added
  adaptive   a jump's loss at a position weighs (||target - mu||^2 + c)^-1/2, c = 1e-6, over its mean in the batch
and of endpoint-consistency distillation (docs/maths.md (c2)):
  ecld       with the corrected constants 2 and 2
  ecld42     with the published ones, 4 and 2
Figures: samples in few calls, the bound, and of `surgery` how often and how much the two gradients oppose each other.

Source: DFM, arXiv:2604.09784 (both remedies); Yu et al. 2020, arXiv:2001.06782 (surgery).
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import in_parallel, paired, record
from jaxtyping import Float
from torch import Tensor

from catmaps.flow import losses
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import AnyState, advance, step_fraction
from catmaps.flow.objective import DIAGONAL
from catmaps.flow.reduction import TokenLoss, weighted_sum
from catmaps.flow.times import Law, Pair
from catmaps.model import load_run, read_config
from catmaps.presets import distill_quickstart
from catmaps.studies.measures import few_step, nelbo
from catmaps.tiles import MovingReadout, Readout, Tile
from catmaps.training.module import FlowTrainModule
from catmaps.training.objectives import FlowBatch, FlowObjective, Key, Weigh
from catmaps.training.train import start, train

PLAIN, SURGERY, ADAPTIVE = "plain", "surgery", "adaptive"
ECLD, PUBLISHED = "ecld", "ecld42"
ARMS = (PLAIN, SURGERY, ADAPTIVE, ECLD, PUBLISHED)
BESIDE = {arm: ECLD if arm in (ECLD, PUBLISHED) else PLAIN for arm in ARMS}
"""What an arm is compared with."""
FLOOR = 1e-6
COSINES = "cosines.json"
"""In the folder of a run of surgery: those of its steps, as a list."""
CALLS = (1, 4, 8)


def without_opposition(gradient: Float[Tensor, "n"], other: Float[Tensor, "n"]) -> tuple[Float[Tensor, "n"], float]:
    """`gradient` less its component along `other` where that is negative; and their cosine."""
    along = torch.dot(gradient, other)
    cosine = (along / (gradient.norm() * other.norm()).clamp_min(1e-30)).item()
    return (gradient - along / other.square().sum() * other if cosine < 0 else gradient), cosine


TRAIN_BATCH = FlowTrainModule.train_batch


class Part:
    """An objective of which only the diagonal counts, or only the rest."""

    def __init__(self, whole: FlowObjective, diagonal: bool) -> None:
        self.whole, self.diagonal = whole, diagonal

    def batch(self, law: Law, rows: int, length: int, key: Key, weigh: Weigh | None = None) -> FlowBatch:
        batch = self.whole.batch(law, rows, length, key, weigh)
        counts = (batch.whole.role == DIAGONAL) == self.diagonal
        batch.whole = batch.whole._replace(weight=batch.whole.weight * counts[:, None])
        return batch


cosines: list[float] = []  # of the process, which trains one arm at a time


def operated_batch(self: FlowTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
    """The trainer's work on a batch in two backward passes, whose gradients are added without opposition."""
    whole = self.objective
    assert isinstance(whole, FlowObjective)
    weights = [p for p in self.network.parameters() if p.requires_grad]
    parts: list[Tensor] = []
    for diagonal in (True, False):
        self.zero_grads()
        self.objective = Part(whole, diagonal)  # pyright: ignore[reportAttributeAccessIssue]
        TRAIN_BATCH(self, batch, dry_run)
        parts.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights]))
    self.objective = whole
    if dry_run:
        return
    jumps, cosine = without_opposition(parts[1], parts[0])
    cosines.append(cosine)
    for p, part in zip(weights, (parts[0] + jumps).split([p.numel() for p in weights]), strict=True):
        p.grad = part.view_as(p)


def adaptive_psd(floor: float) -> losses.OffDiagonalLoss:
    """`psd` whose positions weigh (||target - mu||^2 + floor)^-1/2 over its mean."""

    def loss(flow_map: FlowMap, teacher: FlowMap, state: AnyState, times: Pair, weight: Tensor) -> TokenLoss:
        s, u, t = times
        with torch.no_grad():
            first = teacher.read(state, s, u)
            second = teacher.read(advance(state, first, step_fraction(s, u)), u, t)
            share = losses._first_share(times)[..., None]
            target = torch.lerp(second.x, first.x, share)
            now = flow_map.read(state, s, t)
            factor = ((now.x - target).square().sum(-1) + floor).rsqrt() * (weight > 0)
            factor = factor / (factor.sum() / (weight > 0).sum().clamp_min(1))

        def work(now: Any, tile: Tile) -> tuple[Tensor, Tensor | None]:
            return losses._kl_to(tile(target), losses._shifted(now.readout.logits())), None

        return weighted_sum(work, flow_map.read(state, s, t), weight * factor)

    return loss


CORRECTED = losses._consistency


def published(now: MovingReadout, target: Readout, factor: Tensor) -> Tensor:
    """4 KL(target || mu) + 2 factor ||d/dt mu||^2: in place of the first term's 2."""
    logits, _, _ = losses._moving(now)
    return CORRECTED(now, target, factor) + 2 * losses._kl_to(target.logits().softmax(-1), logits)


class Job(NamedTuple):
    arm: str
    seed: int
    base: Path
    out: Path
    steps: int


def fit(job: Job) -> None:
    config = distill_quickstart(read_config(job.base))
    training = replace(
        config.training, steps=job.steps, seed=job.seed, threads=1, compile=False, evaluate_every=0, save_every=10**6
    )
    objective = replace(config.objective, loss="ecld" if BESIDE[job.arm] == ECLD else "psd")
    config = replace(config, objective=objective)
    if not (job.out / "config.json").exists():
        start(replace(config, base=str(job.base), preset="gradients", training=training), job.out)
    losses._consistency = published if job.arm == PUBLISHED else CORRECTED
    losses.OFF_DIAGONAL["psd"] = adaptive_psd(FLOOR) if job.arm == ADAPTIVE else losses.psd
    FlowTrainModule.train_batch = operated_batch if job.arm == SURGERY else TRAIN_BATCH
    cosines.clear()
    train(job.out)
    if cosines:
        (job.out / COSINES).write_text(json.dumps(cosines), encoding="utf-8")


def measure(job: Job) -> dict[str, float]:
    fit(job)
    run = load_run(job.out)
    figures = nelbo(run, seed=0).figures | few_step(run, seed=job.seed, calls=CALLS, samples=512).figures
    found = {name: figure.value for name, figure in figures.items()}
    if (file := job.out / COSINES).exists():
        each = torch.tensor(json.loads(file.read_text(encoding="utf-8")))
        found |= {"opposed": (each < 0).float().mean().item(), "cosine": each.mean().item()}
    return found


def compared(rows: list[tuple[Job, dict[str, float]]], arm: str, name: str) -> tuple[float, float, float]:
    """(mean, mean difference to its neighbour in `BESIDE` by seeds, its standard error)."""
    own = {job.seed: found[name] for job, found in rows if job.arm == arm}
    beside = {job.seed: found[name] for job, found in rows if job.arm == BESIDE[arm]}
    return paired(own, beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [
        Job(arm, seed, options.base, options.out / f"{arm}-{seed}", options.steps)
        for seed in options.seeds
        for arm in ARMS
    ]
    rows = list(zip(jobs, in_parallel(measure, jobs, options.workers), strict=True))
    names = ["nelbo", *(f"{way} bits @{n}" for n in CALLS for way in ("forward", "reverse"))]
    for arm in ARMS:
        for name in names:
            mean, gap, error = compared(rows, arm, name)
            print(f"{arm:10} {name:18} {mean:.3f}  {gap:+.3f} +- {error:.3f}")
    for name in ("opposed", "cosine"):
        print(f"{name} {statistics.mean(found[name] for _, found in rows if name in found):.3f}")
    recorded = [{"arm": job.arm, "seed": job.seed, "figures": found} for job, found in rows]
    print(record("gradients", {"steps": options.steps, "rows": recorded}))


if __name__ == "__main__":
    main()
