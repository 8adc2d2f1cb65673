"""Puts a denoiser together from its parts, and reads and writes the folder of a run.

A run's folder holds config.json, tokenizer.json, model.safetensors (moving average of the weights), clock.safetensors
(the law of time it trained with), manifest.json (of its data), metrics.jsonl, bins.jsonl (a flow's figures over
the clock), events.jsonl (what happened besides steps), and checkpoints/, which only `--resume` reads. A distilled run
also keeps teacher.safetensors, and one that began with another's weights start.safetensors, so that it can be resumed
wherever it is moved to.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from catmaps.baselines.families import FAMILIES, Family
from catmaps.config import ClockConfig, Config, ParallelConfig, TrainingConfig, from_json, is_exported
from catmaps.errors import UserError
from catmaps.flow import times
from catmaps.flow.evidence import OffDiagonalGain, TimeFeatures
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.likelihood import Bound, nelbo
from catmaps.flow.times import Law
from catmaps.models import located, names
from catmaps.network.denoiser import FlowNetwork, NetworkConfig
from catmaps.network.published import PublishedConfig, PublishedNetwork
from catmaps.network.tokens import Flow, Network, TokenNetwork
from catmaps.network.trunk import Trunk
from catmaps.text.tokenizers import Tokenizer
from catmaps.text.tokenizers import load as load_tokenizer
from catmaps.tiles import Fusion

CONFIG, MODEL, CLOCK = "config.json", "model.safetensors", "clock.safetensors"
TEACHER, START = "teacher.safetensors", "start.safetensors"
METRICS, EVENTS, BINS, CHECKPOINTS = "metrics.jsonl", "events.jsonl", "bins.jsonl", "checkpoints"
HUB_PREFIX = "network."  # of the names of weights in an exported directory
Device = torch.device | None
PRECISION = {"bf16": torch.bfloat16, "fp32": torch.float32}


@cache  # a second's work for large vocabularies, and never written to
def _warp(vocab_size: int) -> Law:
    with torch.device("cpu"):  # also where a network is put together without memory, on "meta"
        return times.warp(vocab_size)


@cache
def _decoding_error(vocab_size: int) -> Law:
    with torch.device("cpu"):
        return times.decoding_error(vocab_size)


def best_device() -> torch.device:
    """The accelerator of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def build_network(config: NetworkConfig, log_prior: Float[Tensor, "v"], device: Device = None) -> FlowNetwork:
    """A fresh network; its time features run on the decoding-error warp of its vocabulary.

    `device` is where its weights are made; on "meta" they take no memory and must be filled. Buffers are always made.
    """
    features = TimeFeatures(_warp(len(log_prior)))
    with device or nullcontext():
        return FlowNetwork(config, features, (OffDiagonalGain(), OffDiagonalGain()), log_prior)


def build_baseline(
    family: Family, config: NetworkConfig, log_prior: Float[Tensor, "v"], device: Device = None
) -> TokenNetwork:
    """A fresh network of a baseline; its time features run on plain time."""
    features = TimeFeatures(times.uniform())
    with device or nullcontext():
        return TokenNetwork(config, features, log_prior, special=family.special, causal=family.causal)


def build_published(config: NetworkConfig, published: PublishedConfig, vocab_size: int) -> PublishedNetwork:
    """A fresh network of a published architecture; flm's is told the decoding-error warp of its times, eq. (7)."""
    clock = _decoding_error(vocab_size).cdf if published.kind == "flm" else torch.clone
    return PublishedNetwork(config, published, vocab_size, clock)


def network_of(config: Config, log_prior: Float[Tensor, "v"], device: Device = None) -> Network:
    """A fresh network for a run, its weights on `device`."""
    if config.published is not None:
        return build_published(config.network, config.published, len(log_prior))
    if config.family == "flow":
        return build_network(config.network, log_prior, device)
    return build_baseline(FAMILIES[config.family], config.network, log_prior, device)


def starting_law(config: ClockConfig, vocab_size: int) -> Law:
    """The law of time before any adaptation."""
    if config.law == "uniform":
        return times.uniform()
    if config.law == "decoding_error":
        return _decoding_error(vocab_size)
    return times.logit_normal() if config.law == "logit_normal" else _warp(vocab_size)


FUSED_VOCABULARY = 1024  # from here on a tile's arithmetic is worth compiling


def configure(network: Network, config: TrainingConfig, parallel: ParallelConfig | None = None) -> None:
    """Sets how a network computes: precision of products, size of tiles; in training, what blocks keep."""
    network.precision = PRECISION[config.precision]
    if isinstance(network.trunk, Trunk):
        network.trunk.checkpointing = parallel is not None and parallel.checkpoint_activations
    if not isinstance(network, TokenNetwork):
        network.tile = config.tile_numbers(network.projects)


def compile_blocks(network: Network) -> None:
    """Compiles the trunk's blocks in place, and for large vocabularies the arithmetic of tiles; worth half a minute
    before long training or sampling."""
    Fusion.on = Fusion.on or network.vocab_size >= FUSED_VOCABULARY
    # A distillation calls blocks in more forms than dynamo's 8 (with and without gradient or clean positions, for each
    # role's share of the batch); those beyond its limit would silently run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for part in [*network.trunk.blocks, network.trunk.final_norm]:
        part.compile()


