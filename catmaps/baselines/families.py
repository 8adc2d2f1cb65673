"""The families in one table. To add one, write its module and enter it here and in `Config.family`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from catmaps.baselines import autoregressive, masked, uniform
from catmaps.flow.likelihood import Bound
from catmaps.flow.losses import TokenLoss


@dataclass(frozen=True, kw_only=True)
class Family:
    """A module's three functions, and the network that they need."""

    loss: Callable[..., TokenLoss]
    """(predictor, tokens, draws, weight) -> TokenLoss."""
    bound: Callable[..., Bound]
    """(predictor, tokens, *, num_samples, generator) -> Bound."""
    sample: Callable[..., Tensor]
    """(predictor, (B, L), steps, *, temperature, tokens, known, generator) -> ids (B, L)."""
    special: int = 0
    """Ids beyond the vocabulary."""
    causal: bool = False
    sequential: bool = False
    """Sampling makes one call per token, whatever its steps."""


FAMILIES: dict[str, Family] = {
    "autoregressive": Family(
        loss=autoregressive.loss,
        bound=autoregressive.bound,
        sample=autoregressive.sample,
        special=1,
        causal=True,
        sequential=True,
    ),
    "masked": Family(loss=masked.loss, bound=masked.bound, sample=masked.sample, special=1),
    "uniform": Family(loss=uniform.loss, bound=uniform.bound, sample=uniform.sample),
}
