"""How likely a run's base flow finds a text: bounds in windows, with both standard errors."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from catmaps.errors import UserError
from catmaps.flow.likelihood import nelbo
from catmaps.model import Run


@dataclass(frozen=True)
class Score:
    """An upper bound on the negative log-likelihood of a text, cut into windows that are scored on their own.

    Each window of L tokens is scored without the text before it, so the sum bounds the whole text's as well.
    """

    nats: float
    """The bound of the whole text."""
    monte_carlo_stderr: float
    """Standard error of `nats` from the random times and noise."""
    windows_stderr: float
    """Standard error of `nats` from the choice of windows, if they are a sample of a larger text."""
    tokens: int
    characters: int
    bytes: int
    windows: int
    num_samples: int

    def bits_per(self, count: int) -> float:
        return self.nats / math.log(2) / count

    def as_dict(self) -> dict[str, float | int]:
        """Everything, with the rates people quote. Each is a bound."""
        scale = 1 / (math.log(2) * self.characters)
        return {
            "nelbo_nats": self.nats,
            "nelbo_bits_per_char": self.nats * scale,
            "nelbo_bits_per_byte": self.bits_per(self.bytes),
            "nelbo_perplexity_per_token": math.exp(min(700.0, self.nats / self.tokens)),
            "stderr_bits_per_char_monte_carlo": self.monte_carlo_stderr * scale,
            "stderr_bits_per_char_windows": self.windows_stderr * scale,
            "tokens": self.tokens,
            "characters": self.characters,
            "windows": self.windows,
            "samples_per_window": self.num_samples,
        }


def score(
    run: Run,
    windows: Int[Tensor, "n l"],
    tail: Int[Tensor, "1 k"] | None = None,
    *,
    num_samples: int = 16,
    seed: int = 0,
    batch: int = 64,
) -> Score:
    """Scores windows of equal length, and a shorter last one if given.

    Raises:
        UserError: Nothing to score, or fewer than 2 samples.
    """
    if num_samples < 2:
        raise UserError(f"--samples must be at least 2, not {num_samples}")
    parts = [part for part in windows.split(batch)] + ([] if tail is None else [tail])
    if not any(len(part) for part in parts):
        raise UserError("there is nothing to score: the text is empty after normalisation")
    generator, device = run.generator(seed), run.device
    bounds = [
        nelbo(run.flow_map, part.to(device), run.law, num_samples=num_samples, generator=generator)
        for part in parts
        if len(part)
    ]
    nats, error = torch.cat([b.nats for b in bounds]), torch.cat([b.stderr for b in bounds])
    # Decoded as one: a window may end inside a character.
    text = run.tokenizer.decode(torch.cat([part.flatten() for part in parts]).numpy())
    return Score(
        nats=nats.sum().item(),
        monte_carlo_stderr=error.square().sum().sqrt().item(),
        windows_stderr=nats.std().item() * math.sqrt(len(nats)) if len(nats) > 1 else float("nan"),
        tokens=sum(part.numel() for part in parts),
        characters=len(text),
        bytes=len(text.encode()),
        windows=len(nats),
        num_samples=num_samples,
    )


def cut(run: Run, text: str) -> tuple[Int[Tensor, "n l"], Int[Tensor, "1 k"] | None]:
    """The windows of a text, and its shorter tail."""
    ids = torch.from_numpy(run.tokenizer.encode(text).astype("int64"))
    length = run.config.data.length
    whole = len(ids) // length * length
    return ids[:whole].view(-1, length), ids[None, whole:] if whole < len(ids) else None
