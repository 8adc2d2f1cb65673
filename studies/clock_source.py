"""Does the clock matter on a vocabulary of 32,768? On a source whose entropy is known, at equal steps.

The source is a Markov chain over classes of words: the class of a token depends on that of the last one, nearly always
the same way, and the token is drawn from its class by a steep power law (with Zipf's own, or with looser transitions,
nothing beyond the unigram was learnt in so few steps). The text does not show classes; a network must learn which
tokens belong to one. Texts never repeat, and all arms see the same ones. The figure is the gap between the NELBO of
other texts and their exact entropy, nats per token, beside the gap of the unigram law: what there is to learn.

Arms: the adaptive warp, the warp alone, uniform t.
"""

import argparse
import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from common import in_parallel, paired, record
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.config import OptimiserConfig, TrainingConfig
from catmaps.flow.adaptive import InformationClock
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import interpolate
from catmaps.flow.likelihood import nelbo
from catmaps.flow.losses import endpoint_cross_entropy
from catmaps.flow.times import stratified, uniform, warp
from catmaps.model import build_network, compile_blocks, configure
from catmaps.network.denoiser import NetworkConfig
from catmaps.training.optim import build_optimisers, rate, set_rate

ARMS = ("adaptive", "warp", "uniform")
BATCH, LENGTH, WINDOWS = 16, 32, 128
OPTIMISER = OptimiserConfig(lr=9e-3, warmup=20, ema=0.98)


@dataclass(frozen=True)
class Source:
    """Token c * size + i is the i-th of class c: the chain's transition and stationary law, and the law of i."""

    transition: Float[Tensor, "c c"]
    stationary: Float[Tensor, "c"]
    within: Float[Tensor, "size"]

    @classmethod
    def drawn(cls, classes: int, size: int, seed: int) -> "Source":
        """An irreducible chain with one or two likely followers of each class."""
        rows = np.random.default_rng(seed).dirichlet(np.full(classes, 0.01), size=classes)
        transition = torch.from_numpy(0.98 * rows + 0.02 / classes)
        stationary = torch.linalg.matrix_power(transition, 4096)[0]
        within = torch.arange(1, size + 1, dtype=torch.float64).pow(-1.5)
        return cls(transition, stationary / stationary.sum(), within / within.sum())

    @property
    def log_prior(self) -> Float[Tensor, "v"]:
        return torch.outer(self.stationary, self.within).log().flatten().float()

    def entropy(self, length: int) -> float:
        """Of a text of so many tokens, nats per token."""
        rate = (self.stationary * torch.special.entr(self.transition).sum(1)).sum()
        first, within = torch.special.entr(self.stationary).sum(), torch.special.entr(self.within).sum()
        return ((first + (length - 1) * rate) / length + within).item()

    @property
    def unigram_entropy(self) -> float:
        return torch.special.entr(self.log_prior.double().exp()).sum().item()

    def texts(self, number: int, length: int, draw: torch.Generator) -> Int[Tensor, "{number} {length}"]:
        state, classes = torch.multinomial(self.stationary, number, True, generator=draw), []
        for _ in range(length):
            classes.append(state)
            state = torch.multinomial(self.transition[state], 1, generator=draw)[:, 0]
        place = torch.multinomial(self.within, number * length, True, generator=draw).view(number, length)
        return torch.stack(classes, 1) * len(self.within) + place


class Job(NamedTuple):
    arm: str
    seed: int
    steps: int
    classes: int
    size: int


def gap(job: Job) -> dict[str, float]:
    """Trains an arm and measures the average of its weights: the gap to the entropy and its standard error."""
    source = Source.drawn(job.classes, job.size, job.seed)
    torch.manual_seed(job.seed)
    network = build_network(NetworkConfig(width=64, blocks=2, heads=2, neighbours=3), source.log_prior)
    configure(network, TrainingConfig(precision="bf16"))
    average = copy.deepcopy(network)
    compile_blocks(network)
    optimisers, draw = build_optimisers(network, OPTIMISER), torch.Generator().manual_seed(1000 + job.seed)
    clock = InformationClock(uniform() if job.arm == "uniform" else warp(network.vocab_size))
    flow_map = FlowMap(network)
    weight = torch.full((BATCH, LENGTH), 1 / (BATCH * LENGTH))
    for step in range(1, job.steps + 1):
        tokens = source.texts(BATCH, LENGTH, draw)
        law = clock.law if job.arm == "adaptive" else clock.clock
        t = law.quantile(stratified(BATCH, draw))
        state = interpolate(tokens, flow_map.noise((job.seed, step), torch.arange(BATCH), LENGTH), t[:, None])
        loss = endpoint_cross_entropy(flow_map, state, t[:, None], tokens, weight)
        loss.total.backward()
        assert loss.squared_error is not None
        clock.update(clock.contributions(t, loss.squared_error.mean(1)), step)
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMISER.clip)
        set_rate(optimisers, rate(step, job.steps, OPTIMISER))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():
            decay = min(OPTIMISER.ema, step / (step + 9))
            for mean, own in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(own, 1 - decay)
        network.forget_casts()
    network.load_state_dict(average.state_dict())
    network.forget_casts()
    others = source.texts(WINDOWS, LENGTH, torch.Generator().manual_seed(2000 + job.seed))
    generator = torch.Generator().manual_seed(0)  # the same noise for every arm
    bounds = [
        nelbo(flow_map, some, warp(network.vocab_size), num_samples=32, generator=generator).nats
        for some in others.split(BATCH)
    ]
    nats = torch.cat(bounds) / LENGTH
    gap = nats.mean().item() - source.entropy(LENGTH)
    return {"gap": gap, "stderr": nats.std().item() / math.sqrt(WINDOWS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--size", type=int, default=2048, help="of a class; the vocabulary is classes x size")
    parser.add_argument("--steps", type=int, default=500, help="of 16 texts of 32 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of source, texts and network")
    parser.add_argument("--workers", type=int, default=2, help="one-core processes")
    options = parser.parse_args()
    jobs = [Job(arm, seed, options.steps, options.classes, options.size) for seed in options.seeds for arm in ARMS]
    found = dict(zip(jobs, in_parallel(gap, jobs, options.workers), strict=True))
    of_arm = {arm: {job.seed: row["gap"] for job, row in found.items() if job.arm == arm} for arm in ARMS}
    for arm, gaps in of_arm.items():
        mean, beside, error = paired(gaps, of_arm[ARMS[0]])
        print(f"{arm:9} gap {mean:.3f}  {beside:+.3f} +- {error:.3f} nats/token")
    sources = {seed: Source.drawn(options.classes, options.size, seed) for seed in options.seeds}
    entropy = {seed: source.entropy(LENGTH) for seed, source in sources.items()}
    unigram = {seed: source.unigram_entropy for seed, source in sources.items()}
    for seed in options.seeds:
        print(f"seed {seed}: entropy {entropy[seed]:.3f}, unigram's {unigram[seed]:.3f} nats/token")
    rows = [{**job._asdict(), **row} for job, row in found.items()]
    print(record("clock_source", {"entropy": entropy, "unigram": unigram, "rows": rows}))


if __name__ == "__main__":
    main()
