"""Trains a run's folder from its configuration: base, joint, distilled or baseline, one process or many."""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from catmaps.config import Config, flat, to_json
from catmaps.errors import UserError
from catmaps.model import (
    CHECKPOINTS,
    CONFIG,
    TEACHER,
    best_device,
    compile_blocks,
    configure,
    load_run,
    load_weights,
    network_of,
    read_config,
    read_law,
    starting_law,
    write_law,
    write_tensors,
)
from catmaps.network.denoiser import FlowNetwork, smoothed_log_prior
from catmaps.network.tokens import Network
from catmaps.text import tokenizers
from catmaps.text.build import ensure_embedded
from catmaps.text.manifest import MANIFEST_FILE, load_manifest
from catmaps.text.shards import sequences, token_counts, verify
from catmaps.training import tracking

BEGUN = ".begun"  # while a folder is being made
START_LAW = "start_clock.safetensors"
EXTRA = "training needs the engine: pip install 'catmaps[train]'"


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    folder: Path
    step: int
    steps: int
    stopped_by: str | None

    @property
    def complete(self) -> bool:
        return self.step >= self.steps


def cache_folder() -> Path:
    """Where shards of the embedded corpus are kept: $CATMAPS_CACHE, or ~/.cache/catmaps."""
    return Path(os.environ.get("CATMAPS_CACHE", Path.home() / ".cache" / "catmaps"))


def find_shards(config: Config) -> Path:
    """The run's shard directory; those of the embedded corpus are built at first use."""
    if config.data.shards is None:
        return ensure_embedded(cache_folder(), config.data.tokenizer)
    verify(Path(config.data.shards), hashes=False)
    return Path(config.data.shards)


def start(config: Config, folder: Path) -> Config:
    """Makes the folder of a new run, with its configuration, tokenizer, data manifest and, if distilled, teacher.

    Raises:
        UserError: The folder exists or cannot be made, data and base do not fit, or a tracker is not installed.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not empty; continue it with --resume {folder}, or choose another --out"
        )
    if config.published is not None:
        raise UserError(f"run {config.base} was imported: its network is sampled and scored, but not trained")
    tracking.require(config.tracking)
    shards = find_shards(config)
    verify(shards)  # hashes too, once: a damaged shard is better found now than as a strange loss
    tokenizer = tokenizers.load(shards)
    length = config.data.length
    if load_manifest(shards).split("train").tokens < config.training.batch * length:
        raise UserError(f"{shards}: the train split is shorter than one batch; lower training.batch or data.length")
    # Whole: a missing or damaged part is better found before the folder exists.
    base = None if config.base is None else load_run(Path(config.base))
    if base is not None and base.tokenizer.token_strings() != tokenizer.token_strings():
        raise UserError(f"the vocabulary of {shards} is not that of {config.base}; use the data it was trained on")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); choose another --out") from error
    (folder / BEGUN).touch()
    tokenizers.save(tokenizer, folder)
    shutil.copy(shards / MANIFEST_FILE, folder / MANIFEST_FILE)
    if base is None:
        write_law(starting_law(config.clock, tokenizer.vocab_size), folder / START_LAW)
    else:
        write_tensors(base.network.state_dict(), folder / TEACHER)
        write_law(base.law, folder / START_LAW)
    draft = folder / f".{CONFIG}.draft"  # other processes wait for the finished file
    draft.write_text(to_json(config), encoding="utf-8")
    os.replace(draft, folder / CONFIG)
    (folder / BEGUN).unlink()
    return config


def restart(config: Config, folder: Path) -> Config:
    """As `start`, but a run that was begun with the same configuration is left as it is, to be gone on with.

    Raises:
        UserError: As `start`; or the folder's run has another configuration: names the first field that differs.
    """
    if not (folder / CONFIG).is_file():
        if (folder / BEGUN).is_file():  # `start` was killed in a folder that had been empty
            shutil.rmtree(folder)
        return start(config, folder)
    begun = read_config(folder)
    own, other = flat(config), flat(begun)
    for name in own:
        if own[name] != other[name]:
            raise UserError(
                f"{folder} was begun with {name} {other[name]}, not {own[name]}: use the same options or another --out"
            )
    return begun


def _networks(config: Config, folder: Path, shards: Path) -> tuple[Network, Network, Network | None]:
    """(in training, moving average, teacher), all alike at the start; initialised from the run's seed."""
    from catmaps.training.parallelize import device_mesh, sharded_networks

    torch.manual_seed(config.training.seed)
    log_prior = smoothed_log_prior(torch.from_numpy(token_counts(shards)).double())
    mesh = device_mesh(config.parallel, best_device())
    if mesh is not None:
        return sharded_networks(config, log_prior, folder / TEACHER if config.base else None, mesh)
    network, average = (network_of(config, log_prior) for _ in range(2))
    teacher = None
    if config.base is not None:
        teacher = network_of(config, log_prior)
        load_weights(teacher, folder / TEACHER)
        network.load_state_dict(teacher.state_dict())
        if isinstance(network, FlowNetwork) and network.projects:
            # Noise is drawn as the input table sees it: student and teacher must look through the same one.
            network.embedding.table.weight.requires_grad_(False)
    average.load_state_dict(network.state_dict())
    for net in (network, average, teacher):
        if net is None:
            continue
        net.to(best_device())
        configure(net, config.training, config.parallel)
        if config.training.compile:
            compile_blocks(net)
    return network, average, teacher


