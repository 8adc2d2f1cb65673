"""The network as the mathematics sees it: encode a state, then logits for any of its positions."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from catmaps.network import tangent
from catmaps.network.embedding import BeliefEmbedding, Conditioner, LinearEmbedding, distinct
from catmaps.network.trunk import Trunk


@runtime_checkable
class DenseState(Protocol):
    """What the embedding reads of the flow's state."""

    @property
    def x(self) -> Tensor: ...


@runtime_checkable
class Gain(Protocol):
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
    input: Literal["belief", "linear"] = "belief"
    """How noisy text enters (docs/maths.md (a))."""
    skip: bool = True
    """Add each position's own evidence, gain(s, t) x, to its logits."""

    def __post_init__(self) -> None:
        if min(self.width, self.blocks, self.heads, self.conditioning, self.mlp_ratio) < 1:
            raise ValueError("every size of the network must be at least 1")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} must be heads ({self.heads}) times an even number")


class FlowNetwork(nn.Module):
    """A denoiser: (state at s, s, t) -> logits of the endpoint mu_{s,t}.

    Times have shape (B, 1) or (B, L). `precision` is the dtype of matrix products (bf16 runs under autocast; softmax,
    gains and logits' sums stay fp32).

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
        self.config, self.precision = config, torch.float32
        vocab_size, width = len(log_prior), config.width
        self.register_buffer("log_prior", log_prior.float())
        self.features, (self.gain_in, self.gain_out) = features, gains
        embedding = BeliefEmbedding if config.input == "belief" else LinearEmbedding
        self.embedding = embedding(vocab_size, width)
        self.conditioner = Conditioner(features.size, config.conditioning)
        self.trunk = Trunk(width, config.blocks, config.heads, config.conditioning, config.mlp_ratio)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    def _autocast(self) -> torch.autocast:
        device = self.log_prior.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def encode(self, state: DenseState, s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b l d"]:
        """Hidden vectors of every position, (B, L, d)."""
        (s_k, t_k), index = distinct(s, t)
        phi_s, phi_t, gain = self.features(s_k), self.features(t_k), self.gain_in(s, t)
        with self._autocast():
            condition = self.conditioner(phi_s, phi_t)
            x = self.embedding(state.x, gain, s, self.log_prior)
            return self.trunk(x, condition, index)

    def encode_with_tangent(
        self,
        state: DenseState,
        s: Float[Tensor, "b #l"],
        t: Float[Tensor, "b #l"],
        ds: Float[Tensor, "b #l"],
        dt: Float[Tensor, "b #l"],
        dx: Float[Tensor, "b l v"] | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """`encode` and its derivative along (dx, ds, dt); dx = None means the state is held."""
        (s_k, t_k, ds_k, dt_k), index = distinct(s, t, ds, dt)
        phi_s, phi_t = self.features.tangent(s_k, ds_k), self.features.tangent(t_k, dt_k)
        gain = self.gain_in.tangent(s, t, ds, dt)
        with self._autocast():
            condition = self.conditioner.forward_with_tangent(phi_s, phi_t)
            x = self.embedding.forward_with_tangent((state.x, dx), gain, (s, ds), self.log_prior)
            return self.trunk.forward_with_tangent(x, condition, index)

    def logits(
        self,
        hidden: Float[Tensor, "b l d"],
        state: DenseState,
        s: Float[Tensor, "b #l"],
        t: Float[Tensor, "b #l"],
    ) -> Float[Tensor, "b l v"]:
        """Logits of the endpoint, fp32 (fp64 for fp64 states): context + log prior + gain x."""
        with self._autocast():
            context = self.head(hidden)
        logits = context.to(state.x.dtype) + self.log_prior
        return logits + self.gain_out(s, t)[..., None] * state.x if self.config.skip else logits

    def logits_with_tangent(
        self,
        hidden: tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]],
        state: DenseState,
        times: tuple[Tensor, Tensor, Tensor, Tensor],
        dx: Float[Tensor, "b l v"] | None = None,
    ) -> tuple[Float[Tensor, "b l v"], Float[Tensor, "b l v"]]:
        """`logits` and its derivative; `times` = (s, t, ds, dt)."""
        with self._autocast():
            context, dcontext = tangent.linear(self.head, *hidden)
        logits, dlogits = context.to(state.x.dtype) + self.log_prior, dcontext.to(state.x.dtype)
        if self.config.skip:
            gain, dgain = (g[..., None] for g in self.gain_out.tangent(*times))
            logits, dlogits = logits + gain * state.x, dlogits + dgain * state.x
            dlogits = dlogits if dx is None else dlogits + gain * dx
        return logits, dlogits

    def num_parameters(self) -> tuple[int, int]:
        """(body, vocabulary): parameters outside and inside the two vocabulary tables."""
        total = sum(p.numel() for p in self.parameters())
        vocabulary = self.embedding.table.weight.numel() + self.head.weight.numel()
        return total - vocabulary, vocabulary


def smoothed_log_prior(counts: Float[Tensor, "v"]) -> Float[Tensor, "v"]:
    """log of the unigram frequencies, each count raised by one half so that no token is impossible."""
    smoothed = counts.double() + 0.5
    return (smoothed / smoothed.sum()).log().float()


def uniform_log_prior(vocab_size: int) -> Float[Tensor, "{vocab_size}"]:
    return torch.full((vocab_size,), -math.log(vocab_size))
