"""What scoring a text gives: bounds, their rates, and standard errors from sampling and over windows and texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

KEYS = {"nelbo": "nelbo", "cross-entropy": "cross_entropy_bound", "finite-step": "finite_step_bound"}
"""How each bound is called in a record."""


@dataclass(frozen=True)
class TextScore:
    """The bound of one text and of its windows, nats."""

    name: str
    window_nats: Float[Tensor, "w"]
    window_stderr: Float[Tensor, "w"]
    """Standard errors of the random times and noise."""
    window_tokens: Float[Tensor, "w"]
    token_ids: Int[Tensor, "n"]
    token_nats: Float[Tensor, "n"]
    """What each token adds to the bound."""
    characters: int
    bytes: int
    normalised: bool
    """Whether the tokenizer changed the text; counts and bound are of the text as it was scored."""

    @property
    def nats(self) -> float:
        return self.window_nats.sum().item()

    @property
    def stderr(self) -> float:
        return self.window_stderr.square().sum().sqrt().item()

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def as_dict(self) -> dict[str, Any]:
        """One line of a record; every rate is a bound."""
        bits, stderr = self.nats / math.log(2), self.stderr / math.log(2)
        return {
            "text": self.name,
            "bound_nats": self.nats,
            "bound_stderr_nats": self.stderr,
            "bound_bits_per_char": bits / self.characters if self.characters else math.nan,
            "bound_stderr_bits_per_char": stderr / self.characters if self.characters else math.nan,
            "bound_bits_per_byte": bits / self.bytes if self.bytes else math.nan,
            "bound_perplexity_per_token": perplexity(self.nats, self.tokens),
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "windows": len(self.window_nats),
            "normalised": self.normalised,
        }


@dataclass(frozen=True)
class Score:
    """An upper bound on the negative log-likelihood of texts, with the standard errors of the sum."""

    nats: float
    """The bound of everything."""
    monte_carlo_stderr: float
    """Standard error of `nats` from the random times and noise."""
    windows_stderr: float
    """Standard error of `nats` from the choice of windows, if they are a sample of a larger text."""
    tokens: int
    characters: int
    bytes: int
    windows: int
    num_samples: int
    texts: int = 1
    texts_stderr: float = math.nan
    """Standard error of `nats` from the choice of texts, whose windows belong together."""
    bound: str = "nelbo"
    steps: int | None = None

    def bits_per(self, count: int) -> float:
        return self.nats / math.log(2) / count if count else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Everything, with the rates people quote. Each is a bound."""
        scale = 1 / (math.log(2) * self.characters) if self.characters else math.nan
        key = KEYS[self.bound]
        return {
            "bound": self.bound,
            "steps": self.steps,
            f"{key}_nats": self.nats,
            f"{key}_bits_per_char": self.nats * scale,
            f"{key}_bits_per_byte": self.bits_per(self.bytes),
            f"{key}_perplexity_per_token": perplexity(self.nats, self.tokens),
            "stderr_bits_per_char_monte_carlo": self.monte_carlo_stderr * scale,
            "stderr_bits_per_char_windows": self.windows_stderr * scale,
            "stderr_bits_per_char_texts": self.texts_stderr * scale,
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "windows": self.windows,
            "texts": self.texts,
            "samples_per_window": self.num_samples,
        }


def perplexity(nats: float, tokens: int) -> float:
    """exp(nats per token), a bound if `nats` is one; cut at e^700."""
    return math.exp(min(700.0, nats / tokens)) if tokens else math.nan


def ratio_stderr(nats: Float[Tensor, "n"], tokens: Float[Tensor, "n"]) -> float:
    """Standard error of the sum of `nats` for so many tokens, from their spread about the common rate; NaN for one."""
    if len(nats) < 2:
        return math.nan
    residual = nats - nats.sum() / tokens.sum() * tokens
    return (len(nats) / (len(nats) - 1) * residual.square().sum()).sqrt().item()


def pool(scores: Sequence[TextScore], num_samples: int, bound: str = "nelbo", steps: int | None = None) -> Score:
    """The bound of all texts together, each of whose windows had `num_samples` draws."""
    nats = torch.cat([s.window_nats for s in scores])
    stderr = torch.cat([s.window_stderr for s in scores])
    tokens = torch.cat([s.window_tokens for s in scores])
    by_text = torch.tensor([[s.nats, s.tokens] for s in scores], dtype=torch.float64)
    return Score(
        nats=nats.sum().item(),
        monte_carlo_stderr=stderr.square().sum().sqrt().item(),
        windows_stderr=ratio_stderr(nats, tokens),
        tokens=sum(s.tokens for s in scores),
        characters=sum(s.characters for s in scores),
        bytes=sum(s.bytes for s in scores),
        windows=len(nats),
        num_samples=num_samples,
        texts=len(scores),
        texts_stderr=ratio_stderr(by_text[:, 0], by_text[:, 1]),
        bound=bound,
        steps=steps,
    )
