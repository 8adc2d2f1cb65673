"""Tokenizers by name or file: text8, bytes, trained BPE, and any Hugging Face `tokenizer.json`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from jaxtyping import Integer, UInt
from tokenizers import decoders, models, pre_tokenizers, trainers

from catmaps.errors import UserError
from catmaps.text.alphabets import EOS_TOKEN, ByteTokenizer, Text8Tokenizer, Tokenizer, well_formed

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "Text8Tokenizer",
    "Tokenizer",
    "from_spec",
    "load",
    "save",
    "train_bpe",
]

_USUAL_EOS = (EOS_TOKEN, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
_OURS = "catmaps_tokenizer"
_METASPACE = "▁"  # how SentencePiece-like tokenizers write a space


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, with its padding, truncation and added special tokens switched off.

    Args:
        tokenizer: Any; taken over, not copied.
        eos_token: Token that ends a document. If None, the first of the usual names that it has.

    Raises:
        UserError: If `eos_token` is not in the vocabulary, or no usual name is.
    """

    def __init__(self, tokenizer: hf.Tokenizer, eos_token: str | None = None) -> None:
        self.inner = tokenizer
        self.inner.no_padding()
        self.inner.no_truncation()
        self.inner.encode_special_tokens = True  # a document that quotes "<|eos|>" must not end there
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError("the tokenizer has an empty vocabulary: give a trained tokenizer.json")
        self.vocab_size = max(vocabulary.values()) + 1  # not their number: published ones have gaps
        self.name = f"{type(tokenizer.model).__name__.lower()}-{self.vocab_size}"
        names = _USUAL_EOS if eos_token is None else (eos_token,)
        found = next((name for name in names if name in vocabulary), None)
        if found is None:
            raise UserError(
                f"the tokenizer has no end-of-document token ({', '.join(names)}): "
                'name one of its tokens as "eos_token" in tokenizer_config.json beside it'
            )
        self.eos_token = found
        self.eos_id = vocabulary[found]
        self._unused = sorted(set(range(self.vocab_size)) - set(vocabulary.values()))

    def normalise(self, text: str) -> str:
        text = well_formed(text)
        if self.inner.normalizer is None:
            return text
        normal = self.inner.normalizer.normalize_str(text).replace(_METASPACE, " ")
        # a space that the normaliser puts before every text is no character of the text
        return normal[1:] if normal.startswith(" ") and not text.startswith(" ") else normal

    def encode(self, text: str) -> UInt[np.ndarray, "_"]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[UInt[np.ndarray, "_"]]:
        whole = [well_formed(text) for text in texts]
        encodings = self.inner.encode_batch_fast(whole, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Integer[np.ndarray, "_"] | Sequence[int]) -> str:
        array = self._checked(ids)
        kept = array[array != self.eos_id]
        if self._unused:
            kept = kept[~np.isin(kept, self._unused)]
        return self.inner.decode(kept.tolist(), skip_special_tokens=False)

    def token_strings(self) -> list[str]:
        byte_level = isinstance(self.inner.decoder, decoders.ByteLevel)
        special = self.inner.get_added_tokens_decoder()
        strings = []
        for index in range(self.vocab_size):
            token = self.inner.id_to_token(index)
            if token is None:
                strings.append(f"<unused {index}>")
            elif byte_level and index not in special:
                strings.append(self.inner.decode([index], skip_special_tokens=False))
            else:
                strings.append(token.replace(_METASPACE, " "))
        return strings


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Byte-level BPE trained on `texts`, whose id 0 is "<|eos|>"; lossless on any text.

    Few texts may give fewer ids than `vocab_size`. Raises UserError if `vocab_size` is below 257.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"a byte-level BPE of {vocab_size} tokens cannot hold 256 bytes and EOS: ask for 257 or more")
    tokenizer = hf.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((well_formed(text) for text in texts), trainer)
    return HuggingFaceTokenizer(tokenizer, EOS_TOKEN)


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json` (and, for Hugging Face ones, `tokenizer_config.json`) into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "tokenizer.json"
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        file.write_text(json.dumps({_OURS: tokenizer.name}) + "\n", encoding="utf-8")
        return
    file.write_text(tokenizer.inner.to_str(), encoding="utf-8")
    settings = {"eos_token": tokenizer.eos_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Tokenizer:
    """Read a tokenizer from a `tokenizer.json` or the directory that holds one.

    Raises:
        UserError: If the file is missing, damaged or of an unknown kind, or has no end-of-document token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    content, config = _read_json(file), file.parent / "tokenizer_config.json"
    settings = _read_json(config) if config.is_file() else {}
    for where, found in ((file, content), (config, settings)):  # exported ones are named in their settings
        if _OURS in found:
            return _built_in(str(found[_OURS]), f"{where}")
    try:
        inner = hf.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file} is not a readable Hugging Face tokenizer ({error})") from error
    eos = settings.get("eos_token")
    if isinstance(eos, dict):
        eos = eos.get("content")
    try:
        return HuggingFaceTokenizer(inner, eos if isinstance(eos, str) else None)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def from_spec(spec: str, texts_for_training: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that `spec` names: "text8", "bytes", "bpe:4096", or the path of a tokenizer.json.

    `texts_for_training` is read, once, only for "bpe:...". Raises UserError where `spec` is none of these.
    """
    if spec in ("text8", "bytes"):
        return _built_in(spec, "the tokenizer spec")
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdecimal():
            raise UserError(f"tokenizer {spec!r}: the size must be a number, as in bpe:4096")
        if texts_for_training is None:
            raise UserError(f"tokenizer {spec!r} must be trained: give texts, or a trained tokenizer.json")
        return train_bpe(texts_for_training, int(size))
    if not Path(spec).exists():
        raise UserError(f"unknown tokenizer {spec!r}: use text8, bytes, bpe:SIZE or the path of a tokenizer.json")
    return load(Path(spec))


def _built_in(name: str, where: str) -> Tokenizer:
    if name == "text8":
        return Text8Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    raise UserError(f"{where} names an unknown tokenizer {name!r}: text8 and bytes are known")


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: a JSON object was expected")
    return content