def _loader(config: Config, shards: Path) -> Any:
    """The engine's loader over raw token shards: order by seed and epoch, free of the number of processes."""
    from olmo_core.data import DataCollator, TokenizerConfig
    from olmo_core.data.composable import (
        ComposableDataLoader,
        ConcatAndChunkInstanceSourceConfig,
        NumpyDocumentSourceConfig,
    )
    from olmo_core.data.types import NumpyDatasetDType
    from olmo_core.distributed.utils import get_rank, get_world_size

    manifest, world = load_manifest(shards), get_world_size()
    if config.training.batch % world:
        raise UserError(f"training.batch {config.training.batch} is not a multiple of the {world} processes")
    # The engine wants an end-of-text id; alphabets without one get an id that never occurs.
    eos = manifest.vocab_size if manifest.eos_id is None else manifest.eos_id
    tokenizer = TokenizerConfig(vocab_size=manifest.vocab_size, eos_token_id=eos, pad_token_id=0)
    source = NumpyDocumentSourceConfig(
        source_paths=[str(shards / shard.file) for shard in manifest.split("train").shards],
        tokenizer=tokenizer,
        dtype=NumpyDatasetDType(manifest.dtype),
    )
    work = str(cache_folder() / "engine")
    instances = ConcatAndChunkInstanceSourceConfig(sources=[source], sequence_length=config.data.length)
    return ComposableDataLoader(
        instances.build(work_dir=work),
        collator=DataCollator(pad_token_id=0),
        tokenizer=tokenizer,
        work_dir=work,
        global_batch_size=config.training.batch * config.data.length,
        seed=config.training.seed,
        dp_world_size=world,
        dp_rank=get_rank(),
        num_threads=0,
        display_source_visualization=False,
    )


def train(folder: Path, *, stop_after: int | None = None) -> Outcome:
    """Runs the configuration in `folder` to its end, from its last checkpoint if there is one.

    SIGINT and SIGTERM save and end it; it can then be resumed.

    Args:
        folder: Made by `start`.
        stop_after: Saves and ends after this step, as a signal would.
    """
    for name in ("olmo_core", "torch.distributed.checkpoint"):  # before the import, which talks as well
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised, too
    try:
        import olmo_core.train  # noqa: F401
    except ImportError as error:
        raise UserError(EXTRA) from error
    from catmaps.training.processes import join_processes, losing_peers

    config = read_config(folder)
    tracking.require(config.tracking)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    with losing_peers(folder):
        join_processes(config.parallel.timeout)
        return _fit(config, folder, stop_after)


def _fit(config: Config, folder: Path, stop_after: int | None) -> Outcome:
    from olmo_core.distributed.utils import get_rank, get_world_size
    from olmo_core.train import Duration, TrainerConfig

    from catmaps.training.callbacks import MetricsCallback, StragglerCallback, TrackingCallback, record
    from catmaps.training.checkpoints import CheckpointCallback, Checkpointer, verify_latest
    from catmaps.training.module import FlowTrainModule

    training = config.training
    shards = find_shards(config)
    latest = verify_latest(folder / CHECKPOINTS)
    module = FlowTrainModule(config, *_networks(config, folder, shards), read_law(folder / START_LAW))
    module.source = folder / CHECKPOINTS / f"step{latest}"
    tracked = TrackingCallback(config=config, folder=folder)
    metrics = MetricsCallback(folder=folder, tracking=tracked)
    trainer = TrainerConfig(
        save_folder=str(folder / CHECKPOINTS),
        work_dir=str(folder / CHECKPOINTS / "work"),
        save_overwrite=True,
        max_duration=Duration.steps(training.steps),
        hard_stop=None if stop_after is None else Duration.steps(stop_after),
        metrics_collect_interval=training.log_every,
        cancel_check_interval=1,
        async_bookkeeping=False,  # asynchronous, a signal may stop processes at different steps, which then hang
        callbacks={
            "checkpointer": CheckpointCallback(folder, config),
            "metrics": metrics,
            "tracking": tracked,
            "stragglers": StragglerCallback(folder=folder),
            "validation": _validation(config, shards, metrics),
        },
    ).build(module, _loader(config, shards))
    trainer.checkpointer = Checkpointer(work_dir=folder / CHECKPOINTS / "work", save_overwrite=True)
    if latest is not None and latest < training.steps and get_rank() == 0:
        record(folder, latest, "resumed", processes=get_world_size())
    trainer.fit()
    reason = trainer._cancel_reason if trainer.global_step < training.steps else None
    if dist.is_initialized():
        dist.barrier()
    return Outcome(folder, trainer.global_step, training.steps, reason)


def _validation(config: Config, shards: Path, metrics: Any) -> Any:
    from catmaps.training.callbacks import ValidationCallback

    manifest, training = load_manifest(shards), config.training
    if "valid" not in manifest.splits or training.evaluate_every == 0:
        return ValidationCallback(every=0, metrics=metrics)
    valid = manifest.split("valid")
    tokens = sequences(shards, "valid", config.data.length)
    tokens = tokens[:: max(1, len(tokens) // training.evaluate_sequences)][: training.evaluate_sequences]
    return ValidationCallback(
        tokens=torch.from_numpy(tokens),
        every=training.evaluate_every,
        characters_per_token=valid.characters / valid.tokens,
        metrics=metrics,
    )
