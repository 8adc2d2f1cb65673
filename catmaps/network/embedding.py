"""How noisy text enters the trunk: (B, L, V) to (B, L, d), or a tile of it.

`belief` embeds what the position's own noise says about its token, softmax(log prior + gain x), through a table: the
trunk sees a mixture of token vectors whatever V is. `linear` is the design of the published models, x W: when V exceeds
d the trunk sees only d of the V noise dimensions (docs/maths.md (a)).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from catmaps.network import tangent
from catmaps.tiles import Looked, Projection, fused
from catmaps.weights import Weight

JITTER = 1e-6  # of the mean of the Gram matrix' diagonal: keeps its factor finite, far below fp32's own error in it


@fused
def _belief(x: Tensor, gain: Tensor, log_prior: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the product that follows: written out once, in half the bytes."""
    return (log_prior + gain[..., None] * x).softmax(-1).to(dtype)


class KeptCast:
    """The last weight that was cast, in its new dtype: large tables are cast once for every change, not every use.

    A change is seen by the weight's address and version. Fused optimisers and FSDP's gathers raise no version: whoever
    uses them calls `FlowNetwork.forget_casts` after every step.
    """

    def __init__(self) -> None:
        self._of: tuple[int, int, torch.dtype] | None = None
        self._cast: Tensor | None = None

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in bf16 if `dtype` says so, without gradient; itself else."""
        if dtype == weight.dtype or dtype == torch.float32:
            return weight.detach()
        of = (weight.data_ptr(), weight._version, dtype)
        if self._cast is None or self._of != of:
            self._of, self._cast = of, weight.detach().to(dtype)
        return self._cast


class BeliefEmbedding(nn.Module):
    """softmax(log prior + gain x) E. A call may bring what stands for the table E."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.table = nn.Linear(vocab_size, width, bias=False)
        self.cast = KeptCast()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table.weight)

    def forget_casts(self) -> None:
        """As `FlowNetwork.forget_casts`."""
        self.cast = KeptCast()

    def forward(
        self,
        x: Float[Tensor, "b l v"],
        gain: Float[Tensor, "b #l"],
        log_prior: Float[Tensor, "v"],
        table: Weight | None = None,
    ) -> Float[Tensor, "b l d"]:
        table = table or Weight.plain(self.table.weight)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.leaf.dtype
        return table.product(_belief(x, gain, log_prior, dtype))

    def forward_with_tangent(
        self,
        x: tuple[Tensor, Tensor | None],
        gain: tuple[Tensor, Tensor],
        log_prior: Tensor,
        table: Weight | None = None,
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        table = table or Weight.plain(self.table.weight)
        dz = gain[1][..., None] * x[0]
        if x[1] is not None:
            dz = dz + gain[0][..., None] * x[1]
        belief = tangent.softmax(log_prior + gain[0][..., None] * x[0], dz)
        y, dy = table.product(torch.stack(belief).to(table.leaf.dtype)).unbind(0)
        return y, dy


class LinearEmbedding(nn.Module):
    """x W / rms(s), with rms(s) = sqrt((1 - s)^2 + s^2 / V): the root mean square of x over V, within 0.3%."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.table = nn.Linear(vocab_size, width, bias=False)
        self._known: tuple[int, int, Tensor] | None = None
        self._cast = KeptCast()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table.weight, std=self.table.in_features**-0.5)

    def forget_casts(self) -> None:
        """As `FlowNetwork.forget_casts`."""
        self._known, self._cast = None, KeptCast()

    @property
    def projects(self) -> bool:
        """Whether x W has fewer dimensions than x: noise is then drawn in these d alone."""
        return self.table.in_features > self.table.out_features

    def projection(self, precision: torch.dtype) -> Projection:
        """W and its factor: made anew while W learns, else once for every change of W."""
        weight = self.table.weight
        if weight.requires_grad and torch.is_grad_enabled():
            cast = self._cast(weight, precision)
            found: Looked = []
            return Projection(*with_factor(weight, cast, found), cast, found)
        if self._known is None or self._known[:2] != (weight.data_ptr(), weight._version):
            with torch.no_grad():
                self._known = (weight.data_ptr(), weight._version, with_factor(weight)[1])
        return Projection(weight.detach(), self._known[2], self._cast(weight, precision))

    def rms(self, s: Tensor) -> Tensor:
        return ((1 - s).square() + s.square() / self.table.in_features).sqrt()[..., None]

    def forward(self, projected: Float[Tensor, "b l d"], s: Float[Tensor, "b #l"]) -> Float[Tensor, "b l d"]:
        """From x W."""
        return projected / self.rms(s)

    def forward_with_tangent(
        self, projected: tuple[Tensor, Tensor | None], s: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """From x W and dx W."""
        rms = self.rms(s[0])
        y = projected[0] / rms
        drms = ((s[0] / self.table.in_features - (1 - s[0])) * s[1])[..., None] / rms
        dy = -y * drms / rms
        return y, dy if projected[1] is None else dy + projected[1] / rms


class _WithGram(torch.autograd.Function):
    """(W, W' W), of which the lower triangle alone is made. All of W's gradient comes together in the backward pass:
    the Gram matrix', which is symmetric by use, and that of columns that were looked up."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor, found: Looked) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cast)
        ctx.found, ctx.weight = found, weight.detach()
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), _lower_gram(weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, None, None]:
        (cast,), (own, gram), table = ctx.saved_tensors, upstream, Weight.plain(ctx.weight)
        table.add(own)
        if gram is not None:
            # In the precision of the layer's other gradients, where the run has bf16: the factor itself never has.
            table.add_product((gram + gram.mT).to(cast.dtype), cast)
        while ctx.found:
            table.add_columns(*ctx.found.pop())
        return table.total, None, None


def gram_strips(width: int) -> list[tuple[int, int]]:
    """Rows (start, stop) that are multiplied at a time, with the first `stop` columns."""
    few = max(64, width // 8)
    return [(start, min(start + few, width)) for start in range(0, width, few)]


def _lower_gram(weight: Float[Tensor, "d v"]) -> Float[Tensor, "d d"]:
    """The lower triangle of W' W, in strips; what lies far above it stays 0."""
    gram = weight.new_zeros(len(weight), len(weight))
    for start, stop in gram_strips(len(weight)):
        torch.mm(weight[start:stop], weight[:stop].mT, out=gram[start:stop, :stop])
    return gram


def with_factor(
    weight: Float[Tensor, "d v"], cast: Float[Tensor, "d v"] | None = None, found: Looked | None = None
) -> tuple[Float[Tensor, "d v"], Float[Tensor, "d d"]]:
    """W, and lower C with C C' = W' W: n C' has the law of x_0 W for standard normal n (d) and x_0 (V).

    In W's own precision; the gradient's large product is with the cast. Source: docs/maths.md (h).
    """
    with torch.autocast(weight.device.type, enabled=False):
        given = (weight.detach() if cast is None else cast, [] if found is None else found)
        weight, gram = _WithGram.apply(weight, *given)  # pyright: ignore[reportGeneralTypeIssues]
        floor = JITTER * gram.detach().diagonal().mean()
        return weight, torch.linalg.cholesky(gram + floor * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


class Conditioner(nn.Module):
    """Time features of s and t -> one conditioning vector.

    The start s has an ordinary embedder; the gap an embedder without bias on phi(t) - phi(s) whose last layer starts at
    zero. It is exactly silent on the diagonal, so a base checkpoint *is* a valid start for distillation.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.start = nn.ModuleList([nn.Linear(features, width), nn.Linear(width, width)])
        self.gap = nn.ModuleList([nn.Linear(features, width, bias=False), nn.Linear(width, width, bias=False)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (*self.start, *self.gap):
            assert isinstance(layer, nn.Linear)
            layer.reset_parameters()
        nn.init.zeros_(self.gap.get_parameter("1.weight"))

    def forward(self, phi_s: Float[Tensor, "b k f"], phi_t: Float[Tensor, "b k f"]) -> Float[Tensor, "b k c"]:
        start = self.start[1](F.silu(self.start[0](phi_s)))
        return F.silu(start + self.gap[1](F.silu(self.gap[0](phi_t - phi_s))))

    def forward_with_tangent(
        self, phi_s: tuple[Tensor, Tensor], phi_t: tuple[Tensor, Tensor]
    ) -> tuple[Float[Tensor, "b k c"], Float[Tensor, "b k c"]]:
        start = _mlp(self.start, phi_s)
        gap = _mlp(self.gap, (phi_t[0] - phi_s[0], phi_t[1] - phi_s[1]))
        return tangent.silu(start[0] + gap[0], start[1] + gap[1])


def _mlp(layers: nn.ModuleList, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    first, second = layers
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    return tangent.linear(second, *tangent.silu(*tangent.linear(first, *x)))


def distinct(*times: Float[Tensor, "b #l"]) -> tuple[list[Float[Tensor, "b k"]], Tensor | None]:
    """The distinct tuples of times in each sequence, and each position's index (B, L) among them (None for (B, 1)).

    Conditioning is then computed for k tuples instead of L positions: with prompts k = 2. Unused places repeat others.
    """
    if all(time.shape[1] == 1 for time in times):
        return list(times), None
    length = max(time.shape[1] for time in times)
    wide = [time.expand(-1, length) for time in times]
    same = torch.stack([time[:, :, None] == time[:, None, :] for time in wide]).all(0)
    first = same.int().argmax(-1)
    rank = (first == torch.arange(length, device=first.device)).cumsum(1) - 1
    index = rank.gather(1, first)
    # At least two, whatever this batch holds: shapes then change less often, and compiled code is made less often.
    k = max(2, int(index.max()) + 1)
    slots = index.new_zeros(len(index), k).scatter_reduce(1, index, first, "amax", include_self=True)
    return [time.gather(1, slots) for time in wide], index
