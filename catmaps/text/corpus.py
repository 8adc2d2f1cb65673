"""Documents: the embedded public-domain corpus, and txt, JSON-lines and parquet files of the user's own."""

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from catmaps.errors import UserError

SPLITS = ("train", "valid", "test")
EMBEDDED_FILE = "public_domain_english.jsonl.xz"
_ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Document:
    """One text, which belongs as a whole to one split ("train", "valid" or "test")."""

    id: str
    source: str
    title: str
    text: str
    split: str


@dataclass(frozen=True)
class Reading:
    """How files are read: the key of the text, and the shares of documents that are held out.

    Raises:
        UserError: The shares are not in [0, 1), or their sum is not below 1.
    """

    text_key: str = "text"
    valid: float = 0.02
    test: float = 0.04

    def __post_init__(self) -> None:
        valid, test = self.valid, self.test
        if not (0 <= valid < 1 and 0 <= test < 1 and valid + test < 1):
            raise UserError(f"held-out shares valid={valid}, test={test}: each in [0, 1), their sum below 1")


def split_of(document_id: str, valid: float = 0.02, test: float = 0.04) -> str:
    """Split of a document by a hash of its id: the same on every machine, and free of the other documents.

    Args:
        document_id: Any text.
        valid: Share of documents held out for validation, in [0, 1).
        test: Share of documents held out for the final scores, in [0, 1).

    Returns:
        "train", "valid" or "test".
    """
    number = int(hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).hexdigest(), 16)
    # Whole percents from the last two decimal digits, as the embedded corpus was split (0.03, 0.03); the
    # digits before them refine the share, so that a large corpus may hold out a thousandth.
    share = number % 100 / 100 + number // 100 % 10**8 / 10**10
    if share < valid:
        return "valid"
    return "test" if share < valid + test else "train"


def embedded_bytes() -> bytes:
    """The compressed corpus that travels with the package (its hash names caches)."""
    return (resources.files("catmaps.text") / "data" / EMBEDDED_FILE).read_bytes()


def embedded_documents() -> Iterator[Document]:
    """The 482 documents of the embedded corpus; see `data/README.md` beside it for their origin."""
    resource = resources.files("catmaps.text") / "data" / EMBEDDED_FILE
    with resource.open("rb") as packed, lzma.open(packed) as lines:
        for line in lines:
            yield Document(**json.loads(line))


def read_documents(
    paths: Sequence[Path], *, text_key: str = "text", valid: float = 0.02, test: float = 0.04
) -> Iterator[Document]:
    """Documents of files, and of directories searched recursively, in a fixed order; blank ones are left out.

    `.txt`: one document a file, UTF-8. `.jsonl` (`.gz`, `.xz`): one JSON object a line; `.parquet`: one row a
    document (needs pyarrow). Of a record's fields `text_key` is the text; "id", "source", "title" and "split"
    are used if present. Without "id" a document's id is its place (path below the given directory, and line
    or row); without "split" the split is a hash of the id (`split_of`).

    Args:
        paths: Files and directories. Other kinds are an error when named, and skipped in directories.
        text_key: Field that holds the text in JSON lines and parquet.
        valid: Share of documents for validation.
        test: Share of documents for the test split.

    Raises:
        UserError: At once for a missing path or an unknown kind of file; while reading for a bad record,
            named by file and line; at the end if there was no document.
    """
    how = Reading(text_key, valid, test)
    return _documents(corpus_files(paths), how)


def corpus_files(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """The files of a corpus in their fixed order, each with a name that does not depend on where the corpus lies.

    Raises UserError as `read_documents` does at once.
    """
    return [found for path in paths for found in _files(path)]


def documents_in(files: Sequence[tuple[Path, str]], how: Reading) -> Iterator[Document]:
    """Documents of such files in order, blank ones left out. Raises UserError for a bad record."""
    for file, name in files:
        for document in _read_file(file, name, how):
            if document.text.strip():
                yield document


def _documents(files: list[tuple[Path, str]], how: Reading) -> Iterator[Document]:
    found = False
    for document in documents_in(files, how):
        found = True
        yield document
    if not found:
        names = ", ".join(str(file) for file, _ in files[:3])
        raise UserError(f"the corpus is empty: no document with text in {names}")


def _files(path: Path) -> list[tuple[Path, str]]:
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(_ENDINGS))
        if not below:
            raise UserError(f"{path} holds no file to read: {', '.join(_ENDINGS)} are read")
        return [(file, file.relative_to(path).as_posix()) for file in below]
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.name.endswith(_ENDINGS):
        raise UserError(f"{path} is of an unknown kind: {', '.join(_ENDINGS)} are read")
    return [(path, path.name)]


def _read_file(file: Path, name: str, how: Reading) -> Iterator[Document]:
    if file.name.endswith(".parquet"):
        yield from _read_parquet(file, name, how)
        return
    try:
        if file.name.endswith(".txt"):
            text = _decoded(file.read_bytes(), f"{file}")
            yield Document(name, name, file.stem, text, split_of(name, how.valid, how.test))
            return
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    record = _json_record(line, f"{file}, line {number}")
                    yield _from_record(record, f"{file}, line {number}", f"{name}:{number}", how)
    except _READ_ERRORS as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _open(file: Path) -> BufferedIOBase:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    return lzma.open(file, "rb") if file.name.endswith(".xz") else file.open("rb")


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # some editors put a byte-order mark before the text
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}): convert it first") from error


def _json_record(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object")
    return record


def _from_record(record: Mapping[str, Any], where: str, place: str, how: Reading) -> Document:
    """The document of one JSON line or parquet row; `place` names it in the corpus, `where` in messages."""
    text = record.get(how.text_key)
    if not isinstance(text, str):
        raise UserError(f"{where} has no text under {how.text_key!r}: name the right field (text_key)")
    identity = record.get("id")
    name = place if identity is None else str(identity)
    split = record.get("split")
    if split is None:
        split = split_of(name, how.valid, how.test)
    elif split == "validation":
        split = "valid"
    if split not in SPLITS:
        raise UserError(f"{where} has the split {split!r}: use {', '.join(SPLITS)}, or leave the field out")
    source, title = record.get("source"), record.get("title")
    return Document(name, str(source or place.rpartition(":")[0]), str(title or name), text, split)


def _read_parquet(file: Path, name: str, how: Reading) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{file} needs pyarrow: pip install 'catmaps[data]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            present = table.schema_arrow.names
            if how.text_key not in present:
                columns = ", ".join(present)
                raise UserError(f"{file} has no column {how.text_key!r} (it has {columns}): name text_key")
            wanted = [key for key in (how.text_key, "id", "source", "title", "split") if key in present]
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=list(dict.fromkeys(wanted))):
                for record in batch.to_pylist():
                    row += 1
                    yield _from_record(record, f"{file}, row {row}", f"{name}:{row}", how)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
