"""Predictors for the tests of the baselines: exact for a known law of texts, wrong, and a small network."""

import torch
from oracle import CLEAN_GAIN, ExactModel
from torch import Tensor

from catmaps.flow import times
from catmaps.flow.evidence import TimeFeatures
from catmaps.network.denoiser import NetworkConfig, smoothed_log_prior
from catmaps.network.tokens import TokenNetwork


def _seen(tokens: Tensor, vocab_size: int) -> Tensor:
    """Evidence of visible tokens; ids beyond the vocabulary say nothing."""
    same = tokens[..., None] == torch.arange(vocab_size)
    return torch.where(same | (tokens >= vocab_size)[..., None], 0.0, -CLEAN_GAIN).double()


class ExactNext:
    """log p(x_l | x_1 ... x_{l-1}) for a start symbol and a text."""

    def __init__(self, law: ExactModel) -> None:
        self.law, self.vocab_size = law, law.vocab_size

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        rows = []
        for n in range(tokens.shape[1]):
            text = torch.full((len(tokens), self.law.length), self.vocab_size)
            text[:, :n] = tokens[:, 1 : n + 1]
            rows.append(self.law.log_marginals(_seen(text, self.vocab_size))[:, n])
        return torch.stack(rows, 1)


class ExactMasked:
    """log p(x_l | visible tokens)."""

    def __init__(self, law: ExactModel) -> None:
        self.law, self.vocab_size = law, law.vocab_size

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return self.law.log_marginals(_seen(tokens, self.vocab_size))


class ExactUniform:
    """log p(x_l | noisy tokens at the other positions), or at all positions with `own`."""

    def __init__(self, law: ExactModel, own: bool = False) -> None:
        self.law, self.own, self.vocab_size = law, own, law.vocab_size

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        other = ((1 - t.double()) / self.vocab_size)[..., None]
        same = tokens[..., None] == torch.arange(self.vocab_size)
        evidence = torch.where(same, (t.double()[..., None] + other).log(), other.log())
        posterior = self.law.log_marginals(evidence)
        return posterior if self.own else posterior - evidence


class Flattened:
    """A wrong model: log probabilities times `factor`."""

    def __init__(self, inner: ExactNext | ExactMasked | ExactUniform, factor: float) -> None:
        self.inner, self.factor, self.vocab_size = inner, factor, inner.vocab_size

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return self.factor * self.inner(tokens, t).log_softmax(-1)


def every_text(vocab_size: int, length: int) -> Tensor:
    """All texts, (V^L, L)."""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).view(-1, length)


def token_network(vocab_size: int, special: int = 0, causal: bool = False) -> TokenNetwork:
    """Two blocks of width 16 in fp64 with every parameter drawn anew, so that nothing is silent."""
    config = NetworkConfig(width=16, blocks=2, heads=2, conditioning=8)
    prior = smoothed_log_prior(torch.arange(1.0, vocab_size + 1))
    net = TokenNetwork(config, TimeFeatures(times.uniform()), prior, special=special, causal=causal).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
        parameter.data.normal_(std=fan_in**-0.5, generator=generator)
    return net
