"""Weighted particles in independent runs: weights, effective numbers, systematic resampling, evidence."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from catmaps.flow.samplers import categorical


@dataclass(frozen=True)
class Particles:
    """What B runs of P particles end with."""

    tokens: Int[Tensor, "b p l"]
    log_weights: Float[Tensor, "b p"]
    """Normalised in every run."""
    rewards: Float[Tensor, "b p"]
    log_evidence: Float[Tensor, "b"]
    """Of each run; its exponential is an unbiased estimate of E exp r under the sampler's law."""
    effective: Float[Tensor, "n b"]
    """Effective number of particles at every weighing, before they were drawn anew."""

    def draw(self, generator: torch.Generator | None = None) -> Int[Tensor, "b l"]:
        """One text of each run, by weight."""
        return self._pick(categorical(self.log_weights[:, None].exp(), generator)[:, 0])

    def best(self) -> Int[Tensor, "b l"]:
        """The text of highest reward of each run: no draw from the tilted law, but often what is wanted."""
        return self._pick(self.rewards.argmax(1))

    def _pick(self, index: Int[Tensor, "b"]) -> Int[Tensor, "b l"]:
        return self.tokens[torch.arange(len(index), device=index.device), index]


class Swarm:
    """Weights of B runs of P particles whose rows stand run after run, B * P in all; fp64."""

    def __init__(self, runs: int, size: int, device: torch.device) -> None:
        self.log_weights = torch.zeros(runs, size, dtype=torch.float64, device=device)
        self.log_psi = torch.zeros_like(self.log_weights)
        self.log_evidence = torch.zeros_like(self.log_weights[:, 0])
        self.effective: list[Tensor] = []

    def correct(self, log_ratio: Float[Tensor, "r"]) -> None:
        """Weighs particles that did not move by the sampler's law: log(the sampler's / theirs) of a step."""
        self.log_weights += log_ratio.view_as(self.log_weights)

    def weigh(self, log_psi: Float[Tensor, "r"]) -> None:
        """Weighs with psi(now) / psi(before)."""
        log_psi = log_psi.double().view_as(self.log_psi)
        self.log_weights += log_psi - self.log_psi
        self.log_psi = log_psi
        self.effective.append(self.log_weights.softmax(1).square().sum(1).reciprocal())

    def renew(self, threshold: float, generator: torch.Generator | None) -> Int[Tensor, "r"] | None:
        """Draws anew, in proportion to weight, the particles of runs whose effective number is below a share.

        Systematic: of n = P w expected copies a particle gets floor(n) or ceil(n). Weights are even afterwards.

        Returns:
            The row that each row becomes a copy of; None if all stay.
        """
        runs, size = self.log_weights.shape
        poor = self.effective[-1] < threshold * size
        if not bool(poor.any()):
            return None
        options = {"dtype": torch.float64, "device": self.log_weights.device}
        comb = (torch.rand(runs, 1, generator=generator, **options) + torch.arange(size, **options)) / size
        cumulative = self.log_weights.softmax(1).cumsum(1)
        chosen = torch.searchsorted(cumulative / cumulative[:, -1:], comb, right=True).clamp_max(size - 1)
        chosen = torch.where(poor[:, None], chosen, torch.arange(size, device=chosen.device))
        mean = self.log_weights.logsumexp(1) - math.log(size)
        self.log_evidence += torch.where(poor, mean, 0.0)
        self.log_weights = torch.where(poor[:, None], 0.0, self.log_weights)
        self.log_psi = self.log_psi.gather(1, chosen)
        return (chosen + size * torch.arange(runs, device=chosen.device)[:, None]).flatten()

    def end(self, tokens: Int[Tensor, "r l"], rewards: Float[Tensor, "r"]) -> Particles:
        runs, size = self.log_weights.shape
        evidence = self.log_evidence + self.log_weights.logsumexp(1) - math.log(size)
        texts = tokens.view(runs, size, tokens.shape[1])
        weights = self.log_weights.log_softmax(1)
        return Particles(texts, weights, rewards.view(runs, size), evidence, torch.stack(self.effective))
