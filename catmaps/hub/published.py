"""Published checkpoints as runs: their names to ours, their sizes, their times.

Every tensor must be known and every one that is needed must be there; buffers that follow from sizes are compared with
what they should be. Source: the layouts in docs/hub.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from catmaps.config import ClockConfig, Config, DataConfig, TrainingConfig, to_json
from catmaps.errors import UserError
from catmaps.hub.export import new_folder
from catmaps.hub.sources import Source, fetch, read_source
from catmaps.model import CLOCK, CONFIG, MODEL, build_published, starting_law, write_law, write_tensors
from catmaps.network.denoiser import NetworkConfig
from catmaps.network.published import PublishedConfig, time_frequencies
from catmaps.network.trunk import rope_waves
from catmaps.text import tokenizers
from catmaps.text.tokenizers import Tokenizer

Format = Literal["flm", "semicat"]
PREFIXES = ("backbone.", "net.", "_orig_mod.")
IGNORED = ("learnable_loss_weighting.", "teacher")  # of training alone
KNOWN = {30_522: ("google-bert/bert-base-uncased", 128), 50_257: ("openai-community/gpt2", 1024)}
"""Tokenizer and window of the published models, by vocabulary."""

BLOCK = {
    "qkv": "attn_qkv",
    "attention_out": "attn_out",
    "up": "mlp.0",
    "down": "mlp.2",
    "modulation": "adaLN_modulation",
}
PARTS = {
    "head": "output_layer.linear",
    "trunk.final_norm.norm": "output_layer.norm_final",
    "trunk.final_norm.modulation": "output_layer.adaLN_modulation",
}
TIMES = {"flm": ("sigma_map", "sigma_map_prime"), "semicat": ("s_map", "t_map")}
EMBEDDINGS = {
    "plain": {"embedding.table.weight": "vocab_embed.embedding"},
    "naive": {"embedding.table.weight": "vocab_embed.seq.weight", "embedding.bias": "vocab_embed.seq.bias"},
    "rms": {
        "embedding.table.weight": "vocab_embed.proj.weight",
        "embedding.bias": "vocab_embed.proj.bias",
        "embedding.inner": "vocab_embed.mlp.0",
        "embedding.outer": "vocab_embed.mlp.2",
        "embedding.gamma": "vocab_embed.film_gamma",
        "embedding.beta": "vocab_embed.film_beta",
        "embedding.norm": "vocab_embed.final_norm",
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, understood."""

    network: NetworkConfig
    published: PublishedConfig
    vocab_size: int
    tensors: dict[str, Tensor]
    """Under our names, fp32."""
    length: int | None
    """Its window, if it says so."""


def published_name(own: str, published: PublishedConfig) -> str:
    """What a tensor of `PublishedNetwork` is called in the checkpoint."""
    layers = {
        f"{ours}.{layer}": f"{theirs}.mlp.{place}"
        for ours, theirs in zip(("start", "arrival"), TIMES[published.kind], strict=True)
        for layer, place in (("inner", 0), ("outer", 2))
    }
    for ours, theirs in (PARTS | EMBEDDINGS[published.embedding] | layers).items():
        if own == ours or own.startswith(ours + "."):
            return theirs + own.removeprefix(ours)
    blocks, number, part, *rest = own.removeprefix("trunk.").split(".")
    return ".".join([blocks, number, BLOCK.get(part, part), *rest])


