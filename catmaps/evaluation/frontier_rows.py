"""Rows of a frontier, and the CSV file that keeps them."""

import csv
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from catmaps import __version__
from catmaps.errors import UserError
from catmaps.text.metrics import Mean


@dataclass(frozen=True, kw_only=True)
class RowKey:
    """What makes a row: two rows of one key would be the same texts.

    `weights` is the beginning of the SHA-256 of a run's weights, `corpus` of its data's manifest; controls have no
    weights, sampler, steps, temperature, noise, bend and batch; `noise` is the variance that renoise adds, a share
    of the path's, and times stand at (i / N)^`bend` of the clock. `judge` is a causal judge's id, or empty.
    `version` is that of catmaps: a sampler may change with it.
    """

    series: str
    weights: str = ""
    sampler: str = ""
    steps: int = 0
    temperature: float | None = None
    noise: float | None = None
    bend: float | None = None
    num: int
    num_texts: int
    batch: int = 0
    seed: int
    corpus: str
    judge: str
    version: str = __version__


@dataclass(frozen=True, kw_only=True)
class FrontierRow(RowKey):
    """Figures of one row. Bits are per character, entropies in nats, standard errors over texts.

    Of the `num` samples of the model's own length: forward, reverse, valid words, divergence (from as many held-out
    texts: 1 is equal) and all that begins with judge. Of the `num_texts` texts of 1,024 characters: the rest.
    `flattered` says what these repeat more than held-out text does, which flatters forward and judge bits.
    """

    calls: int
    seconds: float
    forward_bits: float
    forward_bits_stderr: float
    reverse_bits: float
    token_entropy: float
    token_entropy_stderr: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetition_rate: float
    compression_ratio: float
    valid_word_rate: float
    divergence: float
    divergence_stderr: float
    judge_bits: float | None = None
    judge_bits_stderr: float | None = None
    judge_gen_ppl: float | None = None
    judge_gen_ppl_stderr: float | None = None
    judge_token_entropy: float | None = None
    flattered: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Values of `RowKey`'s fields but for the name, by which a row is found again."""
        return key_of(self)

    @property
    def is_control(self) -> bool:
        return not self.weights

    @property
    def entropy(self) -> Mean:
        return Mean(self.token_entropy, self.token_entropy_stderr)

    def bits(self, judged: bool) -> Mean | None:
        """Forward bits, or the causal judge's (None if there is none)."""
        if not judged:
            return Mean(self.forward_bits, self.forward_bits_stderr)
        if self.judge_bits is None:
            return None
        return Mean(self.judge_bits, math.nan if self.judge_bits_stderr is None else self.judge_bits_stderr)


def key_of(row: RowKey) -> tuple[object, ...]:
    """Values of the key's fields; the name counts for controls only, a run's folder may move."""
    values = [getattr(row, f.name) for f in fields(RowKey) if f.name != "series"]
    return (*values, "" if row.weights else row.series)


def name_of(row: RowKey) -> str:
    if row.temperature is None:
        return row.series
    return f"{row.series}, {steps_of(row.steps)}, temperature {row.temperature:g}"


def steps_of(steps: int) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}"


def digest(file: Path) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def write_rows(file: Path, rows: Sequence[FrontierRow]) -> None:
    """Writes rows as CSV; the file is either the old or the new one. What is not known is empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft, names = file.with_name(f".{file.name}.draft"), [f.name for f in fields(FrontierRow)]
    with draft.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow(["" if value is None else value for value in values])
    os.replace(draft, file)


def read_rows(file: Path) -> list[FrontierRow]:
    """Reads what `write_rows` wrote; no rows if the file does not exist.

    Raises:
        UserError: If the file is something else, or of another version.
    """
    if not file.exists():
        return []
    types = get_type_hints(FrontierRow)
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != [f.name for f in fields(FrontierRow)]:
            raise UserError(
                f"{file} is not a frontier of this version of catmaps: move it away or choose another --out"
            )
        try:
            return [FrontierRow(**{k: _value(types[k], v) for k, v in row.items()}) for row in reader]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): move it away or choose another --out") from error


def _value(kind: Any, word: str) -> Any:
    options = get_args(kind) or (kind,)
    if word == "" and type(None) in options:
        return None
    return options[0](word)