@dataclass(frozen=True)
class Run:
    """A trained model, read from its folder."""

    path: Path
    config: Config
    network: Network
    tokenizer: Tokenizer
    law: Law

    @property
    def clock(self) -> Law:
        """The clock that samplers step on: the law before any adaptation (docs/log.md, 2026-11-24)."""
        return starting_law(self.config.clock, self.tokenizer.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.network.log_prior.device

    def generator(self, seed: int) -> torch.Generator:
        """A source of randomness on the run's device."""
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def flow_network(self) -> Flow:
        """UserError for a baseline."""
        if isinstance(self.network, TokenNetwork):
            raise UserError(f"run {self.path} is of family {self.config.family}: this needs a run of family flow")
        return self.network

    @property
    def flow_map(self) -> FlowMap:
        return FlowMap(self.flow_network)

    @property
    def is_map(self) -> bool:
        """Whether it was trained off the diagonal: a flow map rather than a base."""
        if self.config.published is not None:
            return self.config.published.arrival
        return self.config.objective.off_diagonal > 0

    @property
    def baseline(self) -> Family | None:
        """How a baseline is scored and sampled; None for flows."""
        return FAMILIES.get(self.config.family)

    @property
    def kind(self) -> str:
        if self.baseline is not None:
            return f"{self.config.family} baseline"
        return "flow map" if self.is_map else "base flow"

    def bound(self, tokens: Int[Tensor, "b l"], *, num_samples: int, generator: torch.Generator) -> Bound:
        """The family's upper bound on -log p of texts on the run's device; exact for autoregressive baselines."""
        if self.baseline is not None:
            return self.baseline.bound(self.network, tokens, num_samples=num_samples, generator=generator)
        return nelbo(self.flow_map, tokens, self.law, num_samples=num_samples, generator=generator)


def read_config(path: Path) -> Config:
    """The configuration of a run's folder, of an exported directory or of a model of the package.

    Raises:
        UserError: No such folder, or not a run.
    """
    path = located(path)
    return from_json(_config_text(path), str(path / CONFIG))


def _config_text(path: Path) -> str:
    file = path / CONFIG
    if not file.is_file():
        what = "is not a run (no config.json)" if path.is_dir() else "does not exist"
        packaged = f"; with the package come {', '.join(names())}" if names() else ""
        raise UserError(f"run {path} {what}; train one with `catmaps train PRESET --out {path}`{packaged}")
    return file.read_text(encoding="utf-8", errors="replace")


def load_run(path: Path) -> Run:
    """Reads a run, an exported directory or a model of the package, for sampling and scoring, in evaluation mode.

    Raises:
        UserError: Missing, damaged or mismatched files, named.
    """
    path = located(path)
    config = read_config(path)
    tokenizer = load_tokenizer(path)
    network = network_of(config, torch.zeros(tokenizer.vocab_size))
    load_weights(network, path / MODEL)
    configure(network, config.training)
    network = network.eval().requires_grad_(False).to(best_device())
    return Run(path, config, network, tokenizer, _saved_law(path, tokenizer.vocab_size))


def _saved_law(path: Path, vocab_size: int) -> Law:
    """The law a run trained with. transformers does not save it again; any law gives a bound, of another variance."""
    if not (path / CLOCK).exists() and is_exported(json.loads(_config_text(path))):
        return _warp(vocab_size)
    return read_law(path / CLOCK)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Around the reading of a safetensors file; UserError if it is missing or damaged."""
    if not file.is_file():
        raise UserError(f"{file} is missing: the run has not saved yet, or its folder was copied in part")
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}); copy it again or resume the run to write it anew") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file; UserError if it is missing or damaged."""
    with reading(file):
        return load_file(file)


def load_weights(network: Network, file: Path) -> None:
    """Strict loading: what is missing, unknown or of another shape is named."""
    tensors = {name.removeprefix(HUB_PREFIX): tensor for name, tensor in read_tensors(file).items()}
    must_match(_shapes(network.state_dict()), _shapes(tensors), file)
    network.load_state_dict(tensors)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def must_match(own: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]], file: Path) -> None:
    """UserError naming the first of the stored tensors that is missing, unknown or of another shape."""
    for what, odd in (("misses", set(own) - set(stored)), ("has unknown", set(stored) - set(own))):
        if odd:
            raise UserError(f"{file} {what} {min(odd)} ({len(odd)} in all): it is of another configuration")
    for name, shape in stored.items():
        if shape != own[name]:
            shapes = f"{shape} instead of {own[name]}"
            raise UserError(f"{file}: {name} has shape {shapes}: it is of another configuration or vocabulary")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Atomic: the file is either the old or the new one."""
    draft = file.with_name(f".{file.name}.draft")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft)
    os.replace(draft, file)


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in bf16, as products use them; norms, gains, clocks and biases as they are."""
    matrices = {name for name, t in tensors.items() if t.dtype == torch.float32 and t.ndim == 2 and min(t.shape) > 16}
    return {name: t.bfloat16() if name in matrices else t for name, t in tensors.items()}


def write_law(law: Law, file: Path) -> None:
    write_tensors({"t": law.t, "table": law.table}, file)


def read_law(file: Path) -> Law:
    """Reads what `write_law` wrote; UserError if it is missing, damaged or something else."""
    tensors = read_tensors(file)
    try:
        return Law(tensors["t"], tensors["table"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is not a law of time ({error}); copy the run's folder again") from error
