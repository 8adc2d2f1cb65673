"""Standard normal noise as a pure function of counters: nothing is stored, any part is made again when it is needed.

A number depends on (seed, step), the global index of its sample, its position and its token only, by Philox4x32-10 and
the Box-Muller transform, on every device alike (up to the last bits of its log and cos).

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.tiles import Projection, Tile, fused

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Key = tuple[int, int]


def philox(counter: Words, key: tuple[Tensor, Tensor], rounds: int = 10) -> Words:
    """Four random 32-bit words for each counter of four such words, under a key of two; all in int64.

    A word is cut to 32 bits where it is multiplied, and at the end; written in place, for the sake of CPUs.
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(rounds):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # 64 bits that wrap; masked, they are right
        a = (second >> 32).bitwise_xor_(b).bitwise_xor_(k).bitwise_and_(LOW)
        c = (first >> 32).bitwise_xor_(d).bitwise_xor_(m).bitwise_and_(LOW)
        b, d = second, first
        k, m = (k + WEYL[0]) & LOW, (m + WEYL[1]) & LOW
    return a, b & LOW, c, d & LOW


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2 * torch.log((a.float() + 0.5) * 2.0**-32).clamp_max(0))
    angle = b.float() * (2 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


@fused
def _normals(sample: Tensor, position: Tensor, quad: Tensor, key: Tensor) -> Tensor:
    place = position | (sample >> 32 & 0xFFF) << 20
    counter = torch.broadcast_tensors(quad, place[..., None], sample[..., None] & LOW, key[2])
    words = philox(counter, (key[0], key[1]))
    four = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.cat(four, -1)


def normals(
    key: Key, sample: Int[Tensor, "b l"], position: Int[Tensor, "b l"], size: int, stream: int = 0
) -> Float[Tensor, "b l {size}"]:
    """`size` standard normal numbers, fp32, for each (sample, position), on their device.

    Args:
        key: (seed, step), non-negative.
        sample: Global index of a sample, below 2^44.
        position: Place in its text, below 2^20.
        size: How many; numbers of another size are others.
        stream: Tells apart what one position needs several of, below 65,536.
    """
    seed, step = key
    words = torch.tensor([seed & LOW, step & LOW, (seed >> 32 & 0xFFFF) << 16 | stream], device=sample.device)
    quad = torch.arange(-(-size // 4), device=sample.device)
    return _normals(sample, position, quad, words)[..., :size]


@dataclass(frozen=True, eq=False)
class Noise:
    """x_0 ~ N(0, I_V) at every position, made when asked for."""

    key: Key
    sample: Int[Tensor, "b l"]
    position: Int[Tensor, "b l"]
    vocab_size: int
    stream: int = 0
    sign: int = 1

    @classmethod
    def of(cls, key: Key, sample: Int[Tensor, "b"], length: int, vocab_size: int, stream: int = 0) -> "Noise":
        """The noise of whole texts with these global indices."""
        place = torch.arange(length, device=sample.device).expand(len(sample), -1)
        return cls(key, sample[:, None].expand(-1, length), place, vocab_size, stream)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, length = self.sample.shape
        return batch, length, self.vocab_size

    def __getitem__(self, rows: slice | Tensor) -> "Noise":
        """The noise of some sequences of the batch."""
        return replace(self, sample=self.sample[rows], position=self.position[rows])

    @property
    def x(self) -> Float[Tensor, "b l v"]:
        """Drawn anew each time: the caller may overwrite it."""
        return self._normals(self.vocab_size)

    def __neg__(self) -> "Noise":
        return replace(self, sign=-self.sign)

    def _normals(self, size: int) -> Tensor:
        drawn = normals(self.key, self.sample, self.position, size, self.stream)
        return drawn if self.sign > 0 else -drawn

    def cut(self, tile: Tile) -> "Noise":
        return replace(self, sample=tile(self.sample), position=tile(self.position))

    def project(self, projection: Projection) -> Float[Tensor, "b l d"]:
        """x_0 W in law, from d numbers a position: n C' ~ N(0, W' W), and nothing but x_0 W is ever seen.

        Not the projection of this very `x`; where both are looked at, project that.
        """
        return self._normals(projection.factor.shape[0]) @ projection.factor.mT


def uniforms(key: Key, sample: Int[Tensor, "b l"], position: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """A number in [0, 1), fp64, for each (sample, position); arguments as `normals`."""
    seed, step = key
    words = torch.tensor([seed & LOW, step & LOW, (seed >> 32 & 0xFFFF) << 16], device=sample.device)
    place = position | (sample >> 32 & 0xFFF) << 20
    counter = torch.broadcast_tensors(torch.zeros_like(sample), place, sample & LOW, words[2])
    high, low, _, _ = philox(counter, (words[0], words[1]))
    return ((high >> 5 << 26) + (low >> 6)).double() * 2.0**-53


@dataclass
class RowStreams:
    """Randomness for a batch whose rows have their own each, where a generator would deal to the batch as a whole.

    What a row is dealt depends on its index and on how often the batch was dealt to, never on the rows beside it.
    """

    sample: Int[Tensor, "b"]
    """Index of each row's stream, below 2^44; streams of one index are the same."""
    dealt: int = 0

    def _next(self) -> Key:
        self.dealt += 1
        return 0, self.dealt

    def noise(self, length: int, vocab_size: int) -> Noise:
        """Fresh noise for texts of `length` tokens."""
        return Noise.of(self._next(), self.sample, length, vocab_size)

    def uniform(self, length: int) -> Float[Tensor, "b {length}"]:
        """Fresh numbers in [0, 1), fp64, on the rows' device."""
        place = torch.arange(length, device=self.sample.device).expand(len(self.sample), -1)
        return uniforms(self._next(), self.sample[:, None].expand(-1, length), place)


@runtime_checkable
class Streams(Protocol):
    """Randomness by row: noise from counters, and numbers in [0, 1)."""

    def noise(self, length: int, vocab_size: int) -> Noise: ...
    def uniform(self, length: int) -> Tensor: ...


Randomness = torch.Generator | Streams
"""What samplers draw from."""


def random_key(generator: torch.Generator | None) -> Key:
    """A key from a generator; the global one if None."""
    device = generator.device if generator is not None else None
    first, second = torch.randint(2**32, (2,), generator=generator, device=device).tolist()
    return first, second


def fresh_noise(
    generator: torch.Generator | None, shape: tuple[int, int, int], device: torch.device | None = None
) -> Noise:
    """Noise of a batch (B, L, V) under the next key of a generator."""
    return Noise.of(random_key(generator), torch.arange(shape[0], device=device), *shape[1:])


@dataclass
class Shared:
    """What a batch draws, kept: its rows can then be carried to text a few at a time, and each meets what it would have
    met beside the others. Noise is kept as counters."""

    source: Randomness | None
    batch: int
    device: torch.device | None = None
    drawn: list[Any] = field(default_factory=list)

    def rows(self, rows: slice) -> "SharedRows":
        """The share of some rows, from the first draw on."""
        return SharedRows(self, rows)

    def nth(self, place: int, draw: Callable[[], Any]) -> Any:
        """The draw of this place, made by the first who comes to it."""
        if place == len(self.drawn):
            self.drawn.append(draw())
        return self.drawn[place]


@dataclass
class SharedRows:
    """Some rows' share of `Shared`."""

    shared: Shared
    of: slice
    place: int = 0

    def _next(self, draw: Callable[[], Any]) -> Any:
        self.place += 1
        return self.shared.nth(self.place - 1, draw)[self.of]

    def noise(self, length: int, vocab_size: int) -> Noise:
        """As `RowStreams.noise`."""
        source, shape = self.shared.source, (self.shared.batch, length, vocab_size)
        if isinstance(source, Streams):
            return self._next(lambda: source.noise(length, vocab_size))
        return self._next(lambda: fresh_noise(source, shape, self.shared.device))

    def uniform(self, length: int) -> Float[Tensor, "b {length}"]:
        """As `RowStreams.uniform`."""
        source, shape = self.shared.source, (self.shared.batch, length)
        if isinstance(source, Streams):
            return self._next(lambda: source.uniform(length))
        given = {"generator": source, "dtype": torch.float64, "device": self.shared.device}
        return self._next(lambda: torch.rand(shape, **given))
