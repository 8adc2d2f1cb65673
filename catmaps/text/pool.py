"""Several sets of shards as one: the parts that tasks wrote, or the directories of a mixture."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from catmaps.errors import UserError
from catmaps.text.corpus import SPLITS
from catmaps.text.manifest import Shard, SplitManifest

_PIECE = 1 << 20


@dataclass(frozen=True)
class Part:
    """Shards of some splits, and the directory that holds them."""

    directory: Path
    splits: dict[str, SplitManifest]


def pool(parts: Sequence[Part], target: Path, place: Callable[[Path, Path], None]) -> dict[str, SplitManifest]:
    """Concatenates the splits of parts, in order, under new names in `target`; a shard stays a file.

    Args:
        parts: All of one tokenizer.
        target: Must exist. Boundaries and counts are written anew.
        place: Puts a shard (first path) at its new place (second path): links, moves or copies it.

    Returns:
        What `target` then holds, by split.
    """
    found = {name: [part for part in parts if name in part.splits] for name in SPLITS}
    return {name: _pool_split(name, holders, target, place) for name, holders in found.items() if holders}


def _pool_split(name: str, parts: Sequence[Part], target: Path, place: Callable[[Path, Path], None]) -> SplitManifest:
    shards: list[Shard] = []
    for part in parts:
        for shard in part.splits[name].shards:
            file = f"{name}-{len(shards):05d}.bin"
            place(part.directory / shard.file, target / file)
            shards.append(Shard(file, shard.tokens, shard.sha256))
    held = [part.splits[name] for part in parts]
    boundaries, counts = f"boundaries-{name}.u64", f"counts-{name}.u64"
    counted = _sum_counts(parts, name)
    (target / counts).write_bytes(counted)
    return SplitManifest(
        shards=tuple(shards),
        documents=sum(split.documents for split in held),
        characters=sum(split.characters for split in held),
        bytes=sum(split.bytes for split in held),
        boundaries=boundaries,
        boundaries_sha256=_shift_boundaries(parts, name, target / boundaries),
        counts=counts,
        counts_sha256=hashlib.sha256(counted).hexdigest(),
    )


def _shift_boundaries(parts: Sequence[Part], name: str, target: Path) -> str:
    """Writes the offsets of all documents in the whole, piece by piece; returns the sha256."""
    digest, before = hashlib.sha256(), 0
    with target.open("wb") as out:
        for part in parts:
            split = part.splits[name]
            with (part.directory / split.boundaries).open("rb") as stream:
                while raw := stream.read(8 * _PIECE):
                    shifted = (np.frombuffer(raw, dtype="<u8") + np.uint64(before)).astype("<u8").tobytes()
                    out.write(shifted)
                    digest.update(shifted)
            before += split.tokens
    return digest.hexdigest()


def _sum_counts(parts: Sequence[Part], name: str) -> bytes:
    total = np.zeros(1, dtype="<u8")
    for part in parts:
        counts = part.splits[name].counts
        if counts is None:
            raise UserError(f"{part.directory} was built by an earlier version, without counts: build it again")
        total = total + np.fromfile(part.directory / counts, dtype="<u8")
    return total.astype("<u8").tobytes()
