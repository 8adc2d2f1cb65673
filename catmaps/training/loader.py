"""The engine's loader over token shards: one global order by seed and epoch, whatever the number of processes."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from olmo_core.data import DataCollator, TokenizerConfig
from olmo_core.data.composable import (
    ComposableDataLoader,
    ConcatAndChunkInstanceSource,
    InstanceSource,
    MixingInstanceSource,
    MixingInstanceSourceSpec,
    NumpyDocumentSource,
)
from olmo_core.distributed.utils import get_rank, get_world_size

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.text.manifest import Manifest
from catmaps.training.sources import Source, cache_folder

REMOTE_THREADS = 16  # of a process that reads a store, in which each sequence is a request
DTYPES: dict[str, Any] = {"uint16": np.uint16, "uint32": np.uint32}


class Shards(NumpyDocumentSource):
    """The engine's reader of raw ids, known by the hashes of its files: the engine's own is known by their paths."""

    def __init__(self, source: Source, tokenizer: TokenizerConfig, work: Path) -> None:
        self.held = source.manifest.split("train").shards
        dtype = DTYPES[source.manifest.dtype]
        super().__init__(source_paths=source.train_paths(), dtype=dtype, work_dir=work, tokenizer=tokenizer)
        for shard, path, tokens in zip(self.held, self.source_paths, self.source_sizes, strict=True):
            if shard.tokens != tokens:
                raise UserError(f"{path} holds {tokens} tokens, {shard.tokens} expected: copy it there again")

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hashlib.sha256("".join(shard.sha256 for shard in self.held).encode()).hexdigest()


class Loader(ComposableDataLoader):
    """The engine's, which takes up the state of any run on the same data.

    That they are the same is found before, by their hashes (`sources.check_same`). The engine knows data by their paths
    instead, in checkpoints of earlier versions too, and would refuse those that were moved.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "source_fingerprints": self.source_fingerprints})


def make_loader(config: Config, sources: tuple[Source, ...]) -> Loader:
    """The run's loader.

    A directory is cut into sequences in the order of its shards; an epoch shows each once. A mixture is laid out for
    the whole run, as one epoch: each directory gives its share of training.steps x training.batch sequences, chosen
    without replacement, or all of them again and again where it has fewer.

    Raises:
        UserError: The batch does not divide among the processes, or a directory has too little for its share.
    """
    world = get_world_size()
    if config.training.batch % world:
        raise UserError(f"training.batch {config.training.batch} is not a multiple of the {world} processes")
    tokenizer, work = _tokenizer(sources[0].manifest), cache_folder() / "engine"
    chunks = [
        ConcatAndChunkInstanceSource(Shards(source, tokenizer, work), sequence_length=config.data.length, work_dir=work)
        for source in sources
    ]
    return Loader(
        chunks[0] if len(chunks) == 1 else _mixed(config, sources, chunks, work),
        collator=DataCollator(pad_token_id=0),
        tokenizer=tokenizer,
        work_dir=work,
        global_batch_size=config.training.batch * config.data.length,
        seed=config.training.seed,
        dp_world_size=world,
        dp_rank=get_rank(),
        num_threads=REMOTE_THREADS if any(source.remote for source in sources) else 0,
        display_source_visualization=False,
    )


def _tokenizer(manifest: Manifest) -> TokenizerConfig:
    # The engine wants an end-of-text id; alphabets without one get an id that never occurs.
    eos = manifest.vocab_size if manifest.eos_id is None else manifest.eos_id
    return TokenizerConfig(vocab_size=manifest.vocab_size, eos_token_id=eos, pad_token_id=0)


def _mixed(
    config: Config, sources: tuple[Source, ...], chunks: list[ConcatAndChunkInstanceSource], work: Path
) -> InstanceSource:
    """The mixture, of at least as many sequences as the run has: shares are rounded down."""
    wanted, total = config.training.steps * config.training.batch, sum(source.weight for source in sources)
    for source, chunk in zip(sources, chunks, strict=True):
        if len(chunk) == 0:
            raise UserError(f"{source.place}: the train split is shorter than one sequence; lower data.length")
        if wanted * source.weight < total:
            raise UserError(f"{source.place}: its share of the run is less than one sequence; leave it out")
    return MixingInstanceSource(
        *(
            MixingInstanceSourceSpec(source=chunk, ratio=source.weight / total, max_repetition_factor=float(wanted + 1))
            for source, chunk in zip(sources, chunks, strict=True)
        ),
        work_dir=work,
        seed=config.training.seed,
        num_tokens=(wanted + len(sources)) * config.data.length,
    )
