"""Measures of a study against exact values."""

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from jaxtyping import Bool, Float, Int
from oracle_runs import Letters, OracleRun, stationary_chain
from torch import Tensor

from catmaps.flow.likelihood import squared_error
from catmaps.studies import measures

pytest.importorskip("olmo_core")

LENGTH, ROWS = 8, 256


def log_probability(tokens: Int[Tensor, "b l"], known: Bool[Tensor, "b l"]) -> Float[Tensor, "b"]:
    """Of the known tokens, all others summed out; the stationary chain, by the forward algorithm."""
    chain = stationary_chain()
    forward = chain.initial.double().expand(len(tokens), -1)
    for place in range(tokens.shape[1]):
        if place:
            forward = forward @ chain.transition.double()
        allowed = torch.nn.functional.one_hot(tokens[:, place], forward.shape[1]).double()
        forward = torch.where(known[:, place, None], forward * allowed, forward)
    return forward.sum(1).log()


def chain_texts(rows: int) -> Int[Tensor, "b l"]:
    chain, generator = stationary_chain(), torch.Generator().manual_seed(5)
    tokens = [torch.multinomial(chain.initial, rows, replacement=True, generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(chain.transition[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


def test_given_halves_a_chain_costs_its_conditional_entropy() -> None:
    tokens, run = chain_texts(ROWS), OracleRun(stationary_chain(), LENGTH, Letters())
    with (
        patch("catmaps.training.train.find_shards", return_value=Path("nowhere")),
        patch.object(measures, "sequences", return_value=tokens.numpy()),
        patch("catmaps.scoring.integrand_of", return_value=squared_error),  # the chain is no network that could project
    ):
        figures = measures.given(run, seed=7, samples=64).figures
    everything = torch.ones_like(tokens, dtype=torch.bool)
    for name, known in measures._halves(ROWS, LENGTH, 0).items():
        assert known.sum(1).tolist() == [LENGTH // 2] * ROWS
        nats = log_probability(tokens, known) - log_probability(tokens, everything)
        exact = nats.mean().item() / (LENGTH // 2) / math.log(2)
        assert figures[f"given {name}"].value == pytest.approx(exact, abs=0.12), name  # 4 s.e. of the draws
        assert 0 < figures[f"given {name}"].stderr < 0.1
    assert figures["given prefix"].value > figures["given both ends"].value  # 1.74 and 1.54 bits
