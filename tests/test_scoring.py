"""Scores: windows cover the text, rates are quotients of counts, errors are those of sums."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import LENGTH, make_shards, tiny, trained, words

from catmaps.errors import UserError
from catmaps.flow.likelihood import nelbo
from catmaps.model import Run, load_run
from catmaps.scoring import Score, cut, score
from catmaps.text.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def run(base_run: Path) -> Run:
    return load_run(base_run)


@pytest.mark.parametrize("length", [0, 1, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH, 100])
def test_windows_and_tail_cover_every_token_once(length: int, run: Run) -> None:
    text = words(0, 60)[:length].replace(" ", "x")
    windows, tail = cut(run, text)
    assert windows.shape == (length // LENGTH, LENGTH)
    assert (0 if tail is None else tail.numel()) == length % LENGTH
    ids = torch.cat([windows.flatten(), torch.zeros(0, dtype=torch.long) if tail is None else tail.flatten()])
    assert run.tokenizer.decode(ids.numpy()) == text


def test_counts_and_rates(run: Run) -> None:
    text = words(1, 60)[:100]
    windows, tail = cut(run, text)
    result = score(run, windows, tail, num_samples=3, seed=4)
    assert (result.tokens, result.characters, result.bytes, result.windows) == (100, 100, 100, 7)
    said = result.as_dict()
    assert said["nelbo_nats"] == result.nats
    assert said["nelbo_bits_per_char"] == pytest.approx(result.nats / (100 * math.log(2)))
    assert said["nelbo_perplexity_per_token"] == pytest.approx(math.exp(result.nats / 100))
    assert said["stderr_bits_per_char_windows"] == pytest.approx(result.windows_stderr / (100 * math.log(2)))
    assert said["samples_per_window"] == 3
    assert 1 < said["nelbo_bits_per_char"] < 8


def test_the_whole_is_the_sum_of_its_windows(run: Run) -> None:
    """Same random numbers in the same order: the score is that of `nelbo` on each part, the errors those of a sum."""
    windows, tail = cut(run, words(1, 60)[:100])
    assert tail is not None
    result = score(run, windows, tail, num_samples=3, seed=4, batch=4)
    generator = torch.Generator().manual_seed(4)
    parts = [windows[:4], windows[4:], tail]
    bounds = [nelbo(run.flow_map, part, run.law, num_samples=3, generator=generator) for part in parts]
    nats = [value for bound in bounds for value in bound.nats.tolist()]
    errors = [value for bound in bounds for value in bound.stderr.tolist()]
    assert len(nats) == 7
    assert result.nats == pytest.approx(sum(nats))
    assert result.monte_carlo_stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)))
    mean = sum(nats) / 7
    spread = math.sqrt(sum((n - mean) ** 2 for n in nats) / 6)
    assert result.windows_stderr == pytest.approx(spread * math.sqrt(7))


def test_a_text_scores_as_its_windows(run: Run) -> None:
    windows, tail = cut(run, words(2, 60)[: 4 * LENGTH])
    assert tail is None
    whole = score(run, windows, seed=1)
    assert score(run, windows, tail, seed=1) == whole
    assert score(run, windows, seed=2) != whole
    assert whole.nats == pytest.approx(score(run, windows, seed=2).nats, rel=0.2)


def test_more_samples_bring_the_sampling_error_down(run: Run) -> None:
    windows, _ = cut(run, words(3, 200)[: 32 * LENGTH])
    few, many = (score(run, windows, num_samples=n).monte_carlo_stderr for n in (8, 128))
    assert 0 < many < few / 2


def test_one_window_has_no_spread(run: Run) -> None:
    windows, tail = cut(run, "cat")
    result = score(run, windows, tail)
    assert (result.windows, result.tokens) == (1, 3)
    assert math.isnan(result.windows_stderr)
    assert result.monte_carlo_stderr > 0


def test_what_cannot_be_scored_is_refused(run: Run) -> None:
    windows, tail = cut(run, "the cat")
    with pytest.raises(UserError, match="--samples must be at least 2, not 1"):
        score(run, windows, tail, num_samples=1)
    with pytest.raises(UserError, match="nothing to score"):
        score(run, *cut(run, ""))


def test_bits_per_char_and_per_byte_differ_where_characters_have_bytes(tmp_path: Path) -> None:
    """Windows of bytes that end inside a character count it once."""
    shards = make_shards(tmp_path / "shards", ByteTokenizer())
    config = tiny(shards, steps=1)
    run = load_run(trained(replace(config, data=replace(config.data, length=5)), tmp_path / "run"))
    text = "né à l'été, " * 3
    windows, tail = cut(run, text)
    result = score(run, windows, tail)
    assert (result.characters, result.bytes, result.tokens) == (len(text), len(text.encode()), len(text.encode()))
    said = result.as_dict()
    assert said["nelbo_bits_per_byte"] == pytest.approx(result.nats / (math.log(2) * result.bytes))
    assert said["nelbo_bits_per_char"] > said["nelbo_bits_per_byte"]


def test_perplexity_does_not_overflow() -> None:
    result = Score(1e9, 1.0, 1.0, tokens=1, characters=1, bytes=1, windows=1, num_samples=2)
    assert math.isfinite(result.as_dict()["nelbo_perplexity_per_token"])
