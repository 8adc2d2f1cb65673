"""One measurement, in a process of its own: `python -m catmaps.benchmarks.case '{"work": "base", ...}'`.

Prints JSON: seconds of every repeat after warm-up, and memory: resident when idle (weights, optimiser, the runtime) and
the peak above that during a repeat.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from catmaps.allocator import hand_back_freed_memory, keep_freed_memory
from catmaps.benchmarks import dense
from catmaps.config import TrainingConfig
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import interpolate
from catmaps.flow.likelihood import nelbo
from catmaps.flow.losses import OFF_DIAGONAL, anchor, endpoint_cross_entropy, soft_cross_entropy
from catmaps.flow.samplers import SAMPLERS, sample
from catmaps.flow.times import Pair, grid, uniform
from catmaps.model import build_network, compile_blocks, configure
from catmaps.network.denoiser import FlowNetwork, NetworkConfig

CALLS, DRAWS = 4, 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    work: str
    """base, soft, anchor, psd, lsd, lsd_kl, esd, ecld (a training step, AdamW), sample (4 calls), score (2 draws)."""
    code: Literal["catmaps", "dense"] = "catmaps"
    input: Literal["belief", "linear"] = "linear"
    vocabulary: int = 50_257
    length: int = 128
    batch: int = 8
    width: int = 256
    blocks: int = 4
    heads: int = 4
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    tile_megabytes: int = 25
    threads: int = 2
    repeats: int = 5
    clock: Literal["wall", "cpu"] = "wall"
    """Seconds of what: cpu is the processor's own, of all threads, which other jobs disturb less."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Matrix products of one repeat as plain mathematics needs them: nothing recomputed, no noise, no optimiser.

        A training step is a forward and a backward pass of twice its size; losses off the diagonal add their targets'
        forward passes. `linear` looks tokens up, `belief` multiplies by its table.
        """
        trunk = self.blocks * (24 * self.width**2 + 4 * self.length * self.width)
        table = 2 * self.vocabulary * self.width
        forward = self.tokens * (trunk + table + (table if self.input == "belief" else 0))
        passes = {"sample": CALLS, "score": DRAWS + 2, "base": 3, "soft": 4, "lsd": 7, "ecld": 7, "lsd_kl": 6, "esd": 6}
        return float(forward * passes.get(self.work, 5))


def measure(case: Case) -> dict[str, Any]:
    """Runs a case in this process."""
    repeat, clock = prepared(case), CLOCKS[case.clock]
    hand_back_freed_memory()
    idle = _resident("VmRSS")
    _forget_peak()
    seconds = []
    for _ in range(case.repeats):
        began = clock()
        repeat()
        seconds.append(clock() - began)
    memory = {"idle_bytes": idle, "peak_bytes": max(0, _resident("VmHWM") - idle)}
    return {**asdict(case), "seconds": seconds, **memory, "tokens": case.tokens, "flops": case.flops}


def prepared(case: Case) -> Callable[[], object]:
    """What a repeat does, warmed up: compiled, and its memory gathered."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    if case.code == "catmaps":
        keep_freed_memory()  # as the commands do
    repeat = (_dense if case.code == "dense" else _ours)(case)
    for _ in range(3):
        repeat()
    return repeat


def _resident(name: str) -> int:
    """Resident memory in bytes: VmRSS now, VmHWM the most since `_forget_peak`; Linux alone keeps them so."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _forget_peak() -> None:
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def _trained(
    loss: Callable[[], Tensor], parameters: list[Tensor], after: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    """A training step: backward, fused AdamW, and what comes after it."""
    optimiser = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        after()

    return step


def _dense(case: Case) -> Callable[[], object]:
    network = dense.DenseNetwork(case.vocabulary, case.width, case.blocks, case.heads)
    tokens = torch.randint(case.vocabulary, (case.batch, case.length))
    if case.work == "sample":
        return lambda: dense.sample(network, case.batch, case.length, CALLS)
    if case.work == "score":
        return lambda: dense.bound(network, tokens, DRAWS + 2)
    loss = {"base": dense.base_loss, "ecld": dense.ecld_loss}[case.work]
    return _trained(lambda: loss(network, tokens), list(network.parameters()))


def _network(case: Case) -> FlowNetwork:
    shape = {"width": case.width, "blocks": case.blocks, "heads": case.heads}
    config = NetworkConfig(input=case.input, skip=case.input == "belief", **shape)
    network = build_network(config, torch.zeros(case.vocabulary).log_softmax(-1))
    configure(network, TrainingConfig(precision=case.precision, tile_megabytes=case.tile_megabytes))
    if case.compile:
        compile_blocks(network)
    return network


def _ours(case: Case) -> Callable[[], object]:
    network, tokens = _network(case), torch.randint(case.vocabulary, (case.batch, case.length))
    flow_map = FlowMap(network)
    if case.work in ("sample", "score"):
        network.requires_grad_(False)
        generator, law = torch.Generator().manual_seed(0), uniform()
        if case.work == "score":
            return lambda: nelbo(flow_map, tokens, law, num_samples=DRAWS, generator=generator)
        shape, times = (case.batch, case.length, case.vocabulary), grid(law, CALLS)
        return lambda: sample(flow_map, SAMPLERS["flow_map"], times, shape, generator=generator)
    teacher = FlowMap(_network(case).requires_grad_(False))
    if network.projects and case.work != "base":  # as in training: both look at noise through one table
        teacher.denoiser.load_state_dict(network.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        network.embedding.table.weight.requires_grad_(False)
    weight, step = torch.full((case.batch, case.length), 1 / case.tokens), iter(range(10**9))

    def loss() -> Tensor:
        s = 0.5 * torch.rand(case.batch, 1)
        pair = Pair(s, s + 0.2, s + 0.4)
        state = interpolate(tokens, flow_map.noise((0, next(step)), torch.arange(case.batch), case.length), s)
        if case.work == "base":
            return endpoint_cross_entropy(flow_map, state, s, tokens, weight).total
        if case.work == "soft":
            return soft_cross_entropy(flow_map, teacher, state, s, weight).total
        work = anchor if case.work == "anchor" else OFF_DIAGONAL[case.work]
        return work(flow_map, flow_map if case.work == "psd" else teacher, state, pair, weight).total

    return _trained(loss, list(network.parameters()), network.forget_casts)


def peak_flops(
    threads: int, precision: Literal["bf16", "fp32"] = "bf16", size: int = 2048, clock: str = "wall"
) -> float:
    """FLOP/s of a large matrix product on this machine, the best of several."""
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(8):
        began = CLOCKS[clock]()
        torch.mm(a, b)
        best = min(best, CLOCKS[clock]() - began)
    return 2 * size**3 / best


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given.get("work") == "peak":
        how = {"threads": given["threads"], "clock": given["clock"]}
        print(json.dumps({name: peak_flops(precision=name, **how) for name in ("bf16", "fp32")}))
    elif "profile" in given:
        from catmaps.benchmarks.profile import profile  # which imports this module

        print(json.dumps(profile(Case(**given["profile"]))))
    else:
        print(json.dumps(measure(Case(**given))))
