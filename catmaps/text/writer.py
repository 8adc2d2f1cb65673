"""Writes the shards of one split, document by document."""

import hashlib
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt

from catmaps.errors import UserError
from catmaps.text.manifest import Shard, SplitManifest
from catmaps.text.tokenizers import Tokenizer

_PIECE = 1 << 20  # ids at a time: numpy counts them as 8 bytes each


def histogram(file: Path, dtype: np.dtype, vocab_size: int) -> UInt[np.ndarray, "v"]:
    """How often each id occurs in a raw file of ids, uint64, read piece by piece.

    Raises UserError if an id is outside the vocabulary (a damaged shard).
    """
    counts = np.zeros(vocab_size, dtype="<u8")
    with file.open("rb") as stream:
        while len(ids := np.fromfile(stream, dtype=dtype, count=_PIECE)):
            found = np.bincount(ids, minlength=vocab_size)
            if len(found) > vocab_size:
                raise UserError(f"{file} is damaged: id {len(found) - 1} is not in the vocabulary")
            counts += found.astype("<u8")
    return counts


class SplitWriter:
    """Appends documents to the shards of one split; a document never crosses into the next shard.

    Args:
        directory: Where the files go.
        split: Its name begins theirs.
        tokenizer: Of the ids.
        tokens_per_shard: A shard is closed after the document that reaches this many tokens.
        follows: The split begins elsewhere: where no symbol ends a document, a space goes before the first, too.
    """

    def __init__(
        self, directory: Path, split: str, tokenizer: Tokenizer, tokens_per_shard: int, follows: bool = False
    ) -> None:
        self.directory, self.split, self.tokenizer = directory, split, tokenizer
        self.tokens_per_shard, self.follows = tokens_per_shard, follows
        self.shards: list[Shard] = []
        self.boundaries_file = directory / f"boundaries-{split}.u64"
        self._boundaries = self.boundaries_file.open("wb")
        self._boundaries_hash = hashlib.sha256()
        self._stream: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._counts = np.zeros(tokenizer.vocab_size, dtype="<u8")
        self._in_shard = self.tokens = self.documents = self.characters = self.bytes = 0

    def add(self, ids: UInt[np.ndarray, "_"], characters: int, size: int) -> None:
        """Append one document of so many characters and bytes, and what parts it from the next."""
        if self._stream is not None and self._in_shard >= self.tokens_per_shard:
            self._finish_shard()
        start = self.tokens
        if self.tokenizer.eos_id is not None:
            ids = np.append(ids, np.array([self.tokenizer.eos_id], dtype=ids.dtype))
        elif self.documents or self.follows:
            # no symbol ends a text8 document: one space joins it to the one before, and is a character
            ids = np.append(np.zeros(1, dtype=ids.dtype), ids)
            start, characters, size = start + 1, characters + 1, size + 1
        self._write(ids)
        offset = np.array([start], dtype="<u8").tobytes()
        self._boundaries.write(offset)
        self._boundaries_hash.update(offset)
        self.documents += 1
        self.characters += characters
        self.bytes += size

    def finish(self) -> SplitManifest:
        """Close all files and describe them."""
        if self._stream is not None:
            self._finish_shard()
        self.close()
        counts = self.directory / f"counts-{self.split}.u64"
        counts.write_bytes(self._counts.tobytes())
        return SplitManifest(
            shards=tuple(self.shards),
            documents=self.documents,
            characters=self.characters,
            bytes=self.bytes,
            boundaries=self.boundaries_file.name,
            boundaries_sha256=self._boundaries_hash.hexdigest(),
            counts=counts.name,
            counts_sha256=hashlib.sha256(self._counts.tobytes()).hexdigest(),
        )

    def close(self) -> None:
        """Close files without finishing (after an error)."""
        self._boundaries.close()
        if self._stream is not None:
            self._stream.close()

    def _write(self, ids: UInt[np.ndarray, "_"]) -> None:
        if self._stream is None:
            self._stream = (self.directory / self._file_name()).open("wb")
            self._hash, self._in_shard = hashlib.sha256(), 0
        raw = ids.astype(self.tokenizer.dtype, copy=False).tobytes()
        self._stream.write(raw)
        self._hash.update(raw)
        self._in_shard += len(ids)
        self.tokens += len(ids)

    def _finish_shard(self) -> None:
        assert self._stream is not None
        self._stream.close()
        self._stream = None
        # from the file, which is still in the system's memory: a histogram a document would be slow
        self._counts += histogram(self.directory / self._file_name(), self.tokenizer.dtype, self.tokenizer.vocab_size)
        self.shards.append(Shard(self._file_name(), self._in_shard, self._hash.hexdigest()))

    def _file_name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}.bin"
