"""The adaptive clock: a running histogram of the likelihood bound over time, and the law that levels it."""

import torch
from jaxtyping import Float
from torch import Tensor

from catmaps.flow.times import Law, information_uniform

BINS = 64
REFRESH = 50  # steps between two laws: building a table costs about a millisecond
LAST = 0.95  # no information is left beyond, only noise times a huge weight


class InformationClock:
    """Keeps, per bin of a fixed clock, the running mean of d NELBO / d tau = u ||e - mu||^2 du/dtau (nats per token).

    Until every bin has been visited `patience` times the law it began with is in force: the clock's own, or one that
    was adapted before, of which a bin is asked for as many visits fewer as that law makes there. Draws beyond t = 0.95
    count as visits without information.

    Args:
        clock: Whose unit interval is cut into the bins.
        law: In force at the start; None: the clock's own.

    Source: LangFlow, arXiv:2604.11748 (information-uniform); docs/maths.md (b).
    """

    def __init__(
        self,
        clock: Law,
        law: Law | None = None,
        *,
        decay: float = 0.995,
        patience: float = 8.0,
        uniform_share: float = 0.1,
    ) -> None:
        self.clock, self.decay, self.patience, self.uniform_share = clock, decay, patience, uniform_share
        self.sums = torch.zeros(BINS, dtype=torch.float64)
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.information = torch.zeros(BINS, dtype=torch.float64)
        self.law = clock if law is None else law
        self.shares = torch.ones(BINS, dtype=torch.float64)  # of visits, relative to those of the clock's own law
        if law is not None:
            edges = clock.quantile(torch.linspace(0, 1, BINS + 1, dtype=torch.float64))
            self.shares = (law.cdf(edges).diff() * BINS).clamp(max=1)

    def contributions(self, t: Float[Tensor, "n"], squared_error: Float[Tensor, "n"]) -> Float[Tensor, "2 64"]:
        """What observations add to the histogram's sums and counts; to be summed over processes."""
        t = t.double().cpu()
        rate = t / (1 - t).clamp_min(1 - LAST).pow(3) / self.clock.density(t)
        value = torch.where(t < LAST, rate * squared_error.double().cpu(), torch.zeros_like(t))
        bin_ = (self.clock.cdf(t) * BINS).long().clamp(0, BINS - 1)
        counts = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bin_, torch.ones_like(t))
        return torch.stack([torch.zeros(BINS, dtype=torch.float64).index_add_(0, bin_, value), counts])

    def update(self, added: Float[Tensor, "2 64"], step: int) -> None:
        """Takes one step's contributions; every 50th step the law follows."""
        self.sums.mul_(self.decay).add_(added[0])
        self.counts.mul_(self.decay).add_(added[1])
        if step % REFRESH == 0:
            self.refresh()

    def refresh(self) -> None:
        # Once adapted the law visits quiet bins less, so their counts may sink again: they only have to exist.
        enough = 1e-3 if bool(self.information.any()) else self.patience * self.shares
        if bool((self.counts >= enough).all()):
            self.information = self.sums / self.counts
            self.law = information_uniform(self.clock, self.information, self.uniform_share)

    def state_dict(self) -> dict[str, Tensor]:
        # Copies: the histogram changes in place while a checkpoint may still be on its way to the disk.
        state = {"sums": self.sums, "counts": self.counts, "information": self.information}
        return {name: value.clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self.information = state["information"].clone()
        if bool(self.information.any()):  # else the law that it began with is still in force
            self.law = information_uniform(self.clock, self.information, self.uniform_share)
