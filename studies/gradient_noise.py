"""How noisy is a batch's gradient under each law of time, of one and the same objective?

What training minimises is law x weight (docs/maths.md (b)): drawn from another law with weights that make up for it,
the objective stays the same and only the noise changes. For every vocabulary a small base is trained for a few steps
under the default warp. The objective is the base loss under the adaptive law: that which levels the bound's integrand,
measured on other texts. Figures, per law: the trace of the covariance of the gradient of batches of 32, times
stratified as in training, over that of the adaptive law itself; and the largest weight. Over the parameters as they
are, before any optimiser.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common import in_parallel, record
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.config import ClockConfig, Config, DataConfig, OptimiserConfig, TrainingConfig
from catmaps.flow.adaptive import InformationClock
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import interpolate
from catmaps.flow.losses import endpoint_cross_entropy
from catmaps.flow.times import Law, decoding_error, logit_normal, stratified, uniform, warp
from catmaps.model import load_run
from catmaps.network.denoiser import FlowNetwork, NetworkConfig
from catmaps.text.shards import sequences
from catmaps.training.train import find_shards, start, train

BATCH, LENGTH = 32, 64
CONSTANT = {"uniform": uniform, "logit_normal": logit_normal}
OF_VOCABULARY = {"decoding_error": decoding_error, "warp": warp}
ADAPTIVE = "adaptive"


class Job(NamedTuple):
    """One vocabulary."""

    tokenizer: str
    folder: Path
    steps: int
    batches: int
    seed: int


def small_base(job: Job) -> FlowNetwork:
    """Trained for a few steps, or taken from the folder."""
    config = Config(
        preset="gradient_noise",
        data=DataConfig(tokenizer=job.tokenizer, length=LENGTH),
        network=NetworkConfig(width=64, blocks=2, heads=2, neighbours=3),
        clock=ClockConfig(adaptive=False),
        optimiser=OptimiserConfig(warmup=10, ema=0.9),
        training=TrainingConfig(
            steps=job.steps, batch=BATCH, micro_batch=BATCH, seed=job.seed, threads=1, evaluate_every=0, compile=False
        ),
    )
    if not (job.folder / "config.json").exists():
        start(config, job.folder)
    train(job.folder)
    network = load_run(job.folder).network
    assert isinstance(network, FlowNetwork)
    return network.requires_grad_(True)


def gradient(network: FlowNetwork, loss: Tensor) -> Float[Tensor, "n"]:
    """Of all parameters that learn, as one vector in fp32."""
    weights = [p for p in network.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, parts, strict=True)])


def adaptive(network: FlowNetwork, tokens: Int[Tensor, "n l"], draw: torch.Generator) -> Law:
    """The law that levels the bound's integrand on these texts, times drawn on the warp."""
    law, flow_map = warp(network.vocab_size), FlowMap(network)
    clock = InformationClock(law, decay=1.0, patience=1.0)
    for some in tokens.split(BATCH):
        t = law.quantile(stratified(len(some), draw))
        noise = flow_map.random_noise(tuple(some.shape), draw)
        errors = endpoint_cross_entropy(
            flow_map, interpolate(some, noise, t[:, None]), t[:, None], some, torch.ones(some.shape)
        ).squared_error
        assert errors is not None
        clock.update(clock.contributions(t, errors.mean(1)), 1)
    clock.refresh()
    return clock.law


class Draws(NamedTuple):
    """Gradients of batches under a law, and the largest weight of a text."""

    gradients: Float[Tensor, "k n"]
    largest: float


def draws(network: FlowNetwork, tokens: Int[Tensor, "n l"], law: Law, wanted: Law, draw: torch.Generator) -> Draws:
    """Batches of the base loss under `wanted`, times drawn from `law` and weighted."""
    flow_map, found, largest = FlowMap(network), [], 0.0
    for some in tokens.split(BATCH):
        t = law.quantile(stratified(len(some), draw))
        ratio = wanted.density(t) / law.density(t)
        noise = flow_map.random_noise(tuple(some.shape), draw)
        state, weight = interpolate(some, noise, t[:, None]), (ratio / some.numel())[:, None].expand(some.shape)
        found.append(gradient(network, endpoint_cross_entropy(flow_map, state, t[:, None], some, weight).total))
        largest = max(largest, ratio.max().item())
    return Draws(torch.stack(found), largest)


def trace(vectors: Float[Tensor, "k n"]) -> Float[Tensor, "k"]:
    """Squared distances to the mean, each an unbiased draw of the covariance's trace."""
    k = len(vectors)
    return (vectors - vectors.mean(0)).double().square().sum(1) * k / (k - 1)


def measure(job: Job) -> dict[str, dict[str, float]]:
    """Figures by law."""
    network = small_base(job)
    tokens = torch.from_numpy(sequences(find_shards(load_run(job.folder).config), "train", LENGTH))
    draw = torch.Generator().manual_seed(1000 + job.seed)
    order, size = torch.randperm(len(tokens), generator=draw), job.batches * BATCH
    own, others = tokens[order[:size]].long(), tokens[order[size : 3 * size]].long()
    with torch.no_grad():
        wanted = adaptive(network, others, draw)
    laws = {ADAPTIVE: wanted} | {name: make() for name, make in CONSTANT.items()}
    laws |= {name: make(network.vocab_size) for name, make in OF_VOCABULARY.items()}
    found: dict[str, dict[str, float]] = {}
    best = torch.ones(1)
    for name, law in laws.items():
        again = torch.Generator().manual_seed(2000 + job.seed)  # the same places in every law
        gradients, largest = draws(network, own, law, wanted, again)
        traces = trace(gradients)
        best = traces if name == ADAPTIVE else best
        ratio, stderr = traces.mean() / best.mean(), 0.0
        if name != ADAPTIVE:  # the same texts: errors of paired draws
            stderr = ((traces - ratio * best).std() / best.mean() / math.sqrt(len(traces))).item()
        found[name] = {"noise": ratio.item(), "stderr": stderr, "largest_weight": largest}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizers", nargs="+", default=["text8", "bpe:512", "bpe:4096", "bpe:32768"])
    parser.add_argument("--out", type=Path, default=Path("runs/gradient-noise"))
    parser.add_argument("--steps", type=int, default=60, help="of training, under the warp, before gradients are taken")
    parser.add_argument("--batches", type=int, default=24, help="of 32 texts of 64 tokens, per law")
    parser.add_argument("--workers", type=int, default=2, help="one-core processes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    make = partial(Job, steps=options.steps, batches=options.batches)
    jobs = [
        make(name, options.out / f"{name.replace(':', '')}-{seed}", seed=seed)
        for name in options.tokenizers
        for seed in options.seeds
    ]
    rows = []
    for job, found in zip(jobs, in_parallel(measure, jobs, options.workers), strict=True):
        print(f"{job.tokenizer}, seed {job.seed}")
        for law, row in found.items():
            noisy = f"{row['noise']:7.3f} +- {row['stderr']:.3f}"
            print(f"  {law:16} noise {noisy}   largest weight {row['largest_weight']:.1f}")
            rows.append({"tokenizer": job.tokenizer, "seed": job.seed, "law": law, **row})
    print(record("gradient_noise", {"steps": options.steps, "batches": options.batches, "rows": rows}))


if __name__ == "__main__":
    main()
