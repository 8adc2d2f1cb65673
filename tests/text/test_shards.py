"""Token shards: what is written is what is read, building is atomic, damage is refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from catmaps.errors import UserError
from catmaps.text import build, tokenizers
from catmaps.text.build import build_from_paths, build_shards, ensure_embedded
from catmaps.text.corpus import Document
from catmaps.text.manifest import Manifest, load_manifest
from catmaps.text.shards import load_boundaries, load_tokens, sequences, token_counts, verify
from catmaps.text.tokenizers import ByteTokenizer, Text8Tokenizer, Tokenizer


def document(text: str, split: str = "train") -> Document:
    return Document(text, "tests", text, text, split)


def made(out: Path, tokenizer: Tokenizer, texts: list[str], tokens_per_shard: int = 1 << 20) -> Manifest:
    documents = [document(text) for text in texts] + [document("Café held out", "valid")]
    return build_shards(documents, tokenizer, out, tokens_per_shard=tokens_per_shard, progress=False)


def test_text8_documents_are_joined_by_one_space(tmp_path: Path) -> None:
    texts = ["  One day, ", "日本", "2 cats!", "End"]
    manifest = made(tmp_path / "s", Text8Tokenizer(), texts, tokens_per_shard=5)
    tokens = load_tokens(tmp_path / "s", "train")
    text = Text8Tokenizer().decode(tokens)
    assert text == "one day two cats end"
    split = manifest.split("train")
    # the document in another script has no text here, and is no document
    assert (split.documents, split.characters, split.bytes, split.tokens) == (3, 20, 20, 20)
    assert load_boundaries(tmp_path / "s", "train").tolist() == [0, 8, 17]
    assert [shard.tokens for shard in split.shards] == [7, 9, 4]
    assert (manifest.vocab_size, manifest.eos_id, manifest.dtype) == (27, None, "uint16")


def test_eos_ends_every_document_and_is_no_character(tmp_path: Path) -> None:
    manifest = made(tmp_path / "s", ByteTokenizer(), ["né", "ab"], tokens_per_shard=4)
    raw = b"".join((tmp_path / "s" / f"train-0000{index}.bin").read_bytes() for index in (0, 1))
    expected = [*"né".encode(), 256, *b"ab", 256]
    assert np.frombuffer(raw, "<u2").tolist() == expected == load_tokens(tmp_path / "s", "train").tolist()
    split = manifest.split("train")
    assert (split.documents, split.characters, split.bytes, split.tokens) == (2, 4, 5, 7)
    assert load_boundaries(tmp_path / "s", "train").tolist() == [0, 4]
    assert manifest.split("valid").bytes == 14
    counts = token_counts(tmp_path / "s")
    assert counts.shape == (257,)
    assert counts.tolist() == np.bincount(expected, minlength=257).tolist()
    with pytest.raises(UserError, match="no split 'test'"):
        load_tokens(tmp_path / "s", "test")


def test_manifest_and_tokenizer_come_back(tmp_path: Path) -> None:
    tokenizer = tokenizers.train_bpe(["the cat sat"] * 9, 270)
    manifest = made(tmp_path / "s", tokenizer, ["the cat"])
    assert load_manifest(tmp_path / "s") == manifest == verify(tmp_path / "s")
    assert tokenizers.load(tmp_path / "s").decode(load_tokens(tmp_path / "s", "valid")) == "Café held out"


def test_shards_do_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text number {index}" for index in range(40)]
    first = made(tmp_path / "a", Text8Tokenizer(), texts, tokens_per_shard=100)
    monkeypatch.setattr(build, "_BATCH_CHARACTERS", 10)
    assert made(tmp_path / "b", Text8Tokenizer(), texts, tokens_per_shard=100) == first


def test_sequences(tmp_path: Path) -> None:
    made(tmp_path / "s", ByteTokenizer(), [bytes(range(100)).decode(), "xy"])
    tokens = load_tokens(tmp_path / "s", "train")
    whole = sequences(tmp_path / "s", "train", 8)
    assert whole.shape == (13, 8)
    assert whole.dtype == np.int64
    assert whole.ravel().tolist() == tokens[:104].tolist()
    assert sequences(tmp_path / "s", "train", 8, count=3).tolist() == whole[:3].tolist()
    chosen = sequences(tmp_path / "s", "train", 52, count=1, seed=3)
    assert chosen.tolist() in ([tokens[:52].tolist()], [tokens[52:104].tolist()])
    some = sequences(tmp_path / "s", "train", 8, count=6, seed=0)
    rows = [whole.tolist().index(row) for row in some.tolist()]
    assert len(some) == 6
    assert rows == sorted(rows)
    assert some.tolist() == sequences(tmp_path / "s", "train", 8, count=6, seed=0).tolist()
    assert some.tolist() != sequences(tmp_path / "s", "train", 8, count=6, seed=1).tolist()
    for length, count in ((8, 14), (200, None), (8, 0)):
        with pytest.raises(UserError, match="were asked for"):
            sequences(tmp_path / "s", "train", length, count=count)


def test_building_is_all_or_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield document("fine")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        build_shards(broken(), ByteTokenizer(), tmp_path / "s", progress=False)
    assert list(tmp_path.iterdir()) == []
    made(tmp_path / "s", ByteTokenizer(), ["old"])
    with pytest.raises(RuntimeError, match="power cut"):
        build_shards(broken(), ByteTokenizer(), tmp_path / "s", progress=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert ByteTokenizer().decode(load_tokens(tmp_path / "s", "train")) == "old"


def test_existing_directories(tmp_path: Path) -> None:
    made(tmp_path / "s", ByteTokenizer(), ["old"])
    with pytest.raises(UserError, match="exists"):
        made(tmp_path / "s", ByteTokenizer(), ["new"])
    build_shards([document("new")], ByteTokenizer(), tmp_path / "s", progress=False, overwrite=True)
    assert ByteTokenizer().decode(load_tokens(tmp_path / "s", "train")) == "new"
    assert not (tmp_path / "s" / "valid-00000.bin").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="not overwritten"):
        build_shards([document("x")], ByteTokenizer(), tmp_path / "home", progress=False, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        build_shards([document("x")], ByteTokenizer(), tmp_path / "file" / "s", progress=False)


def test_nothing_to_build(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document has any text"):
        build_shards([document("日本")], Text8Tokenizer(), tmp_path / "s", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train-00001.bin", "boundaries-train.u64", "counts-train.u64"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    made(tmp_path / "s", Text8Tokenizer(), ["one two", "three four", "five"], tokens_per_shard=5)
    file = tmp_path / "s" / name
    raw = file.read_bytes()

    file.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    verify(tmp_path / "s", hashes=False)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        verify(tmp_path / "s")

    for content, message in ((raw[:-1], "truncated"), (raw + b"\0", "too long"), (None, "missing")):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is {message}"):
            verify(tmp_path / "s", hashes=False)
        with pytest.raises(UserError, match=f"{name} is {message}"):
            load_tokens(tmp_path / "s", "train")


def test_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "s", Text8Tokenizer(), ["one"])
    file = tmp_path / "s" / "tokenizer.json"
    file.write_text('{"catmaps_tokenizer": "bytes"}')
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        verify(tmp_path / "s")
    file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        verify(tmp_path / "s", hashes=False)


def without_counts(directory: Path) -> None:
    """Makes shards what earlier versions wrote."""
    file = directory / "manifest.json"
    content = json.loads(file.read_text())
    for split in content["splits"].values():
        (directory / split.pop("counts")).unlink()
        del split["counts_sha256"]
    file.write_text(json.dumps(content))


def test_shards_of_earlier_versions_are_counted(tmp_path: Path) -> None:
    made(tmp_path / "s", ByteTokenizer(), ["né", "ab" * 40], tokens_per_shard=4)
    counts = token_counts(tmp_path / "s")
    without_counts(tmp_path / "s")
    assert verify(tmp_path / "s").split("train").counts is None
    assert token_counts(tmp_path / "s").tolist() == counts.tolist()


def test_counts_of_something_else_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "s", ByteTokenizer(), ["né"])
    file = tmp_path / "s" / "counts-train.u64"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"counts-train\.u64 is damaged"):
        token_counts(tmp_path / "s")


def test_id_outside_the_vocabulary_is_found(tmp_path: Path) -> None:
    made(tmp_path / "s", Text8Tokenizer(), ["one"])
    without_counts(tmp_path / "s")
    assert token_counts(tmp_path / "s").sum() == 3
    (tmp_path / "s" / "train-00000.bin").write_bytes(np.array([1, 99, 2], "<u2").tobytes())
    with pytest.raises(UserError, match=r"train-00000\.bin is damaged: id 99"):
        token_counts(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"dtype": "uint8"}, "is damaged"),
        ({"splits": None}, "is damaged"),
        ({"surprise": 1}, "is damaged"),
    ],
)
def test_wrong_manifests(tmp_path: Path, change: dict, message: str) -> None:
    made(tmp_path / "s", Text8Tokenizer(), ["one"])
    file = tmp_path / "s" / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError, match=message):
        load_manifest(tmp_path / "s")


def test_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    made(tmp_path / "s", Text8Tokenizer(), ["one"])
    file = tmp_path / "s" / "manifest.json"
    file.write_text(file.read_text().replace("train-00000.bin", "../train-00000.bin"))
    with pytest.raises(UserError, match="file name"):
        load_manifest(tmp_path / "s")
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        load_manifest(tmp_path / "s")
    with pytest.raises(UserError, match="holds no token shards"):
        load_manifest(tmp_path)


def write_corpus(folder: Path, train: int) -> Path:
    folder.mkdir()
    records = [{"text": f"the cat sat on mat {index}", "split": "train"} for index in range(train)]
    records.append({"text": "zzzz zzzz zzzz zzzz", "split": "valid"})
    file = folder / "corpus.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_build_from_paths_trains_on_the_train_split_only(tmp_path: Path) -> None:
    file = write_corpus(tmp_path / "c", train=30)
    manifest = build_from_paths([file], "bpe:320", tmp_path / "s")
    assert {name: split.documents for name, split in manifest.splits.items()} == {"train": 30, "valid": 1}
    strings = tokenizers.load(tmp_path / "s").token_strings()
    assert " cat" in strings
    assert "zz" not in strings
    with pytest.raises(UserError, match="exists"):
        build_from_paths([tmp_path / "absent"], "text8", tmp_path / "s")


def test_build_from_paths_needs_a_train_document(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none into train"):
        build_from_paths([write_corpus(tmp_path / "c", train=0)], "bytes", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_embedded_shards_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [document("some text to train on " * 5), document("valid", "valid")]
    monkeypatch.setattr(build, "embedded_documents", lambda: iter(few))
    specs = ("text8", "bytes", "bpe:260")
    folders = {spec: ensure_embedded(tmp_path, spec, progress=False) for spec in specs}
    assert [folder.name.rpartition("-")[0] for folder in folders.values()] == ["text8", "bytes", "bpe-260"]
    assert ensure_embedded(tmp_path, str(folders["bpe:260"]), progress=False) not in folders.values()

    shard = folders["text8"] / "train-00000.bin"
    stamp = shard.stat().st_mtime_ns
    assert ensure_embedded(tmp_path, "text8", progress=False) == folders["text8"]
    assert shard.stat().st_mtime_ns == stamp
    shard.write_bytes(b"")
    assert ensure_embedded(tmp_path, "text8", progress=False) == folders["text8"]
    verify(folders["text8"])


def test_process_that_comes_second_takes_the_first_ones_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile() -> Iterator[Document]:
        yield document("the same")
        monkeypatch.setattr(build, "embedded_documents", lambda: iter([document("the same")]))
        ensure_embedded(tmp_path, "bytes", progress=False)

    monkeypatch.setattr(build, "embedded_documents", meanwhile)
    folder = ensure_embedded(tmp_path, "bytes", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    verify(folder)
