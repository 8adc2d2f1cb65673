"""Do losses depend on how many processes train, and on what they share? 1, 2 and 4, each strategy, each loss.

One thread a process, the same seed and global batch, fp32, on the embedded corpus; some micro-batches lack roles on one
process or another. The bar: losses of 20 steps agree to 1e-5 relative with those of one process.
"""

import argparse
import json
import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from common import record
from torch.multiprocessing.spawn import spawn

from catmaps.config import Config, ParallelConfig
from catmaps.model import METRICS
from catmaps.network.denoiser import NetworkConfig
from catmaps.presets import DISTILLATIONS, tiny
from catmaps.training.train import start, train

STEPS, BAR = 20, 1e-5
KINDS = ("base", "psd", "lsd", "esd", "ecld")
WORLDS: tuple[tuple[int, ParallelConfig], ...] = (
    (1, ParallelConfig()),
    (2, ParallelConfig()),
    (2, ParallelConfig(strategy="fsdp")),
    (4, ParallelConfig()),
    (4, ParallelConfig(strategy="fsdp", checkpoint_activations=True)),
    (4, ParallelConfig(strategy="hsdp", shard_degree=2)),
)


def config_of(kind: str, base: Path, parallel: ParallelConfig) -> Config:
    plain = tiny()
    training = replace(
        plain.training,
        steps=STEPS,
        batch=32,
        micro_batch=4,
        log_every=1,
        evaluate_every=0,
        precision="fp32",
        compile=False,
        threads=1,
    )
    config = replace(
        plain,
        data=replace(plain.data, length=32),
        network=NetworkConfig(width=32, blocks=2, heads=2),
        optimiser=replace(plain.optimiser, name="adamw"),
        training=training,
        parallel=parallel,
    )
    if kind == "base":
        return config
    distilled = replace(DISTILLATIONS["distill"](config), base=str(base), training=training)
    adamw = replace(distilled.optimiser, name="adamw", warmup=4)
    return replace(distilled, objective=replace(distilled.objective, loss=kind), optimiser=adamw)  # pyright: ignore


def work(rank: int, processes: int, port: int, folders: list[Path]) -> None:
    """Trains runs one after another, as one of the processes."""
    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK", "FS_LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(processes)
    os.environ |= {"NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for folder in folders:
        train(folder)
    dist.destroy_process_group()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [row["loss"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    torch.set_num_threads(1)
    base, began, deviations = options.out / "1-ddp" / "base", time.monotonic(), {}
    for processes, parallel in WORLDS:
        place = options.out / f"{processes}-{parallel.strategy}"
        if processes == 1:
            for kind in KINDS:
                start(config_of(kind, base, parallel), place / kind)
                train(place / kind)
            continue
        folders = [place / kind for kind in KINDS]
        for kind, folder in zip(KINDS, folders, strict=True):
            start(config_of(kind, base, parallel), folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(work, (processes, port, folders), nprocs=processes)
        for kind, folder in zip(KINDS, folders, strict=True):
            alone = losses(options.out / "1-ddp" / kind)
            pairs = list(zip(losses(folder), alone, strict=True))
            deviations[f"{place.name} {kind}"] = max(abs(ours - one) / abs(one) for ours, one in pairs)
            print(place.name, kind, f"{deviations[f'{place.name} {kind}']:.1e}", flush=True)
    within = all(deviation <= BAR for deviation in deviations.values())
    figures = {"steps": STEPS, "largest_relative_deviation": deviations, "bar": BAR, "within": within}
    print(record("processes", {**figures, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
