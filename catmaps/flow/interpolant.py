"""The path from noise to text, x_t = (1 - t) x_0 + t x_1, and the algebra of one jump along it.

x_0 ~ N(0, I_V) at every position, x_1 is the one-hot of its token. Only this module and the network's embedding look
inside a `State`.

Source: Roos et al. 2026, arXiv:2602.12233; docs/maths.md eqs. (1)-(3).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class State:
    """Noisy text x at some time per position: fp32 (fp64 in tests), shape (B, L, V)."""

    x: Float[Tensor, "b l v"]

    @property
    def batch_size(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "State":
        """The state of some sequences of the batch."""
        return State(self.x[rows])


def step_fraction(s: Float[Tensor, "b #l"], t: Float[Tensor, "b #l"]) -> Float[Tensor, "b #l"]:
    """gamma = (t - s) / (1 - s) in [0, 1], the share of the remaining way that the jump s -> t covers; 0 where s = 1.

    Source: docs/maths.md eq. (2).
    """
    rest = 1 - s
    clean = rest <= 0
    return torch.where(clean, torch.zeros_like(rest), (t - s) / torch.where(clean, torch.ones_like(rest), rest))


def root_snr(t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """u = t / (1 - t), the square root of the signal-to-noise ratio; infinite at t = 1."""
    return t / (1 - t)


def gaussian(
    shape: tuple[int, int, int], generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> State:
    """A state of pure noise x_0 ~ N(0, I_V), shape (B, L, V), on the generator's device."""
    device = generator.device if generator is not None else None
    return State(torch.randn(shape, generator=generator, device=device, dtype=dtype))


def counter_noise(
    key: tuple[int, int], sample_index: Int[np.ndarray, "b"], length: int, vocab_size: int
) -> Float[Tensor, "b l v"]:
    """Standard normal noise of given samples, a pure function of (seed, step) and the global sample index.

    It does not depend on how samples are dealt to processes or micro-batches, and nothing has to be stored to draw it
    again.

    Args:
        key: (run seed, step), both non-negative.
        sample_index: Global index of each sample within the step's batch.
        length: L.
        vocab_size: V.

    Returns:
        fp32 noise on the CPU, shape (B, L, V).
    """
    out = np.empty((len(sample_index), length, vocab_size), dtype=np.float32)
    for row, index in zip(out, sample_index, strict=True):
        philox = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=[0, 0, 0, int(index)])
        np.random.Generator(philox).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def interpolate(tokens: Int[Tensor, "b l"], noise: Float[Tensor, "b l v"], t: Float[Tensor, "b #l"]) -> State:
    """x_t = (1 - t) noise + t onehot(tokens), at one time per position.

    Source: docs/maths.md eq. (1).
    """
    x = (1 - t)[..., None] * noise
    return State(x.scatter_add(-1, tokens[..., None], t.to(noise.dtype).expand(tokens.shape)[..., None]))


def advance(state: State, endpoint: Float[Tensor, "b l v"], gamma: Float[Tensor, "b #l"]) -> State:
    """The jump x + gamma (endpoint - x) with gamma = `step_fraction(s, t)`: eq. (2)."""
    return State(torch.lerp(state.x, endpoint.to(state.x.dtype), gamma[..., None].to(state.x.dtype)))


def move(state: State, direction: Float[Tensor, "b l v"], scale: Float[Tensor, "b #l"]) -> Float[Tensor, "b l v"]:
    """scale (direction - x): the velocity of the state towards an endpoint, eq. (3) with scale = 1 / (1 - t)."""
    return scale[..., None] * (direction - state.x)


def renoise(
    state: State, t: Float[Tensor, "b #l"], t_new: Float[Tensor, "b #l"], noise: Float[Tensor, "b l v"]
) -> State:
    """Carries a state back from time t to an earlier t_new by adding fresh noise; its marginal law stays the path's.

    x_{t'} = (t'/t) x_t + sqrt((1 - t')^2 - (t'/t)^2 (1 - t)^2) noise; positions with t_new = t do not change.

    Source: docs/maths.md eq. (13).
    """
    ratio = torch.where(t > 0, t_new / torch.where(t > 0, t, torch.ones_like(t)), torch.ones_like(t))
    variance = ((1 - t_new).square() - (ratio * (1 - t)).square()).clamp_min(0)
    return State(ratio[..., None] * state.x + variance.sqrt()[..., None] * noise)


def clamp_known(state: State, tokens: Int[Tensor, "b l"] | None, known: Bool[Tensor, "b l"] | None) -> State:
    """Replaces the known positions by their clean one-hot: time 1. Others are untouched."""
    if known is None or tokens is None:
        return state
    onehot = torch.zeros_like(state.x).scatter_(-1, tokens[..., None], 1.0)
    return State(torch.where(known[..., None], onehot, state.x))
