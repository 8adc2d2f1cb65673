"""Uniform-state diffusion: tokens are replaced by random ones, and the model may change any token at any time.

At time t = alpha a token is kept with probability alpha and otherwise drawn anew from all V (the log-linear schedule).
With e the one-hot of the right token, c the prediction and

    x' = V alpha e + 1 - alpha,   c' = V alpha c + 1 - alpha,

a token at i is carried to j, going back, at a rate proportional to r_j = x'_j / x'_i, and in the model to
rho_j = c'_j / c'_i. The divergence of the two processes is the bound

    -log p(x) <= int_0^1 1/(V alpha) E sum_l sum_j [r_j log(r_j / rho_j) - r_j + rho_j] dalpha.                   (19)

**c is the leave-one-out posterior** p(x_l | z at the other positions), z the noisy text: with it rho is the mean of r
given z, which is what the exact process does, and (19) is an equality. With the posterior given all of z, which papers
name, it is not. The step of `sample` too is exact for a lone token with this c.

Source: Schiff et al. 2024, arXiv:2412.10193 (UDLM), and Sahoo et al. 2025, arXiv:2506.10892 (Duo), eq. (19);
arXiv:2605.22765 (leave-one-out); docs/maths.md (g).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.baselines.draws import Draws, Predictor, begin, mean_of_draws, weighted
from catmaps.flow.likelihood import Bound
from catmaps.flow.losses import TokenLoss
from catmaps.flow.samplers import categorical

FIRST, LAST = 1e-4, 1 - 1e-3  # times of (19): rounding reigns before, weights 1/(1 - alpha) after


def corrupt(
    tokens: Int[Tensor, "b l"], alpha: Float[Tensor, "b"], noise: Float[Tensor, "b l"], vocab_size: int
) -> Int[Tensor, "b l"]:
    """The text at time alpha, one uniform draw per position: below alpha it keeps the token, above it picks another."""
    kept, rest = noise < alpha[:, None], 1 - alpha[:, None]
    anew = ((noise - alpha[:, None]) / rest * vocab_size).long().clamp(0, vocab_size - 1)
    return torch.where(kept, tokens, anew)


def _predict(predictor: Predictor, text: Int[Tensor, "b l"], alpha: Float[Tensor, "b"]) -> Float[Tensor, "b l v"]:
    return predictor(text, alpha[:, None]).log_softmax(-1)


def _at(values: Float[Tensor, "b l v"], index: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    return values.gather(-1, index[..., None])[..., 0]


def _right(text: Tensor, tokens: Tensor, alpha: Tensor, rest: Tensor, size: int) -> Float[Tensor, "b l"]:
    """x' at the noisy token."""
    return torch.where(text == tokens, size * alpha + rest, rest)


def nats(predictor: Predictor, tokens: Int[Tensor, "b l"], draws: Draws) -> Float[Tensor, "b l"]:
    """One draw of the integral (19) up to LAST, by token. One call.

    Changed tokens are rare near the end, 1 - alpha of all, and weigh 1/(1 - alpha): times are drawn with a density like
    (1 - alpha)^(-1/2), the root of the second moment.
    """
    size, cut = predictor.vocab_size, 1 - (1 - LAST) ** 0.5
    root = 1 - cut * draws.place
    alpha, slope = (1 - root.square()).clamp_min(FIRST), 2 * cut * root
    text = corrupt(tokens, alpha, draws.noise, size)
    log_c = _predict(predictor, text, alpha)
    alpha, rest, slope = (time[:, None].to(log_c.dtype) for time in (alpha, 1 - alpha, slope))
    log_bar = (size * alpha[..., None] * log_c.exp() + rest[..., None]).log()
    here, right = _at(log_bar, text), _right(text, tokens, alpha, rest, size)
    r, r_right = rest / right, (size * alpha + rest) / right  # of wrong tokens, of the right one
    crossed = r * ((size - 1) * r.log() - log_bar.sum(-1) + size * here)
    crossed = crossed + r_right * r_right.log() - (r_right - r) * (_at(log_bar, tokens) - here)
    return (crossed - size / right + size * (-here).exp()) * slope / (size * alpha)


def end_nats(predictor: Predictor, tokens: Int[Tensor, "b l"], draws: Draws) -> Float[Tensor, "b l"]:
    """One draw of the cross-entropy at LAST, -log p(x_l | z) with p ~ c x'(z_l), by token: in place of the rest."""
    size = predictor.vocab_size
    alpha = torch.full_like(draws.place, LAST)
    text = corrupt(tokens, alpha, draws.noise, size)
    log_c = _predict(predictor, text, alpha)
    alpha, rest = (time[:, None].to(log_c.dtype) for time in (alpha, 1 - alpha))
    bar = size * alpha * _at(log_c, text).exp() + rest
    return bar.log() - _at(log_c, tokens) - _right(text, tokens, alpha, rest, size).log()


def loss(predictor: Predictor, tokens: Int[Tensor, "b l"], draws: Draws, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """One draw of (19) per text."""
    return weighted(nats(predictor, tokens, draws), weight)


def bound(
    predictor: Predictor,
    tokens: Int[Tensor, "b l"],
    *,
    num_samples: int = 16,
    generator: torch.Generator | None = None,
) -> Bound:
    """Monte-Carlo estimate of (19) for each text: `num_samples` >= 2 calls, and two for the end."""
    path = mean_of_draws(nats, predictor, tokens, num_samples, generator)
    end = mean_of_draws(end_nats, predictor, tokens, 2, generator)
    stderr = (path.stderr.square() + end.stderr.square()).sqrt()
    return Bound(path.nats + end.nats, stderr, path.per_token + end.per_token)


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
    """Texts (B, L) in `steps` calls on an even grid of times. A step alpha -> beta from token i draws j from

        (beta c_j + (1 - beta)/V) (share 1[i = j] + (1 - share)/V),   share = alpha/beta,

    up to a factor: Bayes' rule for each token alone, exact with the leave-one-out posterior.
    """
    device, size = None if generator is None else generator.device, predictor.vocab_size
    fill = torch.randint(size, shape, generator=generator, device=device)
    text, given = begin(fill, tokens, known)
    for i in range(steps):
        alpha, beta = i / steps, (i + 1) / steps
        time = torch.full((shape[0],), alpha, dtype=torch.float64, device=device)
        c = (_predict(predictor, text, time) / temperature).softmax(-1)
        back = beta * c + (1 - beta) / size
        stay = torch.full_like(back, (1 - alpha / beta) / size)
        stay = stay.scatter_add(-1, text[..., None], torch.full_like(back[..., :1], alpha / beta))
        text = torch.where(given, text, categorical(back * stay, generator))
    return text
