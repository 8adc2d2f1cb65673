"""Weights of vocabulary-sized products, and the gradients that many tiles add to one sum in place; torch only."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

AT_ONCE = 2**20
"""Numbers of a gradient that are made, or brought to a wider dtype, at a time."""


@dataclass(eq=False)
class Weight:
    """A parameter, the leaf that stands for it in products, and the sum of its gradients so far.

    The leaf is in bf16 where products are; the sum has the parameter's dtype, and no second tensor of its size is made.
    """

    parameter: Tensor
    leaf: Tensor
    collects: bool = True
    """Whether `product` adds its gradient to `total` instead of handing it to autograd."""
    total: Tensor | None = None
    valued: bool = True
    """Whether products' values are looked at. Where they are made again for their gradients alone they need not be."""

    @classmethod
    def of(cls, parameter: Tensor, cast: Tensor) -> "Weight":
        """A leaf of its own."""
        return cls(parameter, cast.detach().requires_grad_(parameter.requires_grad))

    @classmethod
    def plain(cls, value: Tensor) -> "Weight":
        """Itself, as autograd sees it."""
        return cls(value, value, collects=False)

    def product(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """x W'."""
        return _Product.apply(x, self.leaf, self) if self.collects else F.linear(x, self.leaf)  # pyright: ignore[reportReturnType]

    def add(self, part: Tensor | None) -> None:
        """Adds a gradient; None where the leaf was not used. The first one becomes the sum."""
        if part is None:
            return
        if self.total is None:
            self.total = part.to(self.parameter.dtype)
            return
        few = max(1, AT_ONCE // max(1, part[:1].numel())) if part.ndim else 1
        for own, more in zip(torch.atleast_1d(self.total).split(few), torch.atleast_1d(part).split(few), strict=True):
            own.add_(more)  # of two dtypes: makes a copy in the wider one, here of a few rows

    def add_product(self, left: Float[Tensor, "n o"], right: Float[Tensor, "n i"]) -> None:
        """Adds left' right, piece by piece along its longer side."""
        size, fresh = self.parameter.shape, self.total is None
        total = torch.empty_like(self.parameter) if self.total is None else self.total
        side = 0 if size[0] >= size[1] else 1
        few = max(1, AT_ONCE // size[1 - side])
        for start in range(0, size[side], few):
            here = slice(start, start + few)
            piece = left[:, here].mT @ right if side == 0 else left.mT @ right[:, here]
            own = total[here] if side == 0 else total[:, here]
            own.copy_(piece) if fresh else own.add_(piece)
        self.total = total

    def add_columns(self, tokens: Int[Tensor, "*b"], part: Float[Tensor, "*b o"]) -> None:
        """Adds the gradient of columns that were looked up."""
        if self.total is None:
            self.total = torch.zeros_like(self.parameter)
        self.total.index_add_(1, tokens.flatten(), part.flatten(0, -2).mT.to(self.total.dtype))

    def take(self) -> Tensor | None:
        """The sum, which starts anew."""
        total, self.total = self.total, None
        return total


class _Product(torch.autograd.Function):
    """x W' whose gradient by W goes into its sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, weight: Weight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, leaf) if weight.valued else x.new_zeros(*x.shape[:-1], len(leaf))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), (part,) = ctx.saved_tensors, upstream
        if ctx.needs_input_grad[1]:
            ctx.weight.add_product(part.flatten(0, -2), x.flatten(0, -2))
        return part @ ctx.weight.leaf if ctx.needs_input_grad[0] else None, None, None


def add_gradients(weights: Iterable[Weight], loss: Tensor, upstream: Tensor | None = None) -> None:
    """Adds the gradient of a tile's loss, or of its outputs with what comes from above, to the sums of all weights."""
    weights = list(weights)
    parts = torch.autograd.grad(loss, [w.leaf for w in weights], upstream, allow_unused=True)
    for weight, part in zip(weights, parts, strict=True):
        weight.add(part)
