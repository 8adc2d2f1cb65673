"""What should a base be told besides the noisy text? Features of time taken apart, and its own last estimate.

Arms, all with the same number of steps; parameters differ by a table in the last one alone:
  clock-snr         waves of the clock and of log-SNR: what catmaps does
  clock, snr        the one or the other
  t                 waves of t itself, as in most published codes
  nothing           no features: the gains alone know the time
  self-conditioned  an estimate of the endpoint enters beside the state: in half of the steps none, else the answer of a
                    pass without one, which carries no gradient. Scored with one pass a call and with two; samples are
                    drawn with each step's estimate handed to the next.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from common import in_parallel, paired, record
from torch import Tensor, nn

import catmaps.model
from catmaps.config import Config, OptimiserConfig, TrainingConfig
from catmaps.flow.evidence import OffDiagonalGain, TimeFeatures
from catmaps.flow.times import Law, uniform, warp
from catmaps.model import Device, load_run
from catmaps.network.denoiser import FlowNetwork, NetworkConfig, NoisyText
from catmaps.studies.measures import few_step, nelbo
from catmaps.training.train import start, train

PLAIN, SELF = "clock-snr", "self-conditioned"
ARMS = (PLAIN, "clock", "snr", "t", "nothing", SELF)
STEPS = 64
"""Euler steps of samples."""


class Chosen(TimeFeatures):
    """Time features of which some are always those of the value 0; their number stays."""

    def __init__(self, clock: Law, clock_share: float, snr_share: float) -> None:
        super().__init__(clock)
        self.register_buffer("share", torch.tensor([clock_share, snr_share]))

    share: Tensor

    def _inputs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        values, rates = super()._inputs(t)
        return values * self.share, rates * self.share


def features(arm: str, vocab_size: int) -> TimeFeatures:
    clock = uniform() if arm == "t" else warp(vocab_size)
    return Chosen(clock, float(arm not in ("snr", "nothing")), float(arm not in ("clock", "t", "nothing")))


class SelfConditioned(FlowNetwork):
    """A denoiser that sees an estimate of the endpoint beside the state, zero where there is none.

    In training it is without an estimate in half of the calls. Without gradients `passes` says how often a state is
    looked at: once, or once more with the estimate of the first look; "warm" looks once, with that of the last call,
    which must be for the same texts at an earlier time.
    """

    passes: Literal[1, 2, "warm"] = 2

    def __init__(
        self, config: NetworkConfig, features: TimeFeatures, gains: tuple[nn.Module, nn.Module], log_prior: Tensor
    ) -> None:
        super().__init__(config, features, gains, log_prior)  # pyright: ignore[reportArgumentType]
        self.estimates = nn.Linear(len(log_prior), config.width, bias=False)
        nn.init.normal_(self.estimates.weight)
        self.estimate: Tensor | None = None
        self.coin = torch.Generator().manual_seed(0)

    def _embed(self, state: NoisyText, gain: Tensor, s: Tensor) -> Tensor:
        embedded = super()._embed(state, gain, s)
        return embedded if self.estimate is None else embedded + F.linear(self.estimate, self.estimates.weight)

    @torch.no_grad()
    def look(self, state: NoisyText, s: Tensor, t: Tensor) -> None:
        self.estimate = self.logits(super().encode(state, s, t), state, s, t).softmax(-1)

    def encode(self, state: NoisyText, s: Tensor, t: Tensor) -> Tensor:
        """Hidden vectors of every position, (B, L, d)."""
        learns = torch.is_grad_enabled()
        if learns or self.passes != "warm" or float(s.max()) == 0:
            self.estimate = None
        if self.passes == 2 if not learns else torch.rand((), generator=self.coin) < 0.5:
            self.look(state, s, t)
        hidden = super().encode(state, s, t)
        if not learns and self.passes == "warm":
            self.estimate = self.logits(hidden, state, s, t).softmax(-1)
        return hidden


def builder(arm: str) -> Callable[[NetworkConfig, Tensor, Device], FlowNetwork]:
    """What stands for `catmaps.model.build_network` in an arm."""

    def build(config: NetworkConfig, log_prior: Tensor, device: Device = None) -> FlowNetwork:
        kind = SelfConditioned if arm == SELF else FlowNetwork
        with device or nullcontext():
            return kind(config, features(arm, len(log_prior)), (OffDiagonalGain(), OffDiagonalGain()), log_prior)

    return build


class Job(NamedTuple):
    arm: str
    seed: int
    out: Path
    steps: int


def config_of(job: Job) -> Config:
    return Config(
        preset="conditioning",
        network=NetworkConfig(width=128, blocks=4, heads=4, neighbours=3),
        optimiser=OptimiserConfig(warmup=40, ema=0.99),
        training=TrainingConfig(
            steps=job.steps,
            batch=32,
            micro_batch=32,
            seed=job.seed,
            threads=1,
            compile=False,
            evaluate_every=0,
            save_every=10**6,
        ),
    )


def measure(job: Job) -> dict[str, float]:
    catmaps.model.build_network = builder(job.arm)  # where training and reading look it up
    if not (job.out / "config.json").exists():
        start(config_of(job), job.out)
    train(job.out)
    run = load_run(job.out)
    found = {"nelbo": nelbo(run, seed=0).figures["nelbo"].value}
    network = run.network
    if isinstance(network, SelfConditioned):
        network.passes = 1
        found["nelbo, one pass"] = nelbo(run, seed=0).figures["nelbo"].value
        network.passes = "warm"
    if job.arm in (PLAIN, SELF):
        found |= {
            name: figure.value
            for name, figure in few_step(run, seed=job.seed, calls=(STEPS,), samples=128).figures.items()
        }
    return found


def compared(rows: list[tuple[Job, dict[str, float]]], arm: str, name: str) -> tuple[float, float, float]:
    """(mean, mean difference to the plain arm by seeds, its standard error)."""
    own = {job.seed: found[name] for job, found in rows if job.arm == arm}
    beside = {job.seed: found[name if name in found else "nelbo"] for job, found in rows if job.arm == PLAIN}
    return paired(own, beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/conditioning"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    arms: list[str] = [arm for arm in ARMS if arm == PLAIN or arm in options.arms]
    jobs = [Job(arm, seed, options.out / f"{arm}-{seed}", options.steps) for seed in options.seeds for arm in arms]
    rows = list(zip(jobs, in_parallel(measure, jobs, options.workers), strict=True))
    for arm in arms:
        for name in next(found for job, found in rows if job.arm == arm):
            mean, gap, error = compared(rows, arm, name)
            print(f"{arm:17} {name:18} {mean:.3f}  {gap:+.3f} +- {error:.3f}")
    recorded = [{"arm": job.arm, "seed": job.seed, "figures": found} for job, found in rows]
    print(record("conditioning", {"steps": options.steps, "rows": recorded}))


if __name__ == "__main__":
    main()
