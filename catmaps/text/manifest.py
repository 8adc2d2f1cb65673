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
        counts: Raw little-endian uint64 file: how often each id occurs. None in shards of earlier versions.
    """

    shards: tuple[Shard, ...]
    documents: int
    characters: int
    bytes: int
    boundaries: str
    boundaries_sha256: str
    counts: str | None = None
    counts_sha256: str | None = None

    @property
    def files(self) -> dict[str, str]:
        """sha256 by file name."""
        hashes = {shard.file: shard.sha256 for shard in self.shards} | {self.boundaries: self.boundaries_sha256}
        if self.counts is not None and self.counts_sha256 is not None:
            hashes[self.counts] = self.counts_sha256
        return hashes

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

    def difference(self, other: "Manifest") -> str | None:
        """The first thing in which the data of two manifests differ, named for a message; None if they are the same.

        Files count by their hashes, in order, whatever their names: a pool of directories gives them others.
        """
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            return f"the tokenizer ({self.tokenizer} and {other.tokenizer})"
        if (self.dtype, self.vocab_size, self.eos_id) != (other.dtype, other.vocab_size, other.eos_id):
            return "the type of the ids"
        for name in dict.fromkeys([*self.splits, *other.splits]):
            if name not in self.splits or name not in other.splits:
                return f"split {name!r}, which only one of them has"
            ours, theirs = self.splits[name].shards, other.splits[name].shards
            for mine, its in zip(ours, theirs, strict=False):
                if (mine.sha256, mine.tokens) != (its.sha256, its.tokens):
                    return f"{mine.file} ({mine.tokens} tokens, sha256 {mine.sha256[:8]}, and {its.sha256[:8]})"
            if len(ours) != len(theirs):
                return f"the number of shards of split {name!r} ({len(ours)} and {len(theirs)})"
        return None

    def save(self, directory: Path) -> None:
        """Write `manifest.json` into `directory`."""
        text = json.dumps(asdict(self), indent=1)
        (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def load_manifest(directory: Path) -> Manifest:
    """Read the manifest of `directory`. Raises UserError if missing, damaged or of another format version."""
    file = directory / MANIFEST_FILE
    if not file.is_file():
        raise UserError(
            f"{directory} holds no token shards ({MANIFEST_FILE} is missing): make some of your text with "
            "`catmaps data build TEXTS --out DIR`"
        )
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


def splits_from(content: dict[str, Any]) -> dict[str, SplitManifest]:
    """Splits as `asdict` and JSON left them. Raises ValueError, TypeError or KeyError where they are damaged."""
    splits = {
        name: SplitManifest(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
        for name, split in content.items()
    }
    for name in [name for split in splits.values() for name in split.files]:
        if Path(name).name != name:
            raise ValueError(f"file name {name!r}")
    return splits


def _parsed(content: dict[str, Any]) -> Manifest:
    manifest = Manifest(**{**content, "splits": splits_from(content["splits"])})
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {manifest.dtype!r}")
    return manifest
