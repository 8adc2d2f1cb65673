"""Building token shards: from documents, from the user's files, and from the embedded corpus."""

import hashlib
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from catmaps.errors import UserError
from catmaps.text.corpus import SPLITS, Document, embedded_bytes, embedded_documents, read_documents
from catmaps.text.manifest import FORMAT_VERSION, MANIFEST_FILE, Manifest, SplitManifest
from catmaps.text.shards import TOKENIZER_FILE, file_sha256, verify
from catmaps.text.tokenizers import Tokenizer, from_spec, save
from catmaps.text.writer import SplitWriter

TOKENS_PER_SHARD = 1 << 28  # 512 MiB of uint16: quick to copy and hash, few files at a trillion tokens
_BATCH_CHARACTERS = 1 << 20


def build_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out_dir: Path,
    *,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Tokenise documents into `train-00000.bin` ..., `boundaries-train.u64`, tokenizer and manifest.

    Documents stream through, so memory does not grow with the corpus. Each document is followed by the
    tokenizer's end-of-document id; text8 has none, its documents are stripped and joined by one space.
    Everything is written into a sibling directory, renamed at the end: `out_dir` is whole or absent.

    Args:
        documents: In the order in which they are to be stored.
        tokenizer: Its vocabulary decides between uint16 and uint32.
        out_dir: Must not exist, unless `overwrite`.
        tokens_per_shard: A shard is closed after the document that reaches this many tokens.
        progress: Show documents and tokens on stderr.
        overwrite: Replace `out_dir` if it holds shards. Any other directory is never removed.

    Returns:
        The manifest that was written.

    Raises:
        UserError: If `out_dir` exists or cannot be written, or no document has any text for this tokenizer.
    """
    check_target(out_dir, overwrite)
    check_shard_size(tokens_per_shard)
    with staging(out_dir, overwrite) as draft:
        splits = write_splits(documents, tokenizer, draft, tokens_per_shard, progress=progress)
        return finish(draft, tokenizer, splits)


def write_splits(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: Path,
    tokens_per_shard: int,
    *,
    follows: bool = False,
    progress: bool = False,
) -> dict[str, SplitManifest]:
    """Writes the shards of documents into a directory, without tokenizer and manifest.

    Args:
        documents: In the order in which they are to be stored.
        tokenizer: Of the ids.
        directory: Must exist.
        tokens_per_shard: A shard is closed after the document that reaches this many tokens.
        follows: The splits begin elsewhere (see `SplitWriter`).
        progress: Show documents and tokens on stderr.

    Returns:
        What was written, by split; splits without documents are absent.
    """
    writers: dict[str, SplitWriter] = {}

    def writer(split: str) -> SplitWriter:
        if split not in writers:
            writers[split] = SplitWriter(directory, split, tokenizer, tokens_per_shard, follows)
        return writers[split]

    try:
        with _progress(progress) as bar:
            task = bar.add_task("tokenising", total=None, documents=0, tokens=0)
            for batch in _batches(documents, tokenizer):
                encoded = tokenizer.encode_many([text for _, text in batch])
                for (split, text), ids in zip(batch, encoded, strict=True):
                    normal = tokenizer.normalise(text)
                    writer(split).add(ids, len(normal), len(normal.encode()))
                done = sum(held.documents for held in writers.values())
                bar.update(task, documents=done, tokens=sum(held.tokens for held in writers.values()))
        return {name: writers[name].finish() for name in SPLITS if name in writers}
    finally:
        for held in writers.values():
            held.close()


def finish(directory: Path, tokenizer: Tokenizer, splits: dict[str, SplitManifest]) -> Manifest:
    """Writes tokenizer and manifest beside shards. Raises UserError if there are none."""
    if not splits:
        raise UserError(f"no document has any text for the tokenizer {tokenizer.name}: nothing to build")
    save(tokenizer, directory)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer.name,
        tokenizer_sha256=file_sha256(directory / TOKENIZER_FILE),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=tokenizer.dtype.name,
        splits=splits,
    )
    manifest.save(directory)
    return manifest


def build_from_paths(
    paths: list[Path],
    spec: str,
    out_dir: Path,
    *,
    text_key: str = "text",
    valid: float = 0.02,
    test: float = 0.04,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    overwrite: bool = False,
) -> Manifest:
    """Shards of the user's files (see `read_documents`) under the tokenizer `spec` (see `from_spec`).

    A "bpe:SIZE" tokenizer costs a first pass over the train documents, on which alone it is trained.

    Raises:
        UserError: As `read_documents`, `from_spec` and `build_shards`, or if no document fell into train.
    """
    check_target(out_dir, overwrite)  # before the long work, not after it

    def documents() -> Iterator[Document]:
        return read_documents(paths, text_key=text_key, valid=valid, test=test)

    tokenizer = from_spec(spec, train_texts(documents()))
    return build_shards(
        _with_train(documents()), tokenizer, out_dir, tokens_per_shard=tokens_per_shard, overwrite=overwrite
    )


def ensure_embedded(cache_dir: Path, spec: str, *, progress: bool = True) -> Path:
    """Directory with the embedded corpus as shards under the tokenizer `spec`, built on the first call.

    The directory's name holds a hash of all that decides the content. Later calls check presence and sizes
    only, and build again what is damaged; processes that build at once do not disturb each other. A
    "bpe:SIZE" tokenizer is trained on the train split alone.
    """
    if spec in ("text8", "bytes") or spec.startswith("bpe:"):
        name, identity = spec.replace(":", "-"), spec.encode()
    else:
        given = from_spec(spec)
        name, identity = given.name, f"{given.eos_id}\n".encode() + _tokenizer_bytes(Path(spec))
    key = hashlib.sha256(b"%d\n%s\n" % (FORMAT_VERSION, identity) + embedded_bytes()).hexdigest()
    directory = cache_dir / f"{name}-{key[:10]}"
    if _whole(directory):
        return directory
    tokenizer = from_spec(spec, train_texts(embedded_documents()))
    damaged = directory.exists()
    try:
        build_shards(embedded_documents(), tokenizer, directory, progress=progress, overwrite=damaged)
    except UserError:
        if not _whole(directory):  # else another process was first
            raise
    return directory


def _whole(directory: Path) -> bool:
    try:
        verify(directory, hashes=False)
    except UserError:
        return False
    return True


def _tokenizer_bytes(path: Path) -> bytes:
    return (path / "tokenizer.json" if path.is_dir() else path).read_bytes()


def train_texts(documents: Iterable[Document]) -> Iterator[str]:
    """Texts of the train split."""
    return (document.text for document in documents if document.split == "train")


def _with_train(documents: Iterable[Document]) -> Iterator[Document]:
    """Pass documents on; without one in train the shards would be of no use, so say what to do."""
    seen: Counter[str] = Counter()
    for document in documents:
        seen[document.split] += 1
        yield document
    if not seen["train"]:
        total = sum(seen.values())
        raise UserError(
            f"all {total} document(s) fell into valid or test, none into train: lower the held-out shares, "
            'cut the text into more documents, or give each a "split" field'
        )


def _batches(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[list[tuple[str, str]]]:
    """Lists of (split, text to encode) of about a million characters, without empty documents."""
    batch, size = [], 0
    for document in documents:
        # documents without an end-of-document id are joined by exactly one space: none may bring its own
        text = tokenizer.normalise(document.text).strip(" ") if tokenizer.eos_id is None else document.text
        if text:
            batch.append((document.split, text))
            size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def check_shard_size(tokens: int) -> None:
    """Raises UserError unless a shard holds at least one token."""
    if tokens < 1:
        raise UserError(f"{tokens} tokens per shard are too few: at least 1")


def check_target(out_dir: Path, overwrite: bool) -> None:
    """Raises UserError if `out_dir` exists and may not be replaced."""
    if not out_dir.exists():
        return
    if not overwrite:
        raise UserError(f"{out_dir} exists: choose another directory, or overwrite it")
    if not (out_dir / MANIFEST_FILE).is_file():
        raise UserError(f"{out_dir} holds no token shards, so it is not overwritten: choose another directory")


@contextmanager
def staging(out_dir: Path, overwrite: bool) -> Iterator[Path]:
    """A sibling of `out_dir` that takes its name if all goes well, and is removed if not."""
    mark = uuid.uuid4().hex[:12]
    draft = out_dir.parent / f".{out_dir.name}.{mark}.partial"
    old = out_dir.parent / f".{out_dir.name}.{mark}.old"
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out_dir} ({error.strerror})") from error
    try:
        yield draft
        check_target(out_dir, overwrite)  # again: the build took time
        if out_dir.exists():
            os.rename(out_dir, old)
        _rename_or_restore(draft, out_dir, old)
    except OSError as error:
        raise UserError(f"cannot write {out_dir} ({error})") from error
    finally:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _rename_or_restore(draft: Path, out_dir: Path, old: Path) -> None:
    try:
        os.rename(draft, out_dir)
    except OSError:
        if old.exists():
            os.rename(old, out_dir)
        raise
