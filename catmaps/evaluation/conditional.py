"""Draws of conditional bounds: how likely a continuation is after a clean prompt.

One draw is one row of a network call. It depends on the prompt, the continuation, its key and its index alone, never on
the rows beside it: rows can be dealt to batches and processes in any way. A batch holds rows of one prompt length and
one continuation length, because attention has no mask and a padded position would be read as text.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.flow.flow_map import Endpoint, FlowMap, MovingEndpoint
from catmaps.flow.interpolant import AnyState, State, root_snr
from catmaps.flow.likelihood import end_draws, path_draws
from catmaps.flow.noise import Noise
from catmaps.flow.times import Law, mixture
from catmaps.model import Run, load_run

T_MAX = 0.9
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 21, 1 << 28  # positions x vocabulary of a batch: on CPUs what stays in the caches
_ROTATION = 3 << 60  # a counter beyond those of other draws

Ids = Int[np.ndarray, "_"]
Kind = Literal["path", "end", "first", "greedy"]


@dataclass(frozen=True)
class PromptedMap(FlowMap):
    """A flow map of what follows a prompt: the prompt stands clean (s = t = 1) to the left, and is not returned.

    What is computed per vocabulary entry after the trunk, logits and losses, is then computed for the rest alone.
    """

    prompt: Int[Tensor, "b c"] = field(kw_only=True)

    def read(self, state: AnyState, s: Float[Tensor, "b #n"], t: Float[Tensor, "b #n"]) -> Endpoint:
        if not self.prompt.shape[1]:
            return super().read(state, s, t)
        rows, new, vocab_size = state.x.shape
        clean = state.x.new_zeros(rows, self.prompt.shape[1], vocab_size).scatter_(-1, self.prompt[..., None], 1.0)
        ones = s.new_ones(self.prompt.shape)
        whole_s, whole_t = (torch.cat([ones, time.expand(rows, new)], 1) for time in (s, t))
        hidden = self.denoiser.encode(State(torch.cat([clean, state.x], 1)), whole_s, whole_t)
        return Endpoint(self, hidden[:, -new:], state, s, t, torch.is_grad_enabled())

    def read_with_tangent(
        self, state: AnyState, s: Tensor, t: Tensor, *, ds: Tensor, dt: Tensor, dx: AnyState | None = None
    ) -> MovingEndpoint:
        raise NotImplementedError("a prompted map is for scoring: it has no tangents")


class Row(NamedTuple):
    """One draw.

    Of kind `path` and `end` the two parts of the bound (14); `first` the cross-entropy at t = 0, where nothing but the
    prompt is known; `greedy` is 1 if the continuation's first token is the likeliest there, else 0.
    """

    kind: Kind
    prompt: Ids
    continuation: Ids
    key: tuple[int, int]
    """(seed, `content_hash` of what should share random numbers)."""
    index: int
    """Number of the draw among those of its kind and key."""


def content_hash(*parts: Ids) -> int:
    """64 bits that tell token sequences apart on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


def radical_inverse(index: int) -> float:
    """The van der Corput sequence in base 2: 0, 1/2, 1/4, 3/4, ...; its first 2^k members are evenly spaced."""
    return int(f"{index:032b}"[::-1], 2) / 2**32


def path_place(key: tuple[int, int], index: int) -> float:
    """Place in [0, 1) of a draw in the law of time: the van der Corput sequence, rotated by a number of the key.

    However many draws are taken of a key, they are stratified, and each alone is uniform.
    """
    philox = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=[0, 0, 0, _ROTATION])
    return (radical_inverse(index) + np.random.Generator(philox).random()) % 1.0


def scoring_law(law: Law, clock: Law) -> Law:
    """Where times are drawn for choices: 0.4 the run's adaptive law, 0.4 its clock, 0.2 uniform in u^2 up to T_MAX.

    The adaptive law is made for the texts of the corpus, whose tokens are decided early. A wrong choice of -log p nats
    goes on paying until u^2 / 2 passes it, where that law hardly looks: rare draws would have huge weights.
    """

    def late(t: Tensor) -> Tensor:
        return (root_snr(t.clamp_max(T_MAX)) / root_snr(torch.tensor(T_MAX, dtype=torch.float64))).square()

    return mixture([(0.4, law), (0.4, clock), (0.2, Law.from_cdf(late))])


