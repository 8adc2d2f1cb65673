"""Left to right: log p(x) = sum_l log p(x_l | x_1 ... x_{l-1}), exact.

The predictor is causal. It reads a start symbol, the id V, and the text without its last token, so that its row l
never saw token l. There is no noise and no time.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from catmaps.baselines.draws import Draws, Predictor, begin, weighted
from catmaps.flow.likelihood import Bound
from catmaps.flow.losses import TokenLoss
from catmaps.flow.samplers import categorical


def _logits(predictor: Predictor, before: Int[Tensor, "b n"]) -> Float[Tensor, "b m v"]:
    """Of every token after none, one, ... n tokens: m = n + 1 rows."""
    start = before.new_full((len(before), 1), predictor.vocab_size)
    return predictor(torch.cat([start, before], 1), torch.zeros(len(before), 1, device=before.device))


def nats(predictor: Predictor, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """-log p(x_l | x_1 ... x_{l-1}): one call."""
    log_p = _logits(predictor, tokens[:, :-1]).log_softmax(-1)
    return -log_p.gather(-1, tokens[..., None])[..., 0]


def loss(predictor: Predictor, tokens: Int[Tensor, "b l"], draws: Draws, weight: Float[Tensor, "b l"]) -> TokenLoss:
    """The exact negative log-likelihood; nothing is drawn."""
    del draws
    return weighted(nats(predictor, tokens), weight)


@torch.no_grad()
def bound(
    predictor: Predictor,
    tokens: Int[Tensor, "b l"],
    *,
    num_samples: int = 16,
    generator: torch.Generator | None = None,
) -> Bound:
    """-log p itself, without error: `num_samples` is idle."""
    del num_samples, generator
    values = nats(predictor, tokens).double().cpu()
    return Bound(values.sum(1), torch.zeros(len(tokens), dtype=torch.float64), values)


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
    """Texts (B, L), token by token: one call each, whatever `steps`; `known` must be a prefix, the same in all rows.

    Nothing is kept between calls, so a call costs what its text so far is long.

    Raises:
        ValueError: `known` is no common prefix.
    """
    del steps
    device = None if generator is None else generator.device
    text, given = begin(torch.zeros(shape, dtype=torch.long, device=device), tokens, known)
    first = int(given.sum(1).max())
    if not bool(given[:, :first].all()):
        raise ValueError("an autoregressive model goes on after a prefix, the same in all rows; it fills no gaps")
    for place in range(first, shape[1]):
        logits = _logits(predictor, text[:, :place])[:, -1:] / temperature
        text[:, place] = categorical(logits.softmax(-1), generator)[:, 0]
    return text
