"""The manifest of a directory of token shards: what its files hold, with hashes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from catmaps.errors import UserError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
ITEM_BYTES = {"uint16": 2, "uint32": 4, "uint64": 8}


@dataclass(frozen=True)
class Shard:
    """One raw file of ids: its name in the directory, number of tokens and sha256."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """One split.

    Attributes:
        shards: In order; the split is their concatenation. Each starts at a document or its joining space.
        documents: Number of documents.
        characters: Characters of the normalised text, for bits per character (text8: with joining spaces).
        bytes: Bytes of that text in UTF-8, for bits per byte.
        boundaries: Raw little-endian uint64 file: the offset in the split at which each document starts.
    """

    shards: tuple[Shard, ...]
    documents: int
    characters: int
    bytes: int
    boundaries: str
    boundaries_sha256: str

    @property
    def tokens(self) -> int:
        """Number of tokens of the split, separators included."""
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """All of a shard directory; `dtype` is "uint16" or "uint32"; splits without documents are absent."""

    format_version: int
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    dtype: str
    splits: dict[str, SplitManifest]

    def split(self, name: str) -> SplitManifest:
        """The split of that name. Raises UserError if the shards hold no document of it."""
        if name not in self.splits:
            raise UserError(f"the shards have no split {name!r}: they hold {', '.join(self.splits)}")
        return self.splits[name]

    def save(self, directory: Path) -> None:
        """Write `manifest.json` into `directory`."""
        text = json.dumps(asdict(self), indent=1)
        (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def load_manifest(directory: Path) -> Manifest:
    """Read the manifest of `directory`. Raises UserError if missing, damaged or of another format version."""
    file = directory / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{directory} holds no token shards ({MANIFEST_FILE} is missing): build them first")
    try:
        content = json.loads(file.read_bytes())
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): build the shards again") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format version {version!r}, not {FORMAT_VERSION}: build the shards again")
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"{file} is damaged ({kind}: {error}): build the shards again") from error


def _parsed(content: dict[str, Any]) -> Manifest:
    splits = {
        name: SplitManifest(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
        for name, split in content["splits"].items()
    }
    manifest = Manifest(**{**content, "splits": splits})
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {manifest.dtype!r}")
    names = [shard.file for split in splits.values() for shard in split.shards]
    for name in names + [split.boundaries for split in splits.values()]:
        if Path(name).name != name:
            raise ValueError(f"file name {name!r}")
    return manifest
