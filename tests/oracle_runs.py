"""Runs whose network is an exact Markov chain, and requests as lm-eval makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, UInt
from oracle import MarkovChain, random_chain
from torch import Tensor

from catmaps.config import Config, DataConfig
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.times import warp
from catmaps.model import Run
from catmaps.text.tokenizers import Tokenizer

K = 5


class AnyLength(MarkovChain):
    """A chain for texts of every length."""

    def log_marginals(self, evidence: Tensor) -> Tensor:
        return MarkovChain(self.initial, self.transition, evidence.shape[1]).log_marginals(evidence)


def stationary_chain() -> AnyLength:
    """Of K symbols; the exact probability of any piece of its text needs no text before it."""
    transition = random_chain(K, 2, seed=3, spread=2.0).transition
    return AnyLength(torch.linalg.matrix_power(transition, 200)[0], transition, 2)


class Letters(Tokenizer):
    """a to e; anything else is dropped. `ends`: e is the end of a document and no letter."""

    name, vocab_size = "letters", K

    def __init__(self, ends: bool = False) -> None:
        self.letters, self.eos_id = ("abcd", 4) if ends else ("abcde", None)

    def normalise(self, text: str) -> str:
        return "".join(letter for letter in text if letter in self.letters)

    def encode(self, text: str) -> UInt[np.ndarray, "_"]:
        return np.array([self.letters.index(letter) for letter in self.normalise(text)], dtype=self.dtype)

    def decode(self, ids: Integer[np.ndarray, "_"] | Sequence[int]) -> str:
        return "".join(self.letters[i] for i in self._checked(ids) if i != self.eos_id)

    def token_strings(self) -> list[str]:
        return [*self.letters, "<|eos|>"][:K]


class OracleRun(Run):
    """A run whose network is an exact chain of K symbols."""

    def __init__(self, model: AnyLength, length: int, tokenizer: Tokenizer) -> None:
        model.log_prior = torch.zeros(K, dtype=torch.float64)  # pyright: ignore[reportAttributeAccessIssue]
        fields = {
            "path": Path("oracle"),
            "config": Config(data=DataConfig(length=length)),
            "network": model,
            "tokenizer": tokenizer,
            "law": warp(K),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def flow_map(self) -> FlowMap:
        return FlowMap(self.network)  # pyright: ignore[reportArgumentType]

    @property
    def flow_network(self) -> Any:
        return self.network


@dataclass
class Ask:
    """A request, as lm-eval makes it."""

    args: tuple[Any, ...]
    doc_id: int | None = None
    task_name: str | None = None
