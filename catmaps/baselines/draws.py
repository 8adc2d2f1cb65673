"""What all families share: the random numbers of a row, from draws to a loss or a bound, and the protocol."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.flow.likelihood import Bound
from catmaps.flow.losses import TokenLoss


@runtime_checkable
class Predictor(Protocol):
    """A network, or an exact model: (ids, t) -> logits over the V symbols of texts at every position.

    What the logits predict is the family's matter. t has shape (B, 1); families without times pass zeros.
    """

    @property
    def vocab_size(self) -> int: ...

    def __call__(self, tokens: Tensor, t: Tensor, /) -> Tensor: ...


class Draws(NamedTuple):
    """Uniform draws in [0, 1) of each row, fp64."""

    place: Float[Tensor, "b"]
    """Where in time; stratified over a batch, or over the draws of one text."""
    noise: Float[Tensor, "b l"]

    def to(self, device: torch.device) -> "Draws":
        return Draws(self.place.to(device), self.noise.to(device))


def counter_draws(
    key: tuple[int, int], sample_index: Int[np.ndarray, "b"], place: Float[Tensor, "b"], length: int
) -> Draws:
    """Noise of given samples as a pure function of (seed, step) and the global sample index, as `counter_noise`."""
    noise = np.empty((len(sample_index), length))
    for row, index in zip(noise, sample_index, strict=True):
        philox = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=[0, 0, 0, int(index)])
        np.random.Generator(philox).random(out=row)
    return Draws(place.double(), torch.from_numpy(noise))


def weighted(values: Float[Tensor, "b l"], weight: Float[Tensor, "b l"]) -> TokenLoss:
    """The loss of a batch from its nats per position."""
    return TokenLoss((values * weight).sum(), values.detach())


Values = Callable[[Predictor, Int[Tensor, "b l"], Draws], Float[Tensor, "b l"]]


@torch.no_grad()
def mean_of_draws(
    values: Values,
    predictor: Predictor,
    tokens: Int[Tensor, "b l"],
    num_samples: int,
    generator: torch.Generator | None = None,
) -> Bound:
    """The mean of `values` over `num_samples` draws, one in each of as many equal cells of `place`, one call each.

    The standard error treats the stratified draws as independent, hence is an upper estimate.
    """
    random = {"generator": generator, "dtype": torch.float64, "device": tokens.device}
    found = []
    for i in range(num_samples):
        place = (i + torch.rand(len(tokens), **random)) / num_samples
        found.append(values(predictor, tokens, Draws(place, torch.rand(tokens.shape, **random))).double().cpu())
    draws = torch.stack(found)
    per_token = draws.mean(0)
    return Bound(per_token.sum(1), (draws.sum(2).var(0) / num_samples).sqrt(), per_token)


def begin(
    fill: Int[Tensor, "b l"], tokens: Int[Tensor, "b l"] | None, known: Bool[Tensor, "b l"] | None
) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """(where sampling starts, which positions are given): given text where known, else `fill`."""
    if tokens is None or known is None:
        return fill, torch.zeros_like(fill, dtype=torch.bool)
    return torch.where(known, tokens, fill), known
