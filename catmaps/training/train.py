"""Trains a run's folder from its configuration: base, joint, distilled or baseline, one process or many."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from catmaps.config import Config, DataConfig
from catmaps.errors import UserError
from catmaps.model import (
    CHECKPOINTS,
    START,
    TEACHER,
    best_device,
    compile_blocks,
    configure,
    load_weights,
    network_of,
    read_config,
    read_law,
)
from catmaps.network.denoiser import FlowNetwork, smoothed_log_prior
from catmaps.network.tokens import Network
from catmaps.text.shards import sequences
from catmaps.training import tracking
from catmaps.training.begin import BEGUN, START_LAW, quiet_engine, restart, start, with_steps, write_config
from catmaps.training.sources import (
    Source,
    cache_folder,
    check_same,
    damage,
    find_shards,
    find_sources,
    is_url,
    pooled,
    train_counts,
)

__all__ = [
    "BEGUN",
    "START_LAW",
    "Outcome",
    "cache_folder",
    "find_shards",
    "restart",
    "start",
    "train",
    "with_steps",
]

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


def _networks(config: Config, folder: Path, sources: tuple[Source, ...]) -> tuple[Network, Network, Network | None]:
    """(in training, moving average, teacher), all alike at the start: the source's, or drawn from the run's seed."""
    from catmaps.training.parallelize import device_mesh, sharded_networks

    torch.manual_seed(config.training.seed)
    log_prior = smoothed_log_prior(torch.from_numpy(train_counts(sources)))
    mesh = device_mesh(config.parallel, best_device())
    if mesh is not None:
        return sharded_networks(config, log_prior, folder, mesh)
    network, average = (network_of(config, log_prior) for _ in range(2))
    teacher = None
    if config.base is not None:
        teacher = network_of(config, log_prior)
        load_weights(teacher, folder / TEACHER)
        network.load_state_dict(teacher.state_dict())
        if isinstance(network, FlowNetwork) and network.projects:
            # Noise is drawn as the input table sees it: student and teacher must look through the same one.
            network.embedding.table.weight.requires_grad_(False)
    elif config.start is not None:
        load_weights(network, folder / START)
    average.load_state_dict(network.state_dict())
    for net in (network, average, teacher):
        if net is None:
            continue
        net.to(best_device())
        configure(net, config.training, config.parallel)
        if config.training.compile:
            compile_blocks(net)
    return network, average, teacher


def train(folder: Path, *, stop_after: int | None = None, data: DataConfig | None = None) -> Outcome:
    """Runs the configuration in `folder` to its end, from its last checkpoint if there is one.

    SIGINT and SIGTERM save and end it; it can then be resumed.

    Args:
        folder: Made by `start`.
        stop_after: Saves and ends after this step, as a signal would.
        data: Where the run's data lie now, if they were moved; kept in its configuration.
    """
    quiet_engine()
    try:
        import olmo_core.train  # noqa: F401
    except ImportError as error:
        raise UserError(EXTRA) from error
    from catmaps.training.processes import join_processes, losing_peers

    config = read_config(folder)
    if data is not None:
        config = replace(config, data=data)
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
    from catmaps.training.loader import make_loader
    from catmaps.training.module import FlowTrainModule

    training = config.training
    sources = _checked_sources(config, folder)
    latest = verify_latest(folder / CHECKPOINTS)
    module = FlowTrainModule(config, *_networks(config, folder, sources), read_law(folder / START_LAW))
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
            "validation": _validation(config, sources, metrics),
            "bins": _bins(config, sources, folder),
        },
    ).build(module, make_loader(config, sources))
    trainer.checkpointer = Checkpointer(work_dir=folder / CHECKPOINTS / "work", save_overwrite=True)
    if latest is not None and latest < training.steps and get_rank() == 0:
        record(folder, latest, "resumed", processes=get_world_size())
    trainer.fit()
    reason = trainer._cancel_reason if trainer.global_step < training.steps else None
    if dist.is_initialized():
        dist.barrier()
    return Outcome(folder, trainer.global_step, training.steps, reason)


def _checked_sources(config: Config, folder: Path) -> tuple[Source, ...]:
    """The run's data, which must be those it was begun with; processes share the reading, and agree.

    Raises:
        UserError: Names what is missing, damaged or other.
    """
    from olmo_core.distributed.utils import all_gather_object, get_rank, get_world_size

    begun = read_config(folder)
    if list(config.data.mixture.values()) != list(begun.data.mixture.values()):
        raise UserError(f"{folder} was begun with the weights {list(begun.data.mixture.values())}: give the same ones")
    try:
        sources = find_sources(config)
    except UserError as error:
        places = [str(config.data.shards), *config.data.mixture]
        if any(not is_url(place) and Path(place).is_dir() for place in places):
            raise
        raise UserError(f"{error}; if the data were moved: --resume {folder} --data.shards DIR") from error
    check_same(folder, pooled(sources), ", ".join(source.place for source in sources))
    problems = all_gather_object(damage(sources, get_rank(), get_world_size()))
    if (problem := next((p for p in problems if p is not None), None)) is not None:
        raise UserError(problem)
    if config.data != begun.data and get_rank() == 0:
        write_config(config, folder)
    return sources


def _validation(config: Config, sources: tuple[Source, ...], metrics: Any) -> Any:
    """The bound on held-out text."""
    from catmaps.training.callbacks import ValidationCallback

    training = config.training
    tokens, characters = _valid_tokens(config, sources, training.evaluate_sequences)
    if not len(tokens) or training.evaluate_every == 0:
        return ValidationCallback(every=0, metrics=metrics)
    return ValidationCallback(
        tokens=tokens, every=training.evaluate_every, characters_per_token=characters / len(tokens), metrics=metrics
    )


def _bins(config: Config, sources: tuple[Source, ...], folder: Path) -> Any:
    from catmaps.training.bins import SEQUENCES, BinsCallback

    tokens, _ = _valid_tokens(config, sources, min(SEQUENCES, config.training.micro_batch))
    if not len(tokens) or config.training.evaluate_every == 0:
        return BinsCallback(folder=folder)
    return BinsCallback(folder=folder, tokens=tokens, every=config.training.evaluate_every)


def _valid_tokens(config: Config, sources: tuple[Source, ...], count: int) -> tuple[torch.Tensor, float]:
    """So many validation texts, or all there are, evenly spread, with the sum of their characters per token.

    Of a mixture, as many of each directory as its weight asks for; none where no directory holds any out.
    """
    held = [source for source in sources if "valid" in source.manifest.splits]
    rows, characters = [np.zeros((0, config.data.length), dtype=np.int64)], 0.0
    for source in held:
        wanted = max(1, round(count * source.weight / sum(other.weight for other in held)))
        tokens, valid = sequences(source.local, "valid", config.data.length), source.manifest.split("valid")
        rows.append(tokens[:: max(1, len(tokens) // wanted)][:wanted])
        characters += len(rows[-1]) * valid.characters / valid.tokens
    return torch.from_numpy(np.concatenate(rows)), characters
