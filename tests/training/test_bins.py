"""Figures over the clock: right by definition, and without effect on training."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from small_network import F64, L, V, fresh, trained
from tiny_runs import began, rows, saved, tiny, tiny_kind
from torch.nn.functional import one_hot

from catmaps.config import Config
from catmaps.flow.interpolant import State
from catmaps.flow.noise import Noise
from catmaps.flow.times import warp
from catmaps.model import BINS

pytest.importorskip("olmo_core")

from catmaps.training.bins import CLOCK_BINS, NOISE, BinsCallback, bin_figures, bin_times, clock_figures
from catmaps.training.train import train

TOKENS = torch.randint(V, (4, L), generator=torch.Generator().manual_seed(3))
TIMES = torch.tensor([0.1, 0.3, 0.6, 0.9])


def evaluating(config: Config, every: int = 5) -> Config:
    return replace(config, training=replace(config.training, evaluate_every=every))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / BINS).read_text().splitlines()]


@pytest.mark.parametrize("tile", [10**6, 2 * V], ids=["whole", "tiles"])
@pytest.mark.parametrize("mode", [("belief", True), ("linear", False)], ids=["belief", "linear"])
def test_figures_are_what_they_are_called(tile: int, mode: tuple[str, bool]) -> None:
    net = trained(input=mode[0], skip=mode[1]).float()
    net.tile = tile
    figures = bin_figures(net, TOKENS, TIMES, first=8)
    # By definition, from the whole state and the network's own logits.
    noise = Noise.of(NOISE, torch.arange(8, 12), L, V)
    t, e = TIMES[:, None], one_hot(TOKENS, V).float()
    if mode[0] == "belief":
        x = State((1 - t[..., None]) * noise.x + t[..., None] * e)
        logits = net.logits(net.encode(x, t, t), x, t, t)
        mu, log_mu = logits.softmax(-1), logits.log_softmax(-1)
        loss = -log_mu.gather(-1, TOKENS[..., None]).mean()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in net.parameters() if p.grad is not None))
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert figures["squared_error"] == pytest.approx((e - mu).square().sum(-1).mean().item(), rel=1e-5)
        assert figures["entropy"] == pytest.approx(-(mu * log_mu).sum(-1).mean().item(), rel=1e-5)
        assert figures["largest_logit"] == pytest.approx(logits.max().item(), rel=1e-5)
        assert figures["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    else:  # noise is drawn in the projection: no whole state, but tiles and whole agree
        net.tile = 10**6
        assert figures == pytest.approx(bin_figures(net, TOKENS, TIMES, first=8), rel=1e-4)


def test_no_gradient_is_left_behind_and_none_needed() -> None:
    net = fresh()
    with_gradient, without = (clock_figures(net, TOKENS, gradient=wanted) for wanted in (True, False))
    assert all(p.grad is None for p in net.parameters())
    assert without.pop("gradient_norm") == [None] * CLOCK_BINS
    assert all(norm is not None and norm > 0 for norm in with_gradient.pop("gradient_norm"))
    assert {name: pytest.approx(values, rel=1e-5) for name, values in without.items()} == with_gradient


def test_bins_are_equal_shares_of_the_warp() -> None:
    tau = warp(V).cdf(bin_times(V, 8).to(F64)) * CLOCK_BINS
    assert torch.equal(tau.long(), torch.arange(CLOCK_BINS)[:, None].expand(-1, 8))


@pytest.mark.parametrize("kind", ["base", "psd"])
def test_training_is_the_same_to_the_bit_with_and_without(
    kind: str, tmp_path: Path, shards: Path, base_run: Path
) -> None:
    config = evaluating(tiny_kind(kind, shards, base_run))
    watched, alone = (began(config, tmp_path / name) for name in ("watched", "alone"))
    train(watched)
    with patch.object(BinsCallback, "write", lambda _: None):
        train(alone)
    assert rows(watched) == rows(alone)
    assert saved(watched) == saved(alone)
    assert [line["step"] for line in lines(watched)] == [5, 10, 15, 20]
    assert not (alone / BINS).exists()


def test_a_resumed_run_has_every_line_once(tmp_path: Path, shards: Path) -> None:
    config = evaluating(tiny(shards))
    whole, halves = (began(config, tmp_path / name) for name in ("whole", "halves"))
    train(whole)
    train(halves, stop_after=10)
    undone = {**lines(halves)[-1], "step": 15}
    with (halves / BINS).open("a") as file:  # what a killed process wrote after its last checkpoint
        file.write(json.dumps(undone) + '\n{"step": 20, "lo')
    train(halves)
    assert lines(halves) == lines(whole)


def test_baselines_have_no_clock(tmp_path: Path, shards: Path) -> None:
    folder = began(replace(evaluating(tiny(shards)), family="masked"), tmp_path / "masked")
    train(folder)
    assert not (folder / BINS).exists()
