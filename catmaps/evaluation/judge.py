"""The judge of sampled text: what training and held-out text give once, to measure every sample against."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from catmaps.errors import UserError
from catmaps.evaluation.ngram import NGramModel, NGramTable
from catmaps.text.metrics import TextEncoder, word_list

LETTERS = " abcdefghijklmnopqrstuvwxyz"
BLOCK = 8192  # characters of held-out text that stay together when it is divided
SCORED_EVERY = 4  # one block in four is scored by the reverse models, the others are drawn from
FORMAT = 1
PROBE_CHARS = 4096  # of text whose token ids tell one retokeniser from another


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How text is judged.

    Attributes:
        alphabet: The characters that text may hold, in the order of their ids; None for the bytes of UTF-8
            (bits are then per byte).
        forward_order: Length of the n-grams of the training text's model (6: contexts of five characters).
        reverse_order: Length of the n-grams of the models fitted to samples.
        reverse_chars: At most so many characters of samples are used to fit a reverse model.
        min_chars: Entropies and distinct-2 are measured on texts of at least so many characters.
    """

    alphabet: str | None = LETTERS
    forward_order: int = 6
    reverse_order: int = 4
    reverse_chars: int = 1_000_000
    min_chars: int = 1024

    @property
    def num_symbols(self) -> int:
        """Size of the alphabet of the n-gram models."""
        return 256 if self.alphabet is None else len(self.alphabet)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Everything that samples are measured against; built once, kept in a directory by `save`.

    Attributes:
        config: How text is judged.
        forward: The n-gram model of the training text.
        words: The words of the training text.
        retokenizer: Gives the token ids whose entropy is taken, whatever vocabulary a model has.
        scored: Blocks of held-out text which the reverse models, fitted to samples, are scored on.
        drawn: The other held-out text: real samples are cut from it. It shares no character with `scored`, so
            that real text too is scored on text it was not fitted to.
    """

    config: JudgeConfig
    forward: NGramModel
    words: frozenset[str]
    retokenizer: TextEncoder = field(repr=False)
    scored: tuple[str, ...] = field(repr=False)
    drawn: str = field(repr=False)

    @classmethod
    def build(
        cls,
        train: Sequence[str],
        heldout: Sequence[str],
        retokenizer: TextEncoder,
        config: JudgeConfig | None = None,
    ) -> "Judge":
        """Fit a judge to documents (seconds for 20 MB).

        Args:
            train: The documents a model was trained on, normalised as the model's own text is.
            heldout: Documents that no model has seen. Joined by spaces and cut into blocks of 8,192
                characters: one in four is scored, the rest is drawn from, so that both parts hold the same
                    mixture of sources.
            retokenizer: See the class.
            config: The defaults if None.

        Raises:
            UserError: If a text holds a character outside the alphabet, or there is too little text.
        """
        config = config or JudgeConfig()
        blocks = _blocks(" ".join(heldout))
        if len(blocks) < 2:
            raise UserError(f"too little held-out text to judge with: give more than {BLOCK:,} characters")
        ids = [encode_symbols(text, config.alphabet) for text in train]
        return cls(
            config=config,
            forward=NGramModel.fit(ids, config.forward_order, config.num_symbols),
            words=word_list(train),
            retokenizer=retokenizer,
            scored=tuple(blocks[::SCORED_EVERY]),
            drawn=" ".join(block for i, block in enumerate(blocks) if i % SCORED_EVERY),
        )

    def symbols(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "_"]]:
        """Ids of the characters of texts, for the n-gram models. Raises UserError outside the alphabet."""
        return [encode_symbols(text, self.config.alphabet) for text in texts]

    def text(self, symbols: Integer[np.ndarray, "l"]) -> str:
        """The text of character ids."""
        if self.config.alphabet is None:
            return bytes(symbols.tolist()).decode(errors="replace")
        return "".join(self.config.alphabet[i] for i in symbols.tolist())

    def save(self, directory: Path) -> None:
        """Write `judge.json` and `ngrams.npz` (arrays of numbers only). The retokeniser is not among them."""
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for n, table in enumerate(self.forward.tables, start=1):
            arrays[f"grams_{n}"], arrays[f"counts_{n}"] = table.grams, table.counts
        with (directory / "ngrams.npz").open("wb") as file:
            np.savez(file, **arrays)
        config = self.config
        record = {
            "format": FORMAT,
            "alphabet": config.alphabet,
            "forward_order": config.forward_order,
            "reverse_order": config.reverse_order,
            "reverse_chars": config.reverse_chars,
            "min_chars": config.min_chars,
            "words": sorted(self.words),
            "scored": self.scored,
            "drawn": self.drawn,
            "probe": _probe(self.retokenizer, self.drawn),
        }
        # written last: a directory with this file is whole
        (directory / "judge.json").write_text(json.dumps(record), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, retokenizer: TextEncoder) -> "Judge":
        """Read what `save` wrote; the retokeniser must be the one it was built with (its ids are compared).

        Raises:
            UserError: If there is no judge, it is of another format, or the retokeniser is another.
        """
        try:
            record = json.loads((directory / "judge.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{directory} holds no readable judge.json: build the judge again") from error
        if record.get("format") != FORMAT:
            raise UserError(f"the judge in {directory} was written by another version: build it again")
        if record["probe"] != _probe(retokenizer, record["drawn"]):
            raise UserError(f"the judge in {directory} has another retokeniser: pass that one or rebuild")
        config = JudgeConfig(
            alphabet=record["alphabet"],
            forward_order=record["forward_order"],
            reverse_order=record["reverse_order"],
            reverse_chars=record["reverse_chars"],
            min_chars=record["min_chars"],
        )
        return cls(
            config=config,
            forward=_load_model(directory / "ngrams.npz", config),
            words=frozenset(record["words"]),
            retokenizer=retokenizer,
            scored=tuple(record["scored"]),
            drawn=record["drawn"],
        )


def encode_symbols(text: str, alphabet: str | None) -> Integer[np.ndarray, "l"]:
    """Positions of the text's characters in the alphabet, or its UTF-8 bytes if that is None.

    Raises:
        UserError: If a character is not in the alphabet.
    """
    if alphabet is None:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
    codes = np.array([ord(character) for character in alphabet])
    by_code = np.argsort(codes)
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    rows = np.minimum(np.searchsorted(codes[by_code], points), len(codes) - 1)
    outside = np.flatnonzero(codes[by_code][rows] != points)
    if len(outside):
        found = chr(points[outside[0]])
        raise UserError(f"{found!r} is not in the judge's alphabet {alphabet!r}: normalise the text first")
    return by_code[rows].astype(np.uint32)


def _blocks(text: str) -> list[str]:
    return [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]


def _probe(retokenizer: TextEncoder, text: str) -> list[int]:
    return np.asarray(retokenizer.encode(text[:PROBE_CHARS])).tolist()


def _load_model(file: Path, config: JudgeConfig) -> NGramModel:
    tables = []
    with np.load(file, allow_pickle=False) as arrays:
        for n in range(1, config.forward_order + 1):
            tables.append(NGramTable.build(arrays[f"grams_{n}"], arrays[f"counts_{n}"], config.num_symbols))
    return NGramModel(config.forward_order, config.num_symbols, tuple(tables))
