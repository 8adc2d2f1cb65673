"""Do two processes on a core each do twice the work of one?

Weak scaling: one training of two processes, a core and a micro-batch each, against two trainings of one process on
these two cores at the same time, so that caches and memory are shared alike. Rounds alternate, and the median of their
ratios counts: other jobs of the machine disturb both sides. The bar: at least 0.9.
"""

import argparse
import os
import socket
import statistics
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import record

from catmaps.config import ParallelConfig
from catmaps.flow.times import warp
from catmaps.model import configure, network_of
from catmaps.network.denoiser import uniform_log_prior
from catmaps.presets import small
from catmaps.training.module import FlowTrainModule
from catmaps.training.parallelize import device_mesh, sharded_networks
from catmaps.training.processes import join_processes

VOCABULARY, BAR = 27, 0.9


class Untold(FlowTrainModule):
    """Needs no trainer."""

    class _Trainer:
        global_step = 1

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._trainer: Any = self._Trainer()

    def record_metric(self, *args: Any, **kwargs: Any) -> None:
        """There is nobody to tell."""


def measure(rank: int, processes: int, port: int, strategy: Any, rows: int, steps: int, queue: Any, gate: Any) -> None:
    """Sequences a second of one process, after two steps to warm up; both begin at the gate."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        join_processes(600)
    config = small()
    training = replace(config.training, batch=rows * processes, micro_batch=rows, compile=False)
    config = replace(config, training=training, parallel=ParallelConfig(strategy=strategy if processes > 1 else "ddp"))
    prior, mesh = uniform_log_prior(VOCABULARY), device_mesh(config.parallel, torch.device("cpu"))
    if mesh is None:
        torch.manual_seed(0)
        nets = [network_of(config, prior) for _ in range(2)]
        for net in nets:
            configure(net, config.training)
        nets[1].load_state_dict(nets[0].state_dict())
    else:
        nets = list(sharded_networks(config, prior, Path(), mesh)[:2])
    module = Untold(config, *nets, None, warp(VOCABULARY))
    tokens = torch.randint(VOCABULARY, (rows, config.data.length), generator=torch.Generator().manual_seed(rank))
    for step in range(steps + 2):
        if step == 2:
            gate.wait()
            began = time.monotonic()
        module.zero_grads()
        module.train_batch({"input_ids": tokens})
        module.optim_step()
    queue.put(rows * steps / (time.monotonic() - began))


def throughput(together: bool, strategy: str, rows: int, steps: int) -> float:
    """Of two processes in one training, or in one each."""
    context = get_context("spawn")
    queue, gate = context.Queue(), context.Barrier(2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = 2 if together else 1
    args = [(rank, world, port, strategy, rows, steps, queue, gate) for rank in range(2)]
    born = [context.Process(target=measure, args=arg) for arg in args]
    for process in born:
        process.start()
    rates = [queue.get(timeout=600) for _ in born]
    for process in born:
        process.join()
    return sum(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32], help="sequences of a process and step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures: dict[str, Any] = {"steps": options.steps, "bar": BAR}
    cases = [(strategy, rows) for strategy in ("ddp", "fsdp") for rows in options.rows]
    for strategy, rows in cases:
        rounds = []
        for _ in range(options.rounds):
            apart = throughput(False, strategy, rows, options.steps)
            joined = throughput(True, strategy, rows, options.steps)
            rounds.append({"apart": round(apart, 2), "together": round(joined, 2), "ratio": round(joined / apart, 3)})
            print(strategy, rows, rounds[-1], flush=True)
        ratio = statistics.median(r["ratio"] for r in rounds)
        figures[f"{strategy}, {rows} sequences"] = {"ratio": ratio, "within": ratio >= BAR, "rounds": rounds}
    print(record("weak_scaling", figures))


if __name__ == "__main__":
    main()
