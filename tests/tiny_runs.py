"""Runs of a second or two for tests: a corpus of a few thousand letters, and networks of a few thousand weights."""

import gc
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from catmaps.config import Config, DataConfig, OptimiserConfig, TrainingConfig
from catmaps.flow.objective import ObjectiveConfig
from catmaps.model import CLOCK, METRICS, MODEL
from catmaps.network.denoiser import NetworkConfig
from catmaps.text.build import build_shards
from catmaps.text.corpus import Document
from catmaps.text.tokenizers import Text8Tokenizer, Tokenizer
from catmaps.training.train import start, train

LENGTH = 16
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "red", "fish", "in", "blue", "water")
KINDS = ("base", "muon", "psd", "average", "lsd", "lsd_kl", "esd", "ecld")
TIMES = ("seconds", "cpu_seconds")


def words(seed: int, count: int) -> str:
    """Random words, the same for the same seed."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def make_shards(folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Shards of about 2,400 letters of training text, 9 batches of 16 sequences, and some for the other splits."""
    splits = ["train"] * 10 + ["valid"] * 3 + ["test"] * 3
    documents = [Document(str(i), "tests", str(i), words(i, 60), split) for i, split in enumerate(splits)]
    build_shards(documents, tokenizer or Text8Tokenizer(), folder, progress=False)
    return folder


def tiny(shards: Path, *, steps: int = 20, seed: int = 0, optimiser: Literal["adamw", "muon"] = "adamw") -> Config:
    """One block of width 16 in fp32, batches of 16 sequences of 16 letters, every step on record."""
    return Config(
        data=DataConfig(shards=str(shards), length=LENGTH),
        network=NetworkConfig(width=16, blocks=1, heads=2, conditioning=8, mlp_ratio=2),
        optimiser=OptimiserConfig(name=optimiser, warmup=4, ema=0.9),
        training=TrainingConfig(
            steps=steps,
            batch=16,
            micro_batch=16,
            seed=seed,
            precision="fp32",
            compile=False,
            threads=1,
            save_every=100,
            log_every=1,
            evaluate_every=0,
            evaluate_sequences=8,
        ),
    )


def distilled(base: Path, config: Config, loss: Any = "psd") -> Config:
    """The same, distilled from the run `base`, with rows of every role in each batch."""
    return replace(config, base=str(base), objective=ObjectiveConfig(loss=loss, off_diagonal=0.5))


def tiny_kind(kind: str, shards: Path, base: Path) -> Config:
    """A "base" under AdamW, one under "muon" (which rounds to bf16 inside), or distilled with that loss, or by PSD with
    jumps of the "average"."""
    if kind == "muon":
        return tiny(shards, optimiser="muon")
    if kind == "average":
        config = distilled(base, tiny(shards))
        return replace(config, objective=replace(config.objective, jumps="average"))
    return tiny(shards) if kind == "base" else distilled(base, tiny(shards), kind)


def began(config: Config, folder: Path) -> Path:
    start(config, folder)
    return folder


def trained(config: Config, folder: Path) -> Path:
    start(config, folder)
    assert train(folder).complete
    return folder


class Job(NamedTuple):
    """One call of `train` in some process."""

    folder: Path
    stop_after: int | None = None
    signal_at: int | None = None
    """The last process gets a SIGTERM in this step."""


def train_on_record(*jobs: Job) -> None:
    """Trains; each process leaves its batches in batches-RANK.npy, (steps, rows, L), and how it ended in ended-RANK."""
    from olmo_core.distributed.utils import get_rank, get_world_size

    from catmaps.training.module import FlowTrainModule

    gc.freeze()  # the engine collects after every run: half a second for what the imports made
    train_batch = FlowTrainModule.train_batch
    for job in jobs:
        seen: list[np.ndarray] = []

        def recording(module: FlowTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
            if not dry_run:
                seen.append(batch["input_ids"].numpy().copy())  # noqa: B023
                if len(seen) == job.signal_at and get_rank() == get_world_size() - 1:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGTERM)
            train_batch(module, batch, dry_run)

        with patch.object(FlowTrainModule, "train_batch", recording):
            outcome = train(job.folder, stop_after=job.stop_after)
        np.save(job.folder / f"batches-{get_rank()}.npy", np.stack(seen))
        (job.folder / f"ended-{get_rank()}").write_text(f"{outcome.step} {outcome.stopped_by}")


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without its clocks."""
    lines = (folder / METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def losses(folder: Path) -> np.ndarray:
    """The losses of every step."""
    return np.array([row["loss"] for row in rows(folder) if "loss" in row])


def saved(folder: Path) -> dict[str, bytes]:
    """What a run leaves for others, to the bit: the averaged weights and the law of time."""
    return {name: (folder / name).read_bytes() for name in (MODEL, CLOCK)}


def state(folder: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint: weights, their average, the clock's histogram, the optimisers' moments."""
    from olmo_core.distributed.checkpoint import get_checkpoint_metadata, load_state_dict
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = folder / "checkpoints" / f"step{step}" / "model_and_optim"
    stored = get_checkpoint_metadata(str(folder)).state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if isinstance(about, TensorStorageMetadata)
    }
    load_state_dict(str(folder), tensors)
    return tensors


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / MODEL)
