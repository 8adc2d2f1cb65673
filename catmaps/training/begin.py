"""The folder of a new run, and changes to one that was begun."""

import logging
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from catmaps.config import Config, flat, to_json
from catmaps.errors import UserError
from catmaps.model import (
    CHECKPOINTS,
    CONFIG,
    START,
    TEACHER,
    Run,
    load_run,
    read_config,
    starting_law,
    write_law,
    write_tensors,
)
from catmaps.presets import agree
from catmaps.text import tokenizers
from catmaps.text.manifest import MANIFEST_FILE, load_manifest
from catmaps.text.shards import TOKENIZER_FILE
from catmaps.text.tokenizers import Tokenizer
from catmaps.training import tracking
from catmaps.training.sources import damage, find_sources, pooled

BEGUN = ".begun"  # while a folder is being made
START_LAW = "start_clock.safetensors"


def start(config: Config, folder: Path) -> Config:
    """Makes the folder of a new run: configuration, tokenizer, data manifest, and the weights of its source, if any.

    Raises:
        UserError: The folder exists or cannot be made, data, network and source do not fit, or a tracker is not
            installed.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not empty; continue it with --resume {folder}, or choose another --out"
        )
    if config.published is not None:
        source = config.base or config.start
        raise UserError(f"run {source} was imported: its network is sampled and scored, but not trained")
    tracking.require(config.tracking)
    sources = find_sources(config)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several processes share the reading once they have met
    if alone and (problem := damage(sources)) is not None:
        raise UserError(problem)  # better found now than as a strange loss
    shards = pooled(sources)
    tokenizer = tokenizers.load(shards)
    has, needed = load_manifest(shards).split("train").tokens, config.training.batch * config.data.length
    if has < needed:
        raise UserError(
            f"{shards}: the train split, of {has:,} tokens, is shorter than one batch, of {needed:,}: bring more text, "
            "or lower training.batch or data.length"
        )
    source = _source(config, tokenizer, shards)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); choose another --out") from error
    (folder / BEGUN).touch()
    tokenizers.save(tokenizer, folder)
    shutil.copy(shards / MANIFEST_FILE, folder / MANIFEST_FILE)
    if source is not None:
        write_tensors(source.network.state_dict(), folder / (START if config.base is None else TEACHER))
    # The law that a source adapted is for who goes on by its clock.
    law = starting_law(config.clock, tokenizer.vocab_size)
    if source is not None and (config.base is not None or config.clock == source.config.clock):
        law = source.law
    write_law(law, folder / START_LAW)
    write_config(config, folder)
    (folder / BEGUN).unlink()
    return config


def _source(config: Config, tokenizer: Tokenizer, shards: Path) -> Run | None:
    """The run whose weights are taken, as teacher or to begin with: whole, before there is a folder.

    Raises:
        UserError: It is missing or damaged, or has another network or vocabulary.
    """
    name = config.base or config.start
    if name is None:
        return None
    source = load_run(Path(name))
    if config.start is not None:
        agree(config, source.config, name)
    if source.tokenizer.token_strings() != tokenizer.token_strings():
        raise UserError(
            f"the vocabulary of {shards} ({tokenizer.name}) is not that of {name} ({source.tokenizer.name}): build "
            f"shards with `catmaps data build ... --tokenizer {source.path / TOKENIZER_FILE}`"
        )
    return source


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


def quiet_engine() -> None:
    """Before the engine is imported, which talks already; its errors are raised, too."""
    for name in ("olmo_core", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def with_steps(config: Config, folder: Path, steps: int) -> Config:
    """Gives a begun run another number of steps, in its config.json (process 0); the rate follows `optim.rate`.

    Raises:
        UserError: Fewer steps than the last checkpoint has, or none; or the run's data are a mixture, whose order is
            laid out for its number of steps.
    """
    quiet_engine()
    from catmaps.training.callbacks import record
    from catmaps.training.checkpoints import complete

    done = max((step for step, _ in complete(folder / CHECKPOINTS)), default=0)
    if steps < max(1, done):
        raise UserError(f"{folder} has made {done} steps already: --steps must be at least as many")
    if config.data.mixture and steps != config.training.steps:
        raise UserError(f"{folder} reads a mixture, which is laid out for {config.training.steps} steps: keep them")
    config = replace(config, training=replace(config.training, steps=steps))
    if int(os.environ.get("RANK", "0")) == 0:
        write_config(config, folder)
        record(folder, done, "steps changed", steps=steps)
    for _ in range(600):  # other processes wait for the first
        if read_config(folder) == config:
            return config
        time.sleep(0.1)
    raise UserError(f"process 0 has not written {folder / CONFIG} within a minute")


def write_config(config: Config, folder: Path) -> None:
    draft = folder / f".{CONFIG}.draft"  # other processes wait for the finished file
    draft.write_text(to_json(config), encoding="utf-8")
    os.replace(draft, folder / CONFIG)
