"""Tokenizers: hand-computed text8 normalisation, round trips, end-of-document ids, saving and loading."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import models, normalizers, pre_tokenizers

from catmaps.errors import UserError
from catmaps.text import tokenizers
from catmaps.text.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Text8Tokenizer, Tokenizer, train_bpe

TEXTS = [
    "the cat sat on the mat. ",
    "Voilà — 42 £ and ‘quotes’\n\n\ttabs",
    "日本語 🙂 <|eos|>",
    "  two  spaces  ",
]


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe(["the cat sat on the mat and the hat "] * 50, 300)


def word_level(*special: str) -> hf.Tokenizer:
    words = {word: index for index, word in enumerate(["[UNK]", "the", "cat", *special])}
    inner = hf.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("Hello, World!", "hello world "),
        ("don't", "don t"),
        ("1990", " one nine nine zero "),
        ("a1b", "a one b"),
        ("In 42 B.C.", "in four two b c "),
        ("naïve CAFÉ", "naive cafe"),
        ("yes—no", "yes no"),
        ("x² ½", "x two one two "),
        ("Æsir ﬁsh Straße Łódź", "aesir fish strasse lodz"),
        ("𝐁old Ａ", "bold a"),
        ("İstanbul", "istanbul"),
        ("日本\n\t 語", " "),
        (" a  b ", " a b "),
        ("\ud800x", " x"),
    ],
)
def test_text8_normalisation_by_hand(text: str, expected: str) -> None:
    tokenizer = Text8Tokenizer()
    assert tokenizer.normalise(text) == expected
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.normalise(expected) == expected


def test_text8_ids() -> None:
    ids = Text8Tokenizer().encode("A z!")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [1, 0, 26, 0]
    assert Text8Tokenizer().eos_id is None


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokenizer_is_lossless(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), 256]) == text == tokenizer.normalise(text)


@pytest.mark.parametrize("text", TEXTS)
def test_bpe_is_lossless_and_text_cannot_end_a_document(bpe: HuggingFaceTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.eos_id not in ids
    assert bpe.decode([*ids.tolist(), 0]) == text == bpe.normalise(text)


def test_bpe_merges_what_it_saw(bpe: HuggingFaceTokenizer) -> None:
    assert bpe.eos_id == 0
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode(" the cat")) == 2
    assert [ids.tolist() for ids in bpe.encode_many(["a", " the"])] == [
        bpe.encode("a").tolist(),
        bpe.encode(" the").tolist(),
    ]


@pytest.mark.parametrize("tokenizer", [Text8Tokenizer(), ByteTokenizer()])
def test_out_of_range_ids_are_not_decoded(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside"):
            tokenizer.decode([0, wrong])


def test_lone_surrogates_become_the_replacement_character(bpe: HuggingFaceTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.normalise("a\ud83db") == "a\ufffdb" == tokenizer.decode(tokenizer.encode("a\ud83db"))


def test_token_strings(bpe: HuggingFaceTokenizer) -> None:
    for tokenizer in (Text8Tokenizer(), ByteTokenizer(), bpe):
        strings = tokenizer.token_strings()
        assert len(strings) == tokenizer.vocab_size
        if tokenizer.eos_id is not None:
            assert strings[tokenizer.eos_id] == "<|eos|>"
    assert " the" in bpe.token_strings()


def test_save_and_load(tmp_path: Path, bpe: HuggingFaceTokenizer) -> None:
    for index, tokenizer in enumerate((Text8Tokenizer(), ByteTokenizer(), bpe)):
        folder = tmp_path / str(index)
        tokenizers.save(tokenizer, folder)
        for path in (folder, folder / "tokenizer.json"):
            again = tokenizers.load(path)
            assert (again.name, again.vocab_size, again.eos_id) == (
                tokenizer.name,
                tokenizer.vocab_size,
                tokenizer.eos_id,
            )
            for text in TEXTS:
                assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("name", ["</s>", "<|endoftext|>", "<eos>", "[SEP]"])
def test_usual_end_of_document_names_are_found(name: str) -> None:
    assert HuggingFaceTokenizer(word_level(name)).eos_id == 3


def test_end_of_document_token_by_name_survives_saving(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no end-of-document token"):
        HuggingFaceTokenizer(word_level("STOP"))
    tokenizers.save(HuggingFaceTokenizer(word_level("STOP", "</s>"), "STOP"), tmp_path)
    assert tokenizers.load(tmp_path).eos_id == 3
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "cat"}}))
    assert tokenizers.load(tmp_path).eos_id == 2


def test_hugging_face_settings_that_would_change_ids_are_off() -> None:
    inner = word_level("</s>")
    inner.enable_truncation(2)
    inner.enable_padding(length=5)
    assert HuggingFaceTokenizer(inner).encode("the cat the").tolist() == [1, 2, 1]


def test_vocabulary_with_a_gap() -> None:
    inner = hf.Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 5, "</s>": 2}, unk_token="[UNK]"))
    tokenizer = HuggingFaceTokenizer(inner)
    assert tokenizer.vocab_size == 6
    assert tokenizer.token_strings() == ["[UNK]", "<unused 1>", "</s>", "<unused 3>", "<unused 4>", "cat"]
    assert tokenizer.decode([1, 5]) == "cat"


def test_large_vocabularies_take_four_bytes() -> None:
    words = {f"w{index}": index for index in range(65536)} | {"</s>": 65536}
    tokenizer = HuggingFaceTokenizer(hf.Tokenizer(models.WordLevel(words, unk_token="w0")))
    assert tokenizer.encode("w7").dtype == np.uint32
    assert ByteTokenizer().dtype == np.uint16


def test_normalise_follows_the_normaliser() -> None:
    inner = word_level("</s>")
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend("▁")])
    assert HuggingFaceTokenizer(inner).normalise("The Cat") == "the cat"


def test_from_spec(tmp_path: Path) -> None:
    assert tokenizers.from_spec("text8").name == "text8"
    assert tokenizers.from_spec("bytes").name == "bytes"
    trained = tokenizers.from_spec("bpe:260", ["aaa bbb aaa bbb"])
    assert trained.name == "bpe-260"
    tokenizers.save(trained, tmp_path)
    assert tokenizers.from_spec(str(tmp_path)).name == "bpe-260"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:many", "must be a number"),
        ("bpe:256", "257"),
        ("no/such/tokenizer.json", "unknown tokenizer 'no/such/tokenizer.json'"),
    ],
)
def test_wrong_specs(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizers.from_spec(spec, ["text"])
    with pytest.raises(UserError, match="must be trained"):
        tokenizers.from_spec("bpe:300")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"catmaps_tokenizer": "runes"}', "'runes'"),
        ('{"version": "1.0"}', "not a readable Hugging Face tokenizer"),
    ],
)
def test_damaged_tokenizer_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        tokenizers.load(file)
    assert str(file) in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        tokenizers.load(tmp_path / "absent.json")
