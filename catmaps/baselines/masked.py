"""Masked (absorbing) diffusion: every token is masked until a time of its own; the model fills masks in.

At time t a token is visible with probability t (the log-linear schedule) and otherwise the mask, the id V. The
predictor gives p(x_l | visible tokens) at masked positions; it does not depend on t, hence neither does the network.

    -log p(x) <= int_0^1 1/(1-t) E sum_{masked l} -log p(x_l | visible) dt.                                       (17)

Under t ~ U(0, 1) the number n of masks is uniform on 0 ... L, and E[1/(1-t) | n] = (L+1)/n. So (17) is

    -log p(x) <= L E_n (1/n) E sum_{masked l} -log p(x_l | visible),    n ~ U{1 ... L}, any n positions,          (18)

free of the weights 1/(1-t), whose variance is infinite. Training and bound draw n, stratified, in place of t.

Source: Sahoo et al. 2024, arXiv:2406.07524 (MDLM), eq. (17); Ou et al. 2024, arXiv:2406.03736, (18); docs/maths.md (g).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.baselines.draws import Draws, Predictor, begin, mean_of_draws, weighted
from catmaps.flow.likelihood import Bound
from catmaps.flow.losses import TokenLoss
from catmaps.flow.samplers import categorical


def _logits(predictor: Predictor, text: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
    return predictor(text, torch.zeros(len(text), 1, device=text.device))


def nats(predictor: Predictor, tokens: Int[Tensor, "b l"], draws: Draws) -> Float[Tensor, "b l"]:
    """One draw of (18) by token: L/n times the cross-entropy at each of n masked positions, 0 elsewhere. One call."""
    length = tokens.shape[1]
    n = (draws.place * length).long().clamp_max(length - 1)[:, None] + 1
    masked = draws.noise.argsort(1).argsort(1) < n
    log_p = _logits(predictor, torch.where(masked, predictor.vocab_size, tokens)).log_softmax(-1)
    return -log_p.gather(-1, tokens[..., None])[..., 0] * masked * (length / n).to(log_p.dtype)


def loss(predictor: Predictor, tokens: Int[Tensor, "b l"], draws: Draws, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """One draw of (18) per text."""
    return weighted(nats(predictor, tokens, draws), weight)


def bound(
    predictor: Predictor,
    tokens: Int[Tensor, "b l"],
    *,
    num_samples: int = 16,
    generator: torch.Generator | None = None,
) -> Bound:
    """Monte-Carlo estimate of (18) for each text, `num_samples` >= 2 calls."""
    return mean_of_draws(nats, predictor, tokens, num_samples, generator)


@torch.inference_mode()
def sample(
    predictor: Predictor,
    shape: tuple[int, int],
    steps: int,
    *,
    temperature: float = 1.0,
    tokens: Int[Tensor, "b l"] | None = None,
    known: Bool[Tensor, "b l"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b l"]:
    """Texts (B, L) in `steps` calls on an even grid of times: each mask is lifted with probability (t' - t)/(1 - t).

    Tokens drawn in one step are independent of each other; a drawn token stays. Draws are in fp64: in fp32 rare tokens
    are lost, which flatters samples.
    """
    device = None if generator is None else generator.device
    mask = predictor.vocab_size
    text, _ = begin(torch.full(shape, mask, dtype=torch.long, device=device), tokens, known)
    for i in range(steps):
        drawn = categorical((_logits(predictor, text) / temperature).softmax(-1), generator)
        lifted = torch.rand(shape, generator=generator, dtype=torch.float64, device=device) < 1 / (steps - i)
        text = torch.where((text == mask) & lifted, drawn, text)
    return text
