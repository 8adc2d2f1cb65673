"""What a tokenizer is, and the two that need no training: text8's 27 symbols, and bytes."""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt

EOS_TOKEN = "<|eos|>"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Marks that canonical decomposition splits off a letter: dropped, so that "é" is "e" and not "e ".
COMBINING = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")
# Latin letters that do not decompose.
LETTERS = str.maketrans(
    {"æ": "ae", "œ": "oe", "ß": "ss", "ø": "o", "đ": "d", "ł": "l", "þ": "th", "ð": "d", "ı": "i", "ħ": "h"}
)
_KEPT = b"abcdefghijklmnopqrstuvwxyz0123456789"
_ASCII_CLASS = bytes(byte if byte in _KEPT else 32 for byte in range(256))


def id_dtype(vocab_size: int) -> np.dtype:
    """The little-endian unsigned type that holds ids below `vocab_size`: 2 bytes up to 65,536, else 4."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def well_formed(text: str) -> str:
    """`text` with lone surrogates, which JSON can carry and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer(ABC):
    """Text to ids in [0, vocab_size) and back.

    Attributes:
        name: Short name that is safe in file names and the same after saving and loading.
        vocab_size: Number of ids, the end-of-document id included.
        eos_id: Id that ends a document, or None where the alphabet has none (text8).
    """

    name: str
    vocab_size: int
    eos_id: int | None

    @property
    def dtype(self) -> np.dtype:
        """Unsigned type of the ids, by the size of the vocabulary."""
        return id_dtype(self.vocab_size)

    @abstractmethod
    def normalise(self, text: str) -> str:
        """The text that `encode` really encodes: characters and bytes are counted on it."""

    @abstractmethod
    def encode(self, text: str) -> UInt[np.ndarray, "_"]:
        """Ids of `normalise(text)`, no end-of-document id added; marks such as "<|eos|>" are plain text."""

    @abstractmethod
    def decode(self, ids: Integer[np.ndarray, "_"] | Sequence[int]) -> str:
        """Text of `ids`; the end-of-document id gives no text. Raises ValueError on an id out of range."""

    @abstractmethod
    def token_strings(self) -> list[str]:
        """One string to show for each id, `vocab_size` of them."""

    def encode_many(self, texts: Sequence[str]) -> list[UInt[np.ndarray, "_"]]:
        """`encode` of each text; on several cores where the tokenizer can."""
        return [self.encode(text) for text in texts]

    def _checked(self, ids: Integer[np.ndarray, "_"] | Sequence[int]) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(f"an id outside [0, {self.vocab_size}) cannot be decoded by {self.name}")
        return array


class Text8Tokenizer(Tokenizer):
    """The 27 symbols of text8: id 0 is the space, 1 to 26 are a to z. No end-of-document id.

    Normalisation is text8's: letters lowered, digits spelled out, everything else one space; accents are
    folded before. One space may remain at either end: a prompt's last space matters.

    Source: M. Mahoney, "About the test data" (the text8 filter).
    """

    name, vocab_size, eos_id = "text8", 27, None

    def normalise(self, text: str) -> str:
        return self._normal_bytes(text).decode("ascii")

    def encode(self, text: str) -> UInt[np.ndarray, "_"]:
        symbols = np.frombuffer(self._normal_bytes(text), dtype=np.uint8)
        return np.where(symbols == 32, 0, symbols - 96).astype(self.dtype)

    def decode(self, ids: Integer[np.ndarray, "_"] | Sequence[int]) -> str:
        array = self._checked(ids)
        return np.where(array == 0, 32, array + 96).astype(np.uint8).tobytes().decode("ascii")

    def token_strings(self) -> list[str]:
        return list(" abcdefghijklmnopqrstuvwxyz")

    def _normal_bytes(self, text: str) -> bytes:
        text = text.lower()
        if not text.isascii():
            folded = COMBINING.sub("", unicodedata.normalize("NFKD", text))
            # lowered twice: compatibility forms such as bold capitals are capitals only once decomposed
            text = folded.lower().translate(LETTERS)
        raw = text.encode("ascii", "replace").translate(_ASCII_CLASS)
        for digit, word in enumerate(DIGITS):
            raw = raw.replace(b"%d" % digit, b" %s " % word.encode())
        symbols = np.frombuffer(raw, dtype=np.uint8)
        kept = symbols != 32
        kept[1:] |= symbols[:-1] != 32  # the first space of each run
        kept[:1] = True
        return symbols[kept].tobytes()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    name, vocab_size, eos_id = "bytes", 257, 256

    def normalise(self, text: str) -> str:
        return well_formed(text)

    def encode(self, text: str) -> UInt[np.ndarray, "_"]:
        return np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(self.dtype)

    def decode(self, ids: Integer[np.ndarray, "_"] | Sequence[int]) -> str:
        array = self._checked(ids)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def token_strings(self) -> list[str]:
        return [chr(b) if 32 <= b < 127 or b in (9, 10) else f"\\x{b:02x}" for b in range(256)] + [EOS_TOKEN]
