"""Weights of diagonal losses by their time, on top of the law that times are drawn from.

What training minimises has density law x weight over t: times that are drawn twice as often may count half as much,
with the same minimiser and another noise of the gradient. A weighting is one function (t, law, moments) -> (n,),
positive, of any scale, entered in WEIGHTINGS; `weights` clips it at five times its mean under the law, which becomes 1.

Source: docs/maths.md (b).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from catmaps.flow.adaptive import BINS, LAST
from catmaps.flow.times import Law

CLIP = 5.0  # largest weight; their mean is one
NODES = 512  # of the mean under the law
MIN_SNR = 5.0
PATIENCE = 8.0  # visits before a bin's own moments count


class LossMoments:
    """Running mean and variance of a text's loss (nats per token) in equal bins of a clock.

    Args:
        clock: Whose unit interval is cut into 64 bins; fixed.
        decay: Of the running sums, per step.
    """

    def __init__(self, clock: Law, *, decay: float = 0.995) -> None:
        self.clock, self.decay = clock, decay
        self.sums = torch.zeros(3, BINS, dtype=torch.float64)  # visits, losses, squares

    def _bin(self, t: Float[Tensor, "n"]) -> Tensor:
        return (self.clock.cdf(t.double()) * BINS).long().clamp(0, BINS - 1)

    def contributions(self, t: Float[Tensor, "n"], loss: Float[Tensor, "n"]) -> Float[Tensor, "3 64"]:
        """What texts add to the sums; to be summed over processes."""
        t, loss = t.double().cpu(), loss.double().cpu()
        values = torch.stack([torch.ones_like(loss), loss, loss.square()])
        return torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, self._bin(t), values)

    def update(self, added: Float[Tensor, "3 64"]) -> None:
        self.sums.mul_(self.decay).add_(added)

    def _known(self) -> Tensor:
        return self.sums[0] >= PATIENCE

    def mean(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Mean loss about t; of bins with few visits, the mean over all others, or 1."""
        known, (visits, losses, _) = self._known(), self.sums
        if not bool(known.any()):
            return torch.ones_like(t)
        whole = losses[known].sum() / visits[known].sum()
        return torch.where(known, losses / visits.clamp_min(1), whole)[self._bin(t)].to(t.dtype)

    def variance(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Variance of the loss over texts about t; of bins with few visits, the mean over all others, or 1."""
        known, (visits, losses, squares) = self._known(), self.sums
        if not bool(known.any()):
            return torch.ones_like(t)
        own = squares / visits.clamp_min(1) - (losses / visits.clamp_min(1)).square()
        whole = (own * visits)[known].sum() / visits[known].sum()
        return torch.where(known, own, whole).clamp_min(1e-6)[self._bin(t)].to(t.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums.clone()}  # it changes in place while a checkpoint may be on its way to the disk

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums = state["sums"].clone()


def unit(t: Float[Tensor, "n"], law: Law, moments: LossMoments) -> Float[Tensor, "n"]:
    """The law alone."""
    del law, moments
    return torch.ones_like(t)


def likelihood(t: Float[Tensor, "n"], law: Law, moments: LossMoments) -> Float[Tensor, "n"]:
    """u du/dt over the law's density: the weight of a squared error in the NELBO (14), u = t / (1 - t)."""
    del moments
    return t / (1 - t).clamp_min(1 - LAST).pow(3) / law.density(t)


def snr(t: Float[Tensor, "n"], law: Law, moments: LossMoments) -> Float[Tensor, "n"]:
    """min(u^2, 5): Min-SNR of Hang et al. 2023, arXiv:2303.09556, for predictions of x_1."""
    del law, moments
    return (t / (1 - t).clamp_min(1e-6)).square().clamp(1e-3, MIN_SNR)


def learned(t: Float[Tensor, "n"], law: Law, moments: LossMoments) -> Float[Tensor, "n"]:
    """1 / mean loss: where a learned uncertainty w of exp(-w(t)) loss + w(t) settles (EDM2, arXiv:2312.02696)."""
    del law
    return 1 / moments.mean(t).clamp_min(1e-3)


def inverse_variance(t: Float[Tensor, "n"], law: Law, moments: LossMoments) -> Float[Tensor, "n"]:
    """1 / variance of the loss over texts."""
    del law
    return 1 / moments.variance(t)


Weighting = Callable[[Float[Tensor, "n"], Law, LossMoments], Float[Tensor, "n"]]
WEIGHTINGS: dict[str, Weighting] = {
    "unit": unit,
    "likelihood": likelihood,
    "snr": snr,
    "learned": learned,
    "inverse_variance": inverse_variance,
}


def weights(name: str, t: Float[Tensor, "b"], law: Law, moments: LossMoments) -> Float[Tensor, "b"]:
    """Weights of draws of the law, of mean one under it, none above `CLIP` times the mean before clipping."""
    if name == "unit":
        return torch.ones_like(t)
    weighting = WEIGHTINGS[name]
    nodes = law.quantile((torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES)
    whole = weighting(nodes, law, moments)
    top = whole.max()
    for _ in range(50):  # towards the largest top that is at most CLIP times the mean of what it leaves
        top = torch.minimum(top, CLIP * whole.clamp_max(top).mean())
    return (weighting(t.double(), law, moments).clamp_max(top) / whole.clamp_max(top).mean()).to(t.dtype)
