"""Where published checkpoints come from: files, folders, the Hugging Face Hub. No code of theirs is run."""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catmaps.errors import UserError
from catmaps.model import read_tensors

WEIGHTS, SETTINGS = "model.safetensors", "config.json"
PICKLES = (".ckpt", ".pt", ".pth")
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """What a checkpoint holds, under its own names."""

    name: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    """Of the config.json beside it; empty without one."""
    average: bool = False
    """Whether it also holds a moving average of its weights, which as a list without names is not read."""


def read_source(source: str) -> Source:
    """Reads a .safetensors file, a .ckpt or .pt of plain tensors, a folder with one of these, or NAME[@REVISION] on the
    Hub.

    Raises:
        UserError: Nothing there, damaged, or a pickle of more than tensors.
    """
    path = Path(source)
    if not path.exists():
        path = _from_hub(source)
    file = _weights_in(path) if path.is_dir() else path
    settings = _settings(file.with_name(SETTINGS))
    if file.suffix == ".safetensors":
        return Source(source, read_tensors(file), settings)
    if file.suffix in PICKLES:
        tensors, average = _plain_tensors(file)
        return Source(source, tensors, settings, average)
    raise UserError(
        f"{file} is no checkpoint: a .safetensors, {', '.join(PICKLES)} file or a folder with one is wanted"
    )


def fetch(repository: str, file: str) -> Path:
    """A file of a repository on the Hub, NAME[@REVISION]; from the local cache without a network.

    Raises:
        UserError: It cannot be had.
    """
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()  # of its retries: the error below says enough
    name, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{repository} is nothing on this disk, and its {file} cannot be fetched from the Hugging Face Hub "
            f"({reason.rstrip('.')}): download it where there is a network and give the file"
        ) from error


def _from_hub(source: str) -> Path:
    if not _ON_THE_HUB.fullmatch(source):
        raise UserError(f"{source} does not exist: give a file, a folder or the name of a Hugging Face repository")
    weights = fetch(source, WEIGHTS)
    with contextlib.suppress(UserError):  # it only says what --length can say
        fetch(source, SETTINGS)  # into the same folder of the cache
    return weights


def _weights_in(folder: Path) -> Path:
    for pattern in (WEIGHTS, "*.safetensors", *(f"*{ending}" for ending in PICKLES)):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{folder} holds {len(found)} checkpoints, {found[0].name} among them: give one file")
    raise UserError(f"{folder} holds no checkpoint: neither .safetensors nor {', '.join(PICKLES)}")


def _settings(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _plain_tensors(file: Path) -> tuple[dict[str, Tensor], bool]:
    """The state dict in a pickle, by torch's reader of plain tensors; and whether there is a moving average."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, pickle's own among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is a pickle of more than plain tensors, or damaged ({reason}): catmaps runs no code of a "
            "checkpoint; where you trust it, save its state_dict with safetensors and import that"
        ) from error
    average = isinstance(content, dict) and "ema" in content
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no state dict: a dictionary of tensors, or one as `state_dict`, is wanted")
    return {str(name): tensor for name, tensor in state.items()}, average
