"""Does a run that is killed again and again end where an undisturbed one ends?

Processes of a tiny training die by SIGKILL at random moments: between two steps, while a checkpoint is written, while
they start and load. The others notice, end, and all are started again, as torchrun does, until the run is complete.
Then the hash of every batch that any life has seen, the losses on record and the final weights are compared with those
of a run that nobody disturbed. Data come from the embedded corpus.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import record

from catmaps.config import Config, ParallelConfig
from catmaps.errors import UserError
from catmaps.model import CHECKPOINTS, CLOCK, METRICS, MODEL
from catmaps.presets import tiny
from catmaps.training.checkpoints import FINISHED, complete
from catmaps.training.module import FlowTrainModule
from catmaps.training.train import start, train

FORK = multiprocessing.get_context("fork")  # everything is imported already: a life starts in a moment
MOMENTS = ("step", "step", "checkpoint", "checkpoint", "start")


def config_of(options: argparse.Namespace) -> Config:
    base = tiny()
    training = replace(
        base.training,
        steps=options.steps,
        batch=8,
        micro_batch=4,
        save_every=options.save_every,
        log_every=1,
        evaluate_every=0,
        compile=False,
        threads=1,
    )
    strategy = ParallelConfig(strategy=options.strategy, timeout=60)
    return replace(base, data=replace(base.data, length=32), training=training, parallel=strategy)


def live(folder: Path, rank: int, processes: int, port: int) -> None:
    """One process's life: trains on, and notes the hash of every batch that it sees."""
    for name in ("RANK", "LOCAL_RANK", "FS_LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(processes)
    os.environ |= {"NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = (folder / f"stderr-{rank}").open("a")
    train_batch = FlowTrainModule.train_batch
    seen = (folder / f"batches-{rank}").open("a")

    def noting(module: FlowTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
        if not dry_run:
            digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
            seen.write(f"{module.trainer.global_step} {digest}\n")
            seen.flush()
        train_batch(module, batch, dry_run)

    try:
        with patch.object(FlowTrainModule, "train_batch", noting):
            train(folder)
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(2)
    os._exit(0)


def begin(folder: Path, processes: int) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    born = [FORK.Process(target=live, args=(folder, rank, processes, port)) for rank in range(processes)]
    for process in born:
        process.start()
    return born


def step_of(folder: Path) -> int:
    """The last step that process 0 has begun, in any life."""
    file = folder / "batches-0"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(lines[-1].split()[0]) if lines else 0


def unfinished(folder: Path) -> list[str]:
    """Checkpoints that are being written."""
    found = (folder / CHECKPOINTS).glob("step*") if (folder / CHECKPOINTS).is_dir() else ()
    return sorted(path.name for path in found if not (path / FINISHED).exists())


def wait_for(moment: str, folder: Path, born: list[Any], rng: random.Random) -> None:
    """Until a moment at which to kill, or until the run is over."""
    if moment == "start":
        time.sleep(rng.uniform(0, 1.5))
        return
    lines, left = count(folder), set(unfinished(folder))
    further = rng.randint(1, 12)
    while all(process.is_alive() for process in born):
        if moment == "step" and count(folder) >= lines + further:
            break
        if moment == "checkpoint" and set(unfinished(folder)) - left:
            break
        left &= set(unfinished(folder))
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))


def count(folder: Path) -> int:
    file = folder / "batches-0"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(moment: str, folder: Path, born: list[Any], rng: random.Random) -> dict[str, Any] | None:
    """Kills one process at such a moment, and waits for the others to give up; None if they were done before."""
    born_at = time.monotonic()
    wait_for(moment, folder, born, rng)
    victim = rng.randrange(len(born))
    if not born[victim].is_alive() or born[victim].pid is None:
        return None
    os.kill(born[victim].pid, signal.SIGKILL)
    began, written = time.monotonic(), unfinished(folder)
    helped = end(born)
    return {
        "moment": moment,
        "victim": victim,
        "at_step": step_of(folder),
        "being_written": written,
        "complete": [step for step, _ in complete(folder / CHECKPOINTS)],
        "others_ended_after": round(time.monotonic() - began, 2),
        "ended_by": helped,
        "exits": [process.exitcode for process in born],
        "seconds": round(time.monotonic() - born_at, 2),
    }


def end(born: list[Any]) -> str | None:
    """Waits until the others give up; who does not is ended as torchrun would. Says whether that was needed."""
    helped = None
    for patience, call in ((10, signal.SIGTERM), (30, signal.SIGKILL), (10, None)):
        until = time.monotonic() + patience
        for process in born:
            process.join(max(0.0, until - time.monotonic()))
        for process in born:
            if process.is_alive() and call is not None:
                os.kill(process.pid, call)
                helped = call.name
    assert not any(process.is_alive() for process in born)
    return helped


def hashes(folder: Path, processes: int) -> list[list[tuple[int, str]]]:
    """(step, hash) in the order seen, of every process."""
    files = [(folder / f"batches-{rank}").read_text().splitlines() for rank in range(processes)]
    return [[(int(line.split()[0]), line.split()[1]) for line in lines] for lines in files]


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def compare(killed: Path, whole: Path, processes: int) -> dict[str, Any]:
    """What the two runs have in common."""
    expected = [dict(seen) for seen in hashes(whole, processes)]
    lives = hashes(killed, processes)
    return {
        "batches_seen": [len(seen) for seen in lives],
        "batches_equal": all(
            own[step] == digest for own, seen in zip(expected, lives, strict=True) for step, digest in seen
        ),
        "every_step_seen": all(set(own) == dict(seen).keys() for own, seen in zip(expected, lives, strict=True)),
        "losses_equal": losses(killed) == losses(whole),
        "weights_equal": all((killed / n).read_bytes() == (whole / n).read_bytes() for n in (MODEL, CLOCK)),
        "model_sha256": hashlib.sha256((killed / MODEL).read_bytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="kills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.out, ignore_errors=True)
    whole, killed = options.out / "whole", options.out / "killed"
    began = time.monotonic()
    for folder in (whole, killed):
        start(config_of(options), folder)
    for process in (born := begin(whole, options.processes)):
        process.join()
    if any(process.exitcode for process in born):
        raise SystemExit(f"the undisturbed run failed, see {whole}/stderr-0")
    rng, log = random.Random(options.seed), []
    while len(log) < options.kills:
        moment = MOMENTS[len(log) % len(MOMENTS)]
        death = kill(moment, killed, begin(killed, options.processes), rng)
        if death is None:
            break
        log.append(death)
        print(len(log), death, flush=True)
    for process in (born := begin(killed, options.processes)):
        process.join()
    outcome = compare(killed, whole, options.processes)
    figures = {
        "kills": len(log),
        "during_writes": sum(bool(death["being_written"]) for death in log),
        **outcome,
        "seconds": round(time.monotonic() - began, 1),
        "log": log,
    }
    print({key: value for key, value in figures.items() if key != "log"})
    print(record(options.name, figures))
    equal = all(value for key, value in outcome.items() if key.endswith(("equal", "seen")))
    sys.exit(0 if equal and not any(process.exitcode for process in born) else 1)


if __name__ == "__main__":
    main()
