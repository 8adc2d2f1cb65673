"""-log mu[token] of a readout, with a gradient that is written down: one exponential an entry, forward and backward.

In logits z with p = softmax(z) the gradient is p - e_token. The forward pass keeps exp(z - max z), in the precision of
matrix products, in which the gradient goes into them; the backward pass divides it by its sum.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from catmaps.tiles import Readout, fused


@fused
def _exponentials(now: Readout) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """e = exp(z - max z); and of each position max z, and the sums of e, e^2 and e x."""
    logits = now.logits()
    largest = logits.amax(-1)
    e = (logits - largest[..., None]).exp()
    total = e.sum(-1)
    moved = total if now.x is None else (e * now.x).sum(-1)
    return e.to(now.context.dtype), largest, total, e.square().sum(-1), moved


@fused
def _scaled(e: Tensor, factor: Tensor) -> Tensor:
    return (e * factor[..., None]).to(e.dtype)


def _at(wide: Tensor, tokens: Tensor) -> Tensor:
    return wide.gather(-1, tokens[..., None])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, temperature: float, context: Tensor, *more: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        prior, gain, x = more
        now = Readout(context, prior, gain, x, temperature)
        e, largest, total, squares, moved = _exponentials(now)
        own_x = None if x is None else _at(x, tokens)
        own_prior = None if prior is None else prior[tokens][..., None]
        own = Readout(_at(context, tokens), own_prior, gain, own_x, temperature).logits()[..., 0]
        log_right = own - largest - total.log()
        square = 1 - 2 * log_right.exp() + squares / total.square()
        by_gain = None if own_x is None else moved / total - own_x[..., 0]
        ctx.save_for_backward(tokens, e, total, log_right, gain, by_gain)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(square)
        return -log_right, square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tokens, e, total, log_right, gain, by_gain = ctx.saved_tensors
        share = upstream[0] / ctx.temperature
        part = _scaled(e, share / total)
        # p - 1 of the token itself in full precision: where p is nearly 1 its rounding would be all there is.
        rows = torch.arange(tokens.numel(), device=tokens.device)  # torch's scatter makes a wider copy of bf16
        part.flatten(0, -2)[rows, tokens.flatten()] = (share * torch.expm1(log_right)).flatten().to(part.dtype)
        wanted = ctx.needs_input_grad[3:]
        return (
            None,
            None,
            part,
            part.to(total.dtype).sum((0, 1)) if wanted[0] else None,
            (share * by_gain).sum_to_size(gain.shape) if wanted[1] else None,
            gain[..., None] * part if wanted[2] else None,
        )


def cross_entropy(now: Readout, tokens: Int[Tensor, "b l"]) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b l"]]:
    """-log mu[token], and ||e - mu||^2, which has no gradient."""
    evidence = (now.gain, now.x) if now.gain is not None and now.x is not None else (None, None)
    return _CrossEntropy.apply(tokens, now.temperature, now.context, now.log_prior, *evidence)  # pyright: ignore[reportReturnType]
