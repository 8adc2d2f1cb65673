"""The dense reference: a categorical flow map as published codes compute it, written plainly and in fp32.

Noise, one-hots, states, logits and probabilities are (B, L, V) tensors; the derivative by time is torch.func.jvp; the
input is x W. It is for timing alone: it shares no code with the package.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(128, 6 * width)

    def forward(self, x: Tensor, c: Tensor, plain_attention: bool) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        y = self.norms[0](x) * (1 + scale1) + shift1
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        if plain_attention:  # fused kernels have no forward derivative
            y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + gate1 * self.out(y.transpose(1, 2).flatten(2))
        y = self.norms[1](x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(y), approximate="tanh"))


class DenseNetwork(nn.Module):
    """(x, s, t) -> logits, all (B, L, V) or (B,)."""

    def __init__(self, vocab_size: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.table = nn.Linear(vocab_size, width, bias=False)
        self.blocks = nn.ModuleList([DenseBlock(width, heads) for _ in range(blocks)])
        self.times = nn.Sequential(nn.Linear(2 * 64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, x: Tensor, s: Tensor, t: Tensor, plain_attention: bool = False) -> Tensor:
        frequency = torch.exp(torch.linspace(0, 4, 32))
        phase = torch.stack([s, t], -1)[..., None] * frequency
        c = self.times(torch.cat([phase.sin(), phase.cos()], -1).flatten(1))
        h = self.table(x)
        for block in self.blocks:
            h = block(h, c, plain_attention)
        return self.head(self.norm(h))


def noisy(tokens: Tensor, vocab_size: int, t: Tensor) -> Tensor:
    onehot = F.one_hot(tokens, vocab_size).float()
    return (1 - t)[:, None, None] * torch.randn_like(onehot) + t[:, None, None] * onehot


def base_loss(network: DenseNetwork, tokens: Tensor) -> Tensor:
    t = torch.rand(len(tokens))
    logits = network(noisy(tokens, network.vocab_size, t), t, t)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def ecld_loss(network: DenseNetwork, tokens: Tensor) -> Tensor:
    """Endpoint-consistency distillation of the network by itself, with its derivative along t by forward mode."""
    s = 0.5 * torch.rand(len(tokens))
    t, x = s + 0.4, noisy(tokens, network.vocab_size, s)

    def endpoint(t: Tensor) -> tuple[Tensor, Tensor]:
        log_mu = network(x, s, t, plain_attention=True).log_softmax(-1)
        return log_mu.exp(), log_mu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (mu, log_mu), (rate, _) = torch.func.jvp(endpoint, (t,), (torch.ones_like(t),))[:2]
    gamma = ((t - s) / (1 - s))[:, None, None]
    with torch.no_grad():
        target = network(x + gamma * (mu - x), t, t).softmax(-1)
    kl = (target * (target.clamp_min(1e-20).log() - log_mu)).sum(-1)
    energy = ((1 - t)[:, None] * gamma[..., 0]).square() * rate.square().sum(-1)
    return (2 * kl + 2 * energy).mean()


@torch.no_grad()
def sample(network: DenseNetwork, batch: int, length: int, calls: int) -> Tensor:
    """Jumps of the map on an even grid."""
    x = torch.randn(batch, length, network.vocab_size)
    for i in range(calls):
        s, t = torch.full((batch,), i / calls), torch.full((batch,), (i + 1) / calls)
        mu = network(x, s, t).softmax(-1)
        gamma = ((t - s) / (1 - s))[:, None, None]
        x = x + gamma * (mu - x)
    return x.argmax(-1)


@torch.no_grad()
def bound(network: DenseNetwork, tokens: Tensor, draws: int) -> Tensor:
    """The squared error of `draws` times, as the likelihood bound needs it."""
    total = torch.zeros(())
    for _ in range(draws):
        t = torch.rand(len(tokens))
        mu = network(noisy(tokens, network.vocab_size, t), t, t).softmax(-1)
        total = total + (F.one_hot(tokens, network.vocab_size).float() - mu).square().sum()
    return total