@dataclass(frozen=True)
class Scorer:
    """Computes rows with a flow map, in the dtype and on the device of its vectors."""

    flow_map: FlowMap
    law: Law
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, run: Run) -> "Scorer":
        """Of a run of family flow. On CPUs matrix products are fp32, so that a result depends on its batch by rounding.

        Raises:
            UserError: The run is a baseline.
        """
        flow_map, law = run.flow_map, scoring_law(run.law, run.clock)
        if run.device.type == "cpu":
            run.network.precision = torch.float32
        return cls(flow_map, law, run.device, run.network.log_prior.dtype)

    @property
    def elements(self) -> int:
        """Positions times vocabulary that one batch may hold."""
        return CPU_ELEMENTS if self.device.type == "cpu" else GPU_ELEMENTS

    def __call__(self, rows: Sequence[Row]) -> Float[np.ndarray, "_"]:
        """Values of rows of one kind, one prompt length and one continuation length: nats per continuation."""
        kind = rows[0].kind
        prompt, tokens = (
            torch.from_numpy(np.stack([row[part] for row in rows]).astype(np.int64)).to(self.device) for part in (1, 2)
        )
        flow_map = PromptedMap(self.flow_map.denoiser, self.flow_map.temperature, prompt=prompt)
        noise = torch.cat([self._noise(row) for row in rows]).to(self.device, self.dtype)
        noise = couple(noise, tokens)
        if kind == "path":
            place = torch.tensor([path_place(row.key, row.index) for row in rows], dtype=torch.float64)
            draws = path_draws(flow_map, tokens, place.to(self.device), self.law, noise, t_max=T_MAX)
        elif kind == "greedy":
            draws = _is_likeliest(flow_map, tokens, noise)
        else:
            draws = end_draws(flow_map, tokens, noise, t_max=T_MAX if kind == "end" else 0.0)
        return draws.sum(1).cpu().numpy()

    def _noise(self, row: Row) -> Float[Tensor, "1 n v"]:
        # Drawn position by position: a shorter continuation of the same key has the first part of a longer one's.
        stream = {"path": 0, "end": 1, "first": 2, "greedy": 2}[row.kind]
        index, size = torch.tensor([row.index]), self.flow_map.denoiser.vocab_size
        return Noise.of(row.key, index, len(row.continuation), size, stream).x


def couple(noise: Float[Tensor, "b n v"], tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
    """Swaps the noise of each position's own token with that of token 0; its law is the same as before.

    Rows that share random numbers then agree in what tells their draws apart most: the noise of the right token.
    """
    own = tokens[..., None]
    swapped = noise.scatter(-1, own, noise[..., :1])
    swapped[..., :1] = noise.gather(-1, own)
    return swapped


@torch.no_grad()
def _is_likeliest(flow_map: FlowMap, tokens: Int[Tensor, "b n"], noise: Float[Tensor, "b n v"]) -> Float[Tensor, "b 1"]:
    start = noise.new_zeros(len(tokens), 1)
    likeliest = flow_map.logits(State(noise), start, start)[:, 0].argmax(-1)
    return (likeliest == tokens[:, 0]).double()[:, None]


def batches(rows: Sequence[Row], vocab_size: int, elements: int) -> list[list[int]]:
    """Positions in `rows` of each batch, short rows first. The same rows in any order make the same batches."""

    def place(row: Row) -> tuple[int | str | bytes, ...]:
        lengths = len(row.prompt), len(row.continuation)
        return (sum(lengths), *lengths, row.kind, *row.key, row.index, row.continuation.tobytes(), row.prompt.tobytes())

    found: list[list[int]] = []
    group: tuple[int | str | bytes, ...] = ()
    for *kind, i in sorted((*place(row), i) for i, row in enumerate(rows)):
        most = max(1, elements // (int(kind[0]) * vocab_size))
        if tuple(kind[:4]) != group or len(found[-1]) == most:
            found.append([])
            group = tuple(kind[:4])
        found[-1].append(int(i))
    return found


Draw = Callable[[Sequence[Row]], Float[np.ndarray, "_"]]
"""Values of rows of any kind and length, in their order."""


@contextmanager
def drawing(scorer: Scorer, workers: int = 1, path: Path | None = None) -> Iterator[Draw]:
    """A function that draws rows: in this process, or dealt to `workers` processes that load the run at `path`.

    One-thread processes are faster than the threads of one process on small networks.
    """
    vocab_size, elements = scorer.flow_map.denoiser.vocab_size, scorer.elements

    def draw_by(deal: Callable[[list[list[Row]]], Iterator[Float[np.ndarray, "_"]]]) -> Draw:
        def draw(rows: Sequence[Row]) -> Float[np.ndarray, "_"]:
            # The longest first: a process that ended with one would keep the others waiting.
            values, parts = np.empty(len(rows)), batches(rows, vocab_size, elements)[::-1]
            for part, found in zip(parts, deal([[rows[i] for i in part] for part in parts]), strict=True):
                values[part] = found
            return values

        return draw

    if workers == 1 or path is None:
        yield draw_by(lambda parts: map(scorer, parts))
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _load, (path,)) as pool:
        yield draw_by(lambda parts: pool.map(_draw, parts))


_OWN: list[Scorer] = []  # of a worker


def _load(path: Path) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _OWN.append(Scorer.of(load_run(path)))


def _draw(rows: list[Row]) -> Float[np.ndarray, "_"]:
    return _OWN[0](rows)
