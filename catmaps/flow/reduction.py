"""Weighted sums of losses over tiles: the backward pass of a tile is done with its forward, so that no tile is kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from catmaps.flow.flow_map import Endpoint, MovingEndpoint
from catmaps.tiles import Tile, split
from catmaps.weights import add_gradients


class TokenLoss(NamedTuple):
    """A loss to differentiate (nats) and what it was at every position, detached."""

    total: Float[Tensor, ""]
    values: Float[Tensor, "b l"]
    squared_error: Float[Tensor, "b l"] | None = None
    """||e - mu||^2 where the loss knows the token: the integrand of the likelihood bound (14)."""


Work = Callable[[Any, Tile], tuple[Tensor, Tensor | None]]
"""(the learning endpoint's cut, the tile) -> values of its positions, and their squared errors if they are known."""


def weighted_sum(work: Work, learner: Endpoint | MovingEndpoint, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """The sum of weight x value over all positions, tile by tile.

    Args:
        work: The loss of a tile. Whatever it looks at besides the learner has no gradient.
        learner: The endpoint that learns.
        weight: 0 where a position does not count; its NaN or infinity is then not brought along.
    """
    tiles = list(split(*learner.shape, learner.flow_map.denoiser.tile))
    if len(tiles) == 1:
        values, errors = work(learner, tiles[0])
        return TokenLoss(_total(values, weight), values.detach(), errors)
    leaf, hidden = learner.leaf()
    total, values, errors = weight.new_zeros(()), None, None
    with learner.flow_map.denoiser.readout_weights() as read:
        weights = [w for w in (*hidden, *read) if w.leaf.requires_grad] if torch.is_grad_enabled() else []
        while tiles:  # a tile is dropped once it is done, with all that it remembers
            tile = tiles.pop(0)
            own, error = work(tile(leaf), tile)
            share = _total(own, tile(weight))
            tile.memory.clear()  # what the backward pass needs it keeps itself
            if weights:
                add_gradients(weights, share)
            total = total + share.detach()
            values = tile.put(own.detach(), values)
            errors = None if error is None else tile.put(error, errors)
    assert values is not None
    whole = _Replay.apply(total, [w.take() for w in weights], *(w.parameter for w in weights)) if weights else total
    assert isinstance(whole, Tensor)
    return TokenLoss(whole, values.view(weight.shape), None if errors is None else errors.view(weight.shape))


def _total(values: Tensor, weight: Tensor) -> Tensor:
    # A position without weight must not bring its NaN or infinity along: 0 * inf is NaN.
    return torch.where(weight > 0, values * weight, torch.zeros_like(values)).sum()


class _Replay(torch.autograd.Function):
    """A number whose gradients are known already; they are handed over, not copied."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *sources: Tensor) -> Tensor:
        del sources
        ctx.gradients = gradients
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "a loss over tiles can be differentiated once"
        return (None, None, *(None if g is None else g.mul_(upstream[0]) for g in gradients))
