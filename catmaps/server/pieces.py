"""Windows of text to be drawn, many of them together: what a batch of the server is made of.

A piece is one window of one text. Pieces that agree in `key` are rows of one batch, and each has a stream of random
numbers of its own, so that what is drawn for it does not depend on the rows beside it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.noise import RowStreams
from catmaps.generation import SamplingConfig, draw
from catmaps.model import Run

LEAST_POSITIONS = 512
"""Smaller batches are filled up with copies: below that, matrix products on CPUs choose other kernels, whose last bits
differ. From there on a text was the same to the bit in every batch that was tried."""
WATCHED_NUMBERS = 1 << 25
"""Positions times vocabulary of a batch that is watched: every step makes that many probabilities."""

Ids = Int[np.ndarray, " _"]


class Settings(NamedTuple):
    """How a piece is drawn."""

    sampler: str
    steps: int
    temperature: float
    top_p: float
    noise: float | None = None

    @property
    def config(self) -> SamplingConfig:
        return SamplingConfig(**self._asdict(), batch=1)


class Draft(NamedTuple):
    """What a step believed the end of a piece's text to be: at each of L positions its `top` likeliest tokens."""

    t: float
    """The time that the step arrived at."""
    ids: Int[np.ndarray, "l top"]
    """Likeliest first."""
    probabilities: Float[np.ndarray, "l top"]


OnStep = Callable[[Draft], None]


class Abandoned(Exception):
    """Nobody waits for any row of a batch any more."""


@dataclass(eq=False)
class Piece:
    """A window of text, given where `known`."""

    tokens: Int[np.ndarray, "l"]
    known: Bool[np.ndarray, "l"]
    settings: Settings
    stream: int
    """Index of its random numbers (`stream_of`)."""
    top: int = 1
    """Alternatives of a draft."""
    on_step: OnStep | None = None
    """Sees the draft after every step, in the thread that draws."""
    abandoned: bool = field(default=False, init=False)
    """Nobody waits for it any more."""

    @property
    def key(self) -> tuple[Settings, int, bool, bool]:
        """Pieces that agree in this share a batch."""
        return self.settings, len(self.tokens), bool(self.known.any()), self.on_step is not None


def stream_of(seed: int, *place: int) -> int:
    """Index of the random numbers of a seed's text at a place: 44 bits of a hash."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 20


def padded(tokens: Ids, known: Bool[np.ndarray, " _"], window: int) -> tuple[Ids, Bool[np.ndarray, " _"]]:
    """A text with its length rounded up to a multiple of an eighth of the run's window, so that near lengths are one.

    What is added is drawn with the rest, as text that follows, and cut off.
    """
    grain = max(1, window // 8)
    more = min(window, -(-len(tokens) // grain) * grain) - len(tokens)
    return np.pad(tokens, (0, more)), np.pad(known, (0, more))


def most_rows(piece: Piece, run: Run, rows: int) -> int:
    """How many pieces like this one a batch may hold, at most `rows`."""
    if piece.on_step is None:
        return rows
    return min(rows, max(1, WATCHED_NUMBERS // (len(piece.tokens) * run.tokenizer.vocab_size)))


def least_rows(piece: Piece) -> int:
    """As many cost the same as one."""
    return -(-LEAST_POSITIONS // len(piece.tokens))


def draw_pieces(run: Run, pieces: Sequence[Piece]) -> list[Ids]:
    """Draws pieces of one key; their whole windows, in their order.

    Raises:
        Abandoned: All of them were given up meanwhile.
    """
    first = pieces[0]
    rows = [*pieces, *[first] * (least_rows(first) - len(pieces))]
    streams = RowStreams(torch.tensor([piece.stream for piece in rows], device=run.device))
    tokens = known = None
    if first.known.any():
        tokens, known = (
            torch.from_numpy(np.stack([getattr(piece, name) for piece in rows])).to(run.device)
            for name in ("tokens", "known")
        )
    shape = len(rows), len(first.tokens)

    def watch(t: float, endpoint: Float[Tensor, "b l v"]) -> None:
        if all(piece.abandoned for piece in pieces):
            raise Abandoned
        for piece, row in zip(pieces, endpoint, strict=False):
            if piece.on_step is not None and not piece.abandoned:
                piece.on_step(_draft(t, row, piece.top))

    # Where states are not held, to watch is to make what is otherwise never made.
    watched = first.on_step is not None or run.flow_map.holds(*shape)
    drawn = draw(run, shape, tokens, known, first.settings.config, streams, watch if watched else None)
    return list(drawn[: len(pieces)].cpu().numpy())


def _draft(t: float, endpoint: Float[Tensor, "l v"], top: int) -> Draft:
    values, ids = endpoint.float().topk(min(top, endpoint.shape[-1]), dim=-1)
    return Draft(t, ids.cpu().numpy(), values.cpu().numpy())
