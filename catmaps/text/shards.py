"""Token shards: raw little-endian ids in files, read by us, OLMo-core's token sources and datatrove alike."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer, UInt

from catmaps.errors import UserError
from catmaps.text.manifest import ITEM_BYTES, Manifest, SplitManifest, load_manifest
from catmaps.text.writer import histogram

TOKENIZER_FILE = "tokenizer.json"


def file_sha256(file: Path) -> str:
    """sha256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(directory: Path, hashes: bool = True) -> Manifest:
    """Check every file of a shard directory against its manifest.

    Args:
        directory: A directory that `build_shards` wrote.
        hashes: Compare sha256 too; without, only presence and size (no file is read).

    Returns:
        The manifest.

    Raises:
        UserError: Names the first missing, truncated or damaged file.
    """
    manifest = load_manifest(directory)
    tokenizer = directory / TOKENIZER_FILE
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer} is missing: build the shards again")
    for split in manifest.splits.values():
        check_split(directory, split, manifest)
    if hashes:
        for file, digest in hashed_files(directory, manifest):
            check_hash(file, digest)
    return manifest


def hashed_files(directory: Path, manifest: Manifest) -> list[tuple[Path, str]]:
    """Every file that a manifest describes, with its sha256; the tokenizer is the first."""
    of_splits = [(directory / name, digest) for held in manifest.splits.values() for name, digest in held.files.items()]
    return [(directory / TOKENIZER_FILE, manifest.tokenizer_sha256), *of_splits]


def load_tokens(directory: Path, split: str) -> UInt[np.ndarray, "n"]:
    """All ids of a split: mapped from disk if it is one shard, else concatenated in memory.

    Raises UserError for an absent split, and for a missing or truncated shard (damage inside: see `verify`).
    """
    manifest = load_manifest(directory)
    held = manifest.split(split)
    check_split(directory, held, manifest)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    parts = [np.memmap(directory / shard.file, dtype=dtype, mode="r") for shard in held.shards]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load_boundaries(directory: Path, split: str) -> UInt[np.ndarray, "d"]:
    """Offset in the split's tokens at which each document starts, uint64. Raises as `load_tokens`."""
    manifest = load_manifest(directory)
    held = manifest.split(split)
    check_split(directory, held, manifest)
    return np.fromfile(directory / held.boundaries, dtype="<u8")


def token_counts(directory: Path, split: str = "train") -> Int[np.ndarray, "v"]:
    """How often each id occurs in a split, int64 of shape (vocab_size,).

    From the file of counts; shards of earlier versions, which lack it, are read through, piece by piece. Raises
    UserError as `load_tokens`, and for ids outside the vocabulary or counts of something else (damage).
    """
    manifest = load_manifest(directory)
    held = manifest.split(split)
    if held.counts is not None:
        file = directory / held.counts
        check_size(file, manifest.vocab_size * ITEM_BYTES["uint64"])
        counts = np.fromfile(file, dtype="<u8").astype(np.int64)
        if counts.sum() != held.tokens:
            raise UserError(f"{file} is damaged: it counts {counts.sum()} tokens of {held.tokens}; build again")
        return counts
    check_split(directory, held, manifest)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    files = [directory / shard.file for shard in held.shards]
    return sum((histogram(file, dtype, manifest.vocab_size) for file in files), np.zeros(1, "<u8")).astype(np.int64)


def sequences(
    directory: Path, split: str, length: int, *, count: int | None = None, seed: int | None = None
) -> Int[np.ndarray, "n {length}"]:
    """Consecutive chunks of `length` tokens of a split; the tail that does not fill one is dropped.

    Args:
        directory: Shard directory.
        split: "train", "valid" or "test".
        length: Tokens a chunk, at least 1.
        count: If given, only so many chunks: a random choice without replacement, in the text's order.
        seed: Of that choice; with None the first `count` chunks are taken.

    Returns:
        int64 of shape (n, length), in memory.

    Raises:
        UserError: As `load_tokens`, and if the split has fewer than `count` chunks, or none.
    """
    if length < 1:
        raise UserError(f"a sequence length of {length} is too small: at least 1")
    return _chunks(load_tokens(directory, split), f"{directory}, split {split!r}", length, count, seed)


def _chunks(
    tokens: Integer[np.ndarray, "_"], where: str, length: int, count: int | None, seed: int | None
) -> np.ndarray:
    available = len(tokens) // length
    wanted = available if count is None else count
    if wanted < 1 or wanted > available:
        asked = max(wanted, 1)
        raise UserError(f"{where} has {available} sequences of {length} tokens, {asked} were asked for")
    whole = tokens[: available * length].reshape(available, length)
    if wanted == available:
        return whole.astype(np.int64)
    if seed is None:
        return whole[:wanted].astype(np.int64)
    chosen = np.random.default_rng(seed).choice(available, size=wanted, replace=False)
    return whole[np.sort(chosen)].astype(np.int64)


def check_split(directory: Path, split: SplitManifest, manifest: Manifest) -> None:
    """Presence and size of a split's files. Raises UserError for the first that is missing or of another size."""
    for shard in split.shards:
        check_size(directory / shard.file, shard.tokens * ITEM_BYTES[manifest.dtype])
    check_size(directory / split.boundaries, split.documents * ITEM_BYTES["uint64"])
    if split.counts is not None:
        check_size(directory / split.counts, manifest.vocab_size * ITEM_BYTES["uint64"])


def check_size(file: Path, expected: int) -> None:
    """Raises UserError if a file is missing or has another number of bytes."""
    if not file.is_file():
        raise UserError(f"{file} is missing: build the shards again, or copy it from where they were built")
    size = file.stat().st_size
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise UserError(f"{file} is {kind} ({size} bytes, {expected} expected): build the shards again")


def check_hash(file: Path, expected: str) -> None:
    """Raises UserError if a file's content is not that of the manifest."""
    if file_sha256(file) != expected:
        raise UserError(f"{file} is damaged (its sha256 is not the manifest's): build the shards again")
