"""Writes a run as a directory that transformers loads and catmaps' commands take for a run.

It holds safetensors, JSON, a model card and two small modules for `trust_remote_code=True`, which only import catmaps.
Writing needs nothing but catmaps; loading it with transformers needs the extra `hf`.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from catmaps.config import HUB_TYPE, Config, to_json
from catmaps.errors import UserError
from catmaps.generation import default_sampling
from catmaps.hub.card import model_card, run_card
from catmaps.model import CLOCK, CONFIG, HUB_PREFIX, METRICS, MODEL, Run, halved, write_law, write_tensors
from catmaps.text import tokenizers
from catmaps.text.fast import fast
from catmaps.text.manifest import MANIFEST_FILE
from catmaps.text.tokenizers import HuggingFaceTokenizer

AUTO_MAP = {"AutoConfig": "configuration_catmaps.CatmapsConfig", "AutoModel": "modeling_catmaps.CatmapsModel"}
GENERATION, CARD = "generation_config.json", "README.md"
_MODULE = '''"""The code of this model is the package catmaps; this file only imports it."""

try:
    from catmaps.hub.modeling import {name}
except ImportError as error:
    needs = "this model needs the package catmaps with its extra hf"
    raise ImportError(f"{{needs}} ({{error}}): pip install 'catmaps[hf]'") from error

__all__ = ["{name}"]
'''


def export(run: Run, out: Path, *, licence: str | None = None, half: bool = False) -> list[Path]:
    """Writes the directory; returns its files.

    Args:
        run: A flow, a map or a baseline.
        out: A folder that is new or empty.
        licence: The Hub's name of the weights' licence, for the model card.
        half: Matrices in bf16. They are read back into fp32.

    Raises:
        UserError: The folder is not empty or cannot be made.
    """
    new_folder(out)
    write_tensors({HUB_PREFIX + name: tensor for name, tensor in _weights(run, half).items()}, out / MODEL)
    write_law(run.law, out / CLOCK)
    _write_json(hub_config(run), out / CONFIG)
    _write_json(generation_defaults(run), out / GENERATION)
    write_tokenizer(run, out)
    write_modules(out)
    (out / CARD).write_text(model_card(run, out.name, licence), encoding="utf-8")
    return sorted(out.iterdir())


def export_run(run: Run, out: Path, *, licence: str | None = None, half: bool = False) -> list[Path]:
    """Writes the run's folder anew with a model card, without checkpoints, teacher and paths. Arguments as `export`."""
    new_folder(out)
    write_tensors(_weights(run, half), out / MODEL)
    write_law(run.law, out / CLOCK)
    (out / CONFIG).write_text(to_json(portable(run.config)), encoding="utf-8")
    tokenizers.save(run.tokenizer, out)
    for name in (MANIFEST_FILE, METRICS):
        if (run.path / name).is_file():
            shutil.copy(run.path / name, out / name)
    (out / CARD).write_text(run_card(run, out.name, licence), encoding="utf-8")
    return sorted(out.iterdir())


def _weights(run: Run, half: bool) -> dict[str, Tensor]:
    return halved(run.network.state_dict()) if half else dict(run.network.state_dict())


def new_folder(folder: Path) -> None:
    """Makes a folder; UserError if it cannot be made or is there and not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); choose another --out") from error


def write_modules(folder: Path) -> None:
    """The modules that `trust_remote_code=True` reads."""
    for target in AUTO_MAP.values():
        module, name = target.split(".")
        (folder / f"{module}.py").write_text(_MODULE.format(name=name), encoding="utf-8")


def portable(config: Config) -> Config:
    """A configuration without paths of the machine that it was trained on: their last part stays, as a name."""
    data = config.data
    shards = None if data.shards is None else Path(data.shards).name
    names = [Path(place).name for place in data.mixture]
    if len(set(names)) < len(names):
        names = [f"{name} {i}" for i, name in enumerate(names, 1)]
    mixture = dict(zip(names, data.mixture.values(), strict=True))
    data = replace(data, shards=shards, mixture=mixture, tokenizer=Path(data.tokenizer).name)
    base, start = (None if source is None else Path(source).name for source in (config.base, config.start))
    return replace(config, data=data, base=base, start=start)


def shape(config: Config) -> dict[str, int]:
    """Sizes under the names that transformers' tools look for."""
    network = config.network
    return {
        "hidden_size": network.width,
        "num_hidden_layers": network.blocks,
        "num_attention_heads": network.heads,
        "max_position_embeddings": config.data.length,
    }


def hub_config(run: Run) -> dict[str, Any]:
    """config.json."""
    return {
        "model_type": HUB_TYPE,
        "architectures": ["CatmapsModel"],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "vocab_size": run.tokenizer.vocab_size,
        **shape(run.config),
        "run": asdict(portable(run.config)),
    }


def generation_defaults(run: Run) -> dict[str, Any]:
    """generation_config.json: what `catmaps sample` does by default. The end of a document also fills texts up."""
    sampling = default_sampling(run)
    ends = {} if run.tokenizer.eos_id is None else dict.fromkeys(("eos_token_id", "pad_token_id"), run.tokenizer.eos_id)
    return {
        "max_denoising_steps": sampling.steps,
        "sampler": sampling.sampler,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "guidance_scale": sampling.guidance,
        **ends,
    }


def write_tokenizer(run: Run, folder: Path) -> None:
    """tokenizer.json for transformers' fast tokenizers; in its settings the name by which catmaps knows its own."""
    own = not isinstance(run.tokenizer, HuggingFaceTokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    if run.tokenizer.eos_id is not None:
        eos = run.tokenizer.token_strings()[run.tokenizer.eos_id]
        eos = run.tokenizer.eos_token if isinstance(run.tokenizer, HuggingFaceTokenizer) else eos
        settings |= {"eos_token": eos, "pad_token": eos}
    if own:
        settings["catmaps_tokenizer"] = run.tokenizer.name
    (folder / "tokenizer.json").write_text(fast(run.tokenizer).to_str(), encoding="utf-8")
    _write_json(settings, folder / "tokenizer_config.json")


def _write_json(content: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