def understand(source: Source, kind: Format, logit_cap: float = 0.0) -> Checkpoint:
    """Recognises sizes and variants and renames all tensors.

    Raises:
        UserError: A tensor is missing, unknown, of another shape, or a buffer has other values; it is named.
    """
    tensors = {_bare(name): tensor for name, tensor in source.tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORED)}
    take = _taker(tensors, f"{source.name} is no checkpoint of format {kind}: it")
    vocab_size, width = take("output_layer.linear.weight", 2).shape
    embedding = "plain" if kind == "flm" else "rms" if "vocab_embed.proj.weight" in tensors else "naive"
    arrival = kind == "semicat" or any(name.startswith("sigma_map_prime.") for name in tensors)
    published = PublishedConfig(kind=kind, embedding=embedding, arrival=arrival, logit_cap=logit_cap)
    head_dim, length = _check_buffers(tensors, take, kind)
    if width % head_dim:
        raise UserError(f"{source.name}: width {width} is no multiple of the {head_dim} of a head's rotary buffer")
    network = NetworkConfig(
        width=width,
        blocks=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        heads=width // head_dim,
        conditioning=take(f"{TIMES[kind][0]}.mlp.0.weight", 2).shape[0],
        mlp_ratio=max(1, take("blocks.0.mlp.0.weight", 2).shape[0] // width),
        input="linear",
        skip=False,
    )
    renamed = _renamed(source.name, tensors, network, published, vocab_size)
    return Checkpoint(network, published, vocab_size, renamed, length or _window(source.settings))


def _bare(name: str) -> str:
    """A name without what Lightning and torch.compile put in front."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _taker(tensors: dict[str, Tensor], complaint: str) -> Callable[[str, int], Tensor]:
    def take(name: str, dimensions: int) -> Tensor:
        if name not in tensors:
            raise UserError(f"{complaint} misses {name}")
        if tensors[name].dim() != dimensions:
            raise UserError(f"{complaint} has {name} of shape {tuple(tensors[name].shape)}")
        return tensors[name]

    return take


def _check_buffers(
    tensors: dict[str, Tensor], take: Callable[[str, int], Tensor], kind: Format
) -> tuple[int, int | None]:
    """Takes the buffers out; returns the dimensions of a head and, where the buffers tell, the window."""
    if kind == "flm":
        frequency = take("rotary_emb.inv_freq", 1)
        head_dim, length = 2 * len(frequency), None
        expected = {"rotary_emb.inv_freq": 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)}
    else:
        _, length, _, _, head_dim = take("rotary_emb.cos_cached", 5).shape
        turned = rope_waves(length, head_dim).repeat(1, 1, 2)
        still = torch.stack([torch.ones(length, head_dim), torch.zeros(length, head_dim)])  # of values
        waves = torch.stack([turned, turned, still], 2)[:, None, :, :, None]
        expected = {f"rotary_emb.{name}_cached": wave for name, wave in zip(("cos", "sin"), waves, strict=True)}
        expected |= {f"{name}.freqs": time_frequencies() for name in TIMES[kind]}
    for name, wanted in expected.items():
        found = take(name, wanted.dim())
        if found.shape != wanted.shape or not torch.allclose(found.float(), wanted, atol=2e-3):
            raise UserError(f"the checkpoint's buffer {name} is not what catmaps computes: it is of another variant")
        del tensors[name]
    return head_dim, length


def _renamed(
    source: str, tensors: dict[str, Tensor], config: NetworkConfig, published: PublishedConfig, vocab_size: int
) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = build_published(config, published, vocab_size).state_dict()
    names = {own: published_name(own, published) for own in wanted}
    for what, odd in (
        ("misses", set(names.values()) - set(tensors)),
        ("has unknown", set(tensors) - set(names.values())),
    ):
        if odd:
            raise UserError(f"{source} {what} {min(odd)} ({len(odd)} in all): it is not of format {published.kind}")
    renamed = {}
    for own, name in names.items():
        tensor = tensors[name].mT if name == "vocab_embed.embedding" else tensors[name]
        if tensor.shape != wanted[own].shape:
            raise UserError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, which fits no {published.kind}")
        renamed[own] = tensor.float().contiguous()
    return renamed


def _window(settings: dict) -> int | None:
    """The window in a config.json of the Hub: its Hydra configuration, as it is or as `config`."""
    for at in (settings, settings.get("config")):
        model = at.get("model") if isinstance(at, dict) else None
        if isinstance(model, dict) and isinstance(model.get("length"), int):
            return model["length"]
    return None


def tokenizer_for(spec: str | None, vocab_size: int) -> tuple[str, Tokenizer]:
    """The name and the tokenizer of a checkpoint: text8, bytes, a tokenizer.json, or that of a repository on the Hub.

    Raises:
        UserError: None is known for this vocabulary, or it is of another size.
    """
    if spec is None and vocab_size not in KNOWN:
        raise UserError(f"which tokenizer has these {vocab_size} tokens? --tokenizer text8, bytes or a tokenizer.json")
    spec = KNOWN[vocab_size][0] if spec is None else spec
    local = spec in ("text8", "bytes") or spec.startswith("bpe:") or Path(spec).exists()
    tokenizer = tokenizers.from_spec(spec) if local else tokenizers.load(fetch(spec, "tokenizer.json"))
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"tokenizer {spec} has {tokenizer.vocab_size} tokens, the checkpoint {vocab_size}")
    return spec, tokenizer


@dataclass(frozen=True)
class Imported:
    """What became of a checkpoint."""

    config: Config
    average: bool
    """Whether its file holds a moving average that was not read."""


def import_checkpoint(
    source: str,
    kind: Format,
    out: Path,
    *,
    tokenizer: str | None = None,
    length: int | None = None,
    logit_cap: float = 0.0,
    precision: Literal["bf16", "fp32"] = "fp32",
) -> Imported:
    """Writes the folder of a run with a published checkpoint's network.

    Args:
        source: A file, a folder, or NAME[@REVISION] on the Hub (`read_source`).
        kind: Its layout.
        out: A folder that is new or empty.
        tokenizer: `tokenizer_for`; None: by the size of the vocabulary.
        length: Its window in tokens; None: as the checkpoint says, else by the size of the vocabulary.
        logit_cap: `PublishedConfig.logit_cap`.
        precision: Of matrix products.

    Raises:
        UserError: Anything missing, unknown or ambiguous, named.
    """
    read = read_source(source)
    checkpoint = understand(read, kind, logit_cap)
    name, chosen = tokenizer_for(tokenizer, checkpoint.vocab_size)
    window = length or checkpoint.length or KNOWN.get(checkpoint.vocab_size, ("", 0))[1]
    if window < 1:
        raise UserError("how many tokens has its window? --length N")
    config = Config(
        preset="imported",
        data=DataConfig(tokenizer=name, length=window),
        network=checkpoint.network,
        clock=ClockConfig(law="decoding_error" if kind == "flm" else "uniform", adaptive=False),
        training=TrainingConfig(precision=precision),
        published=checkpoint.published,
    )
    new_folder(out)
    tokenizers.save(chosen, out)
    write_tensors(checkpoint.tensors, out / MODEL)
    write_law(starting_law(ClockConfig(), checkpoint.vocab_size), out / CLOCK)  # any law serves bounds
    (out / CONFIG).write_text(to_json(config), encoding="utf-8")
    return Imported(config, read.average)
