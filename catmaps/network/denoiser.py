"""The network as the mathematics sees it: encode a state, then logits for any of its positions."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from catmaps.network.embedding import BeliefEmbedding, Conditioner, KeptCast, LinearEmbedding, distinct
from catmaps.network.trunk import Trunk
from catmaps.tiles import NUMBERS, MovingReadout, Projection, Readout, Tile, over_tiles
from catmaps.weights import Weight


@runtime_checkable
class NoisyText(Protocol):
    """What the network asks of the flow's state: x whole, in tiles, or projected to its own width."""

    if TYPE_CHECKING:  # a check at run time would ask for it, and asking makes it

        @property
        def x(self) -> Tensor: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def requires_grad(self) -> bool: ...
    def cut(self, tile: Tile) -> "NoisyText": ...
    def project(self, projection: Projection) -> Tensor: ...


@runtime_checkable
class Gain(Protocol):
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def __call__(self, s: Tensor, t: Tensor) -> Tensor: ...
    def tangent(self, s: Tensor, t: Tensor, ds: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class Features(Protocol):
    size: int

    def __call__(self, t: Tensor) -> Tensor: ...
    def tangent(self, t: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Shape of the network."""

    width: int = 256
    """Residual width d, a multiple of `heads` with an even quotient."""
    blocks: int = 5
    heads: int = 4
    conditioning: int = 64
    """Width of the time conditioning shared by all blocks."""
    mlp_ratio: int = 4
    neighbours: int = 0
    """How many positions to either side enter attention and MLP beside a position's own; 0: none."""
    input: Literal["belief", "linear"] = "belief"
    """How noisy text enters (docs/maths.md (a))."""
    skip: bool = True
    """Add each position's own evidence, gain(s, t) x, to its logits."""

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.heads, self.conditioning, self.mlp_ratio) < 1:
            raise ValueError("every size of the network must be at least 1")
        if self.neighbours < 0:
            raise ValueError(f"network.neighbours must not be negative, as {self.neighbours} is")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} must be heads ({self.heads}) times an even number")


