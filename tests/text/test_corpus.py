"""Reading documents: every kind of file, splits by whole documents, and errors that name file and line."""

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from catmaps.errors import UserError
from catmaps.text.corpus import Document, embedded_documents, read_documents, split_of


def read(*paths: Path, text_key: str = "text", valid: float = 0.02, test: float = 0.04) -> list[Document]:
    return list(read_documents(paths, text_key=text_key, valid=valid, test=test))


def write_lines(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_embedded_corpus() -> None:
    documents = list(embedded_documents())
    assert len(documents) == 482
    assert len({document.id for document in documents}) == 482
    assert Counter(document.split for document in documents) == {"train": 454, "valid": 9, "test": 19}
    assert {document.source for document in documents} == {
        "sotu",
        "moby-dick",
        "kjv",
        "shakespeare",
        "milton",
    }
    size = Counter()
    for document in documents:
        size[document.split] += len(document.text.encode())
        assert document.split == split_of(document.id, 0.03, 0.03)
    assert size == {"train": 21348955, "valid": 338732, "test": 859455}


def test_split_shares() -> None:
    found = Counter(split_of(f"document {index}", 0.025, 0.1) for index in range(20000))
    # five standard deviations of the binomial
    assert abs(found["valid"] / 20000 - 0.025) < 5 * (0.025 / 20000) ** 0.5
    assert abs(found["test"] / 20000 - 0.1) < 5 * (0.1 / 20000) ** 0.5
    assert {split_of(str(index), 0.0, 0.0) for index in range(1000)} == {"train"}


def test_text_files_and_directories(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    (corpus / "b.txt").write_bytes("\ufeffséance\r\n".encode())
    (corpus / "deep" / "a.txt").write_text("two")
    (corpus / "blank.txt").write_text(" \n")
    (corpus / "picture.png").write_bytes(b"\x89")
    documents = read(corpus)
    assert [(document.id, document.title, document.text) for document in documents] == [
        ("b.txt", "b", "séance\r\n"),
        ("deep/a.txt", "a", "two"),
    ]
    moved = tmp_path / "moved"
    corpus.rename(moved)
    assert read(moved) == documents  # ids and splits do not depend on where the corpus lies


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    lines = [
        '{"text": "one", "id": 7, "source": "s", "title": "t", "split": "validation"}',
        "",
        '{"text": "two"}',
        '{"text": ""}',
    ]
    raw = "\n".join(lines).encode()
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes({"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending](raw))
    name = file.name
    assert read(file) == [
        Document("7", "s", "t", "one", "valid"),
        Document(f"{name}:3", name, f"{name}:3", "two", split_of(f"{name}:3")),
    ]


def test_text_key_and_held_out_shares(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"content": f"text {index}"} for index in range(200)])
    assert Counter(d.split for d in read(file, text_key="content", valid=0.0, test=0.0)) == {"train": 200}
    assert set(Counter(d.split for d in read(file, text_key="content", valid=0.3, test=0.3))) == {
        "train",
        "valid",
        "test",
    }
    with pytest.raises(UserError, match="below 1"):
        read(file, valid=0.5, test=0.5)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": ["x", "y"], "score": [1, 2]}), file)
    assert [(d.id, d.text, d.split) for d in read(file)] == [
        ("x", "one", split_of("x")),
        ("y", "two", split_of("y")),
    ]
    with pytest.raises(UserError, match=r"no column 'body'.*text, id, score"):
        read(file, text_key="body")
    parquet.write_table(pyarrow.table({"text": ["one", None]}), file)
    with pytest.raises(UserError, match="row 2 has no text"):
        read(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        read(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "two"', "not JSON"),
        (b'["two"]', "not a JSON object"),
        (b'{"body": "two"}', "no text under 'text'"),
        (b'{"text": 2}', "no text under 'text'"),
        (b'{"text": "tw\xff"}', "not UTF-8"),
        (b'{"text": "two", "split": "holdout"}', "split 'holdout'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        read(file)
    assert f"{file}, line 2" in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 \(byte 3\)"):
        read(latin)
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)):
        file = tmp_path / name
        file.write_bytes(pack(b'{"text": "one"}\n' * 1000)[:-12])
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read(file)
        file.write_bytes(b"no archive")
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read(file)


def test_wrong_paths_are_refused_before_reading(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_bytes(b"x")
    with pytest.raises(UserError, match="unknown kind"):
        read_documents([tmp_path / "notes.docx"])
    with pytest.raises(UserError, match="does not exist"):
        read_documents([tmp_path / "absent.txt"])
    with pytest.raises(UserError, match="holds no file"):
        read_documents([tmp_path])


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="corpus is empty"):
        read(tmp_path)