class FlowNetwork(nn.Module):
    """A denoiser: (state at s, s, t) -> logits of the endpoint mu_{s,t}.

    Times have shape (B, 1) or (B, L). `precision` is the dtype of matrix products (bf16 runs under autocast; softmax,
    gains and logits' sums stay fp32). `tile` is the size of a tile of vocabulary-sized work, in numbers.

    Args:
        config: Shape.
        features: Embeds a time per position; a module (its buffers are stored with the weights).
        gains: Gains of the input and of the output skip; modules.
        log_prior: log of the smoothed unigram of the training text, (V,); the logits' bias and the belief's prior.
    """

    log_prior: Tensor
    features: Features
    gain_in: Gain
    gain_out: Gain

    def __init__(self, config: NetworkConfig, features: Features, gains: tuple[Gain, Gain], log_prior: Tensor) -> None:
        super().__init__()
        self.config, self.precision, self.tile = config, torch.float32, NUMBERS
        self._cast = KeptCast()
        self._leaf: Weight | None = None
        vocab_size, width = len(log_prior), config.width
        self.register_buffer("log_prior", log_prior.float())
        self.features, (self.gain_in, self.gain_out) = features, gains
        embedding = BeliefEmbedding if config.input == "belief" else LinearEmbedding
        self.embedding = embedding(vocab_size, width)
        self.conditioner = Conditioner(features.size, config.conditioning)
        shape = (config.blocks, config.heads, config.conditioning, config.mlp_ratio, config.neighbours)
        self.trunk = Trunk(width, *shape)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What the parts do not know: logits start at the log prior."""
        nn.init.zeros_(self.head.weight)

    def forget_casts(self) -> None:
        """Drops kept casts and factors of the tables, whose values have changed under the same address and version."""
        self._cast = KeptCast()
        self.embedding.forget_casts()

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    def _autocast(self) -> torch.autocast:
        device = self.log_prior.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def encode(self, state: NoisyText, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l d"]:
        """Hidden vectors of every position, (B, L, d)."""
        (s_k, t_k), index = distinct(s, t)
        phi_s, phi_t, gain = self.features(s_k), self.features(t_k), self.gain_in(s, t)
        with self._autocast():
            condition = self.conditioner(phi_s, phi_t)
            return self.trunk(self._embed(state, gain, s), condition, index)

    def encode_with_tangent(
        self,
        state: NoisyText,
        s: Float[Tensor, "b #l"],
        t: Float[Tensor, "b #l"],
        ds: Float[Tensor, "b #l"],
        dt: Float[Tensor, "b #l"],
        dx: NoisyText | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """`encode` and its derivative along (dx, ds, dt); dx = None means the state is held."""
        (s_k, t_k, ds_k, dt_k), index = distinct(s, t, ds, dt)
        phi_s, phi_t = self.features.tangent(s_k, ds_k), self.features.tangent(t_k, dt_k)
        gain = self.gain_in.tangent(s, t, ds, dt)
        with self._autocast():
            condition = self.conditioner.forward_with_tangent(phi_s, phi_t)
            x = self._embed_with_tangent((state, dx), gain, (s, ds))
            return self.trunk.forward_with_tangent(x, condition, index)

    @property
    def projects(self) -> bool:
        """Whether x is seen through x W alone: then no state need hold or make x."""
        return isinstance(self.embedding, LinearEmbedding) and self.embedding.projects and not self.config.skip

    def _embed(self, state: NoisyText, gain: Tensor, s: Tensor) -> Tensor:
        if isinstance(self.embedding, LinearEmbedding):
            return self.embedding(project(self, state), s)
        embedding = self.embedding

        def work(tile: Tile, table: Weight, gain: Weight) -> Tensor:
            # Not a call of the module: its hooks do not suit a tile that is done again.
            return embedding.forward(tile(state).x, tile(gain.leaf), self.log_prior, table)

        return self._in_tiles(work, state, embedding, gain)

    def _in_tiles(
        self, work: Callable[..., Tensor], state: NoisyText, embedding: BeliefEmbedding, *gains: Tensor
    ) -> Tensor:
        """`work` of (tile, table, *gains)."""
        table = embedding.table.weight
        if state.requires_grad:
            return over_tiles(lambda tile: work(tile, *map(Weight.plain, (table, *gains))), state.shape, self.tile)
        cast = embedding.cast(table, self.precision)
        weights = [(table, cast), *((gain, gain) for gain in gains)]
        return over_tiles(work, state.shape, self.tile, weights)

    def _embed_with_tangent(
        self, state: tuple[NoisyText, NoisyText | None], gain: tuple[Tensor, Tensor], s: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        x, dx = state
        if isinstance(self.embedding, LinearEmbedding):
            dz = None if dx is None else project(self, dx)
            return self.embedding.forward_with_tangent((project(self, x), dz), s)
        embedding = self.embedding

        def work(tile: Tile, table: Weight, gain: Weight, rate: Weight) -> Tensor:
            gains = tile(gain.leaf), tile(rate.leaf)
            pair = (tile(x).x, None if dx is None else tile(dx).x)
            return torch.cat(embedding.forward_with_tangent(pair, gains, self.log_prior, table), -1)

        y, dy = self._in_tiles(work, x, embedding, *gain).chunk(2, -1)
        return y, dy

    def readout(
        self, hidden: Float[Tensor, "b l d"], state: NoisyText, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]
    ) -> Readout:
        """What the endpoint's logits are made of; position by position."""
        context = self._context(hidden)
        if self.config.skip:
            return Readout(context, self.log_prior, self.gain_out(s, t), state.x)
        return Readout(context, self.log_prior)

    def _context(self, hidden: Float[Tensor, "*b l d"]) -> Float[Tensor, "*b l v"]:
        """The head's product; without gradients one cast serves all tiles and calls until the weights change."""
        if self._leaf is not None and torch.is_grad_enabled():
            return self._leaf.product(hidden.to(self._leaf.leaf.dtype))
        weight = self.head.weight
        if not torch.is_grad_enabled():
            weight = self._cast(weight, self.precision)
        with self._autocast():
            return F.linear(hidden.to(weight.dtype), weight)

    def logits(
        self,
        hidden: Float[Tensor, "b l d"],
        state: NoisyText,
        s: Float[Tensor, "b #l"],
        t: Float[Tensor, "b #l"],
    ) -> Float[Tensor, "b l v"]:
        """Logits of the endpoint, fp32 (fp64 for fp64 states): context + log prior + gain x."""
        return self.readout(hidden, state, s, t).logits()

    def readout_with_tangent(
        self,
        hidden: tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]],
        state: NoisyText,
        times: tuple[Tensor, Tensor, Tensor, Tensor],
        dx: NoisyText | None = None,
    ) -> MovingReadout:
        """`readout` and its derivative; `times` = (s, t, ds, dt)."""
        context, rate = self._context(torch.stack(hidden)).unbind(0)
        if not self.config.skip:
            return MovingReadout(Readout(context, self.log_prior), Readout(rate))
        gain, gain_rate = self.gain_out.tangent(*times)
        now = Readout(context, self.log_prior, gain, state.x)
        return MovingReadout(now, Readout(rate, None, gain_rate, state.x), None if dx is None else dx.x)

    @contextmanager
    def readout_weights(self) -> Iterator[list[Weight]]:
        """What readouts depend on besides their arguments; while this is open they are made of its leaves."""
        head = Weight.of(self.head.weight, self._cast(self.head.weight, self.precision))
        gains = self.gain_out.parameters() if self.config.skip else ()
        self._leaf = head
        try:
            yield [head, *(Weight(gain, gain) for gain in gains)]
        finally:
            self._leaf = None
            if torch.is_grad_enabled():  # the loss is done: the cast need not lie beside what the backward pass makes
                self._cast = KeptCast()

    def num_parameters(self) -> tuple[int, int]:
        """(body, vocabulary): parameters outside and inside the two vocabulary tables."""
        total = sum(p.numel() for p in self.parameters())
        vocabulary = self.embedding.table.weight.numel() + self.head.weight.numel()
        return total - vocabulary, vocabulary


@runtime_checkable
class Projecting(Protocol):
    """A network that sees x through x W."""

    precision: torch.dtype
    tile: int

    @property
    def embedding(self) -> nn.Module: ...
    @property
    def projects(self) -> bool: ...


def project(network: Projecting, state: NoisyText) -> Float[Tensor, "b l d"]:
    """x W; noise is drawn, in fp32, in the d dimensions that W sees where nothing else sees any."""
    assert isinstance(network.embedding, LinearEmbedding)
    weight = network.embedding.table.weight
    if network.projects:
        with torch.autocast(weight.device.type, enabled=False):
            return state.project(network.embedding.projection(network.precision))
    return over_tiles(lambda tile: F.linear(tile(state).x.to(weight.dtype), weight), state.shape, network.tile)


def smoothed_log_prior(counts: Float[Tensor, "v"]) -> Float[Tensor, "v"]:
    """log of the unigram frequencies, each count raised by one half so that no token is impossible."""
    smoothed = counts.double() + 0.5
    return (smoothed / smoothed.sum()).log().float()


def uniform_log_prior(vocab_size: int) -> Float[Tensor, "{vocab_size}"]:
    return torch.full((vocab_size,), -math.log(vocab_size))
