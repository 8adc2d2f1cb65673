"""Scores: windows cover the text, rates are quotients of counts, errors are those of sums."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import LENGTH, make_shards, tiny, trained, words

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.flow.likelihood import nelbo, squared_error
from catmaps.model import Run, load_run
from catmaps.scores import Score, TextScore, pool, ratio_stderr
from catmaps.scoring import (
    ScoringConfig,
    Text,
    Window,
    best_times,
    bound_windows,
    cut,
    integrand_of,
    likelihood_law,
    score,
    score_texts,
    seen_directions,
    windows_of,
)
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
    parts, law = [windows[:4], windows[4:], tail], likelihood_law(run)
    bounds = [nelbo(run.flow_map, part, law, num_samples=3, generator=generator) for part in parts]
    nats = [value for bound in bounds for value in bound.nats.tolist()]
    errors = [value for bound in bounds for value in bound.stderr.tolist()]
    assert len(nats) == 7
    assert result.nats == pytest.approx(sum(nats))
    assert result.monte_carlo_stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)))
    residuals = [n - size * sum(nats) / 100 for n, size in zip(nats, [16] * 6 + [4], strict=True)]
    assert result.windows_stderr == pytest.approx(math.sqrt(7 / 6 * sum(r * r for r in residuals)))


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


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 12, 13, 100])
@pytest.mark.parametrize("context", [0, 1, 4, 7])
def test_windows_with_context_score_every_token_once(length: int, context: int) -> None:
    ids = np.arange(length)
    windows = windows_of(ids, 8, context)
    scored = [token for window in windows for token in window.tokens[window.known :].tolist()]
    assert scored == ids.tolist()
    assert all(len(window.tokens) <= 8 for window in windows)
    for window in windows[1:]:
        assert window.known >= context
        assert len(window.tokens) == 8 or context == 0
        first = int(window.tokens[0])
        assert window.tokens.tolist() == list(range(first, first + len(window.tokens)))
    if windows:
        assert windows[0].known == 0


def test_context_outside_the_window_is_refused() -> None:
    for context in (-1, 8):
        with pytest.raises(UserError, match="--context must be at least 0 and below"):
            windows_of(np.arange(20), 8, context)


def test_context_is_given_and_not_scored(run: Run) -> None:
    """A window's bound is the conditional one, with its context known."""
    ids = run.tokenizer.encode(words(4, 60)[:40])
    windows = windows_of(ids, LENGTH, 6)
    config = ScoringConfig(samples=4, seed=3)
    (text,) = score_texts(run, [Text("a", windows)], config)
    tokens = torch.stack([window.tokens for window in windows])
    known = torch.arange(LENGTH) < torch.tensor([[window.known] for window in windows])
    generator = torch.Generator().manual_seed(3)
    bound = nelbo(run.flow_map, tokens, likelihood_law(run), num_samples=4, known=known, generator=generator)
    torch.testing.assert_close(text.window_nats, bound.nats)
    torch.testing.assert_close(text.token_nats, bound.per_token[~known])
    assert text.tokens == 40
    assert text.characters == 40


def test_texts_are_scored_together_and_kept_apart(run: Run) -> None:
    """Windows of all texts share batches; each gets back its own, in order, with its tokens."""
    length = run.config.data.length
    strings = [words(5, 60)[:40], "cat", words(6, 60)[:16], words(7, 60)[:19]]
    texts = [Text(str(i), windows_of(run.tokenizer.encode(s), length), s) for i, s in enumerate(strings)]
    scores = score_texts(run, texts, ScoringConfig(samples=2, batch=3))
    for text, score_ in zip(strings, scores, strict=True):
        assert run.tokenizer.decode(score_.token_ids.numpy()) == text
        assert (score_.tokens, score_.characters, score_.normalised) == (len(text), len(text), False)
        assert score_.token_nats.sum().item() == pytest.approx(score_.nats)
        assert score_.window_nats.sum().item() == pytest.approx(score_.nats)
    total = pool(scores, 2)
    assert total.nats == pytest.approx(sum(s.nats for s in scores))
    assert (total.texts, total.windows, total.tokens) == (4, 7, 78)
    assert total.monte_carlo_stderr == pytest.approx(math.sqrt(sum(s.stderr**2 for s in scores)))


def test_a_normalised_text_is_said_to_be(run: Run) -> None:
    source = "The CAT, sat."
    (result,) = score_texts(run, [Text("a", windows_of(run.tokenizer.encode(source), 16), source)], ScoringConfig())
    assert result.normalised
    assert result.characters == len(run.tokenizer.decode(result.token_ids.numpy()))


def test_an_empty_text_among_others_adds_nothing(run: Run) -> None:
    texts = [Text("empty", windows_of(np.arange(0), 16)), Text("cat", windows_of(run.tokenizer.encode("cat"), 16))]
    empty, cat = score_texts(run, texts, ScoringConfig(samples=2))
    assert (empty.tokens, empty.nats, empty.characters) == (0, 0.0, 0)
    assert math.isnan(empty.as_dict()["bound_bits_per_char"])
    assert pool([empty, cat], 2).nats == cat.nats


def test_other_bounds_have_their_own_names(run: Run) -> None:
    windows = [Window(row) for row in cut(run, words(8, 60)[: 4 * LENGTH])[0]]
    nats = {}
    for config, key, samples in (
        (ScoringConfig(), "nelbo_nats", 16),
        (ScoringConfig(bound="cross-entropy"), "cross_entropy_bound_nats", 16),
        (ScoringConfig(bound="finite-step", steps=1), "finite_step_bound_nats", 16),
        (ScoringConfig(bound="finite-step", steps=4), "finite_step_bound_nats", 4),
        (ScoringConfig(bound="finite-step", steps=4, times=(0.0, 0.5, 0.6, 0.7, 1.0)), "finite_step_bound_nats", 4),
    ):
        total = pool(score_texts(run, [Text("a", windows)], config), config.num_samples, config.bound, config.steps)
        said = total.as_dict()
        assert (said["bound"], said["steps"], said["samples_per_window"]) == (config.bound, config.steps, samples)
        assert said[key] == total.nats
        nats[config] = total.nats
    tight, loose, one, four, own = nats.values()
    assert tight < loose
    assert len({one, four, own}) == 3


def test_a_pilot_changes_the_law_and_not_the_bound(run: Run) -> None:
    windows = [Window(row) for row in cut(run, words(3, 200)[: 40 * LENGTH])[0]]
    windows = windows_of(torch.cat([w.tokens for w in windows]).numpy(), LENGTH, 4)
    plain, led = (
        pool(score_texts(run, [Text("a", windows)], ScoringConfig(samples=8, pilot=led)), 8) for led in (False, True)
    )
    assert plain.nats != led.nats
    assert plain.nats == pytest.approx(led.nats, abs=5 * math.hypot(plain.monte_carlo_stderr, led.monte_carlo_stderr))


def test_best_times_are_a_grid(run: Run) -> None:
    times = best_times(run, cut(run, words(9, 60)[: 8 * LENGTH])[0], 4)
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert list(times) == sorted(times)
    assert len(times) == 5


def test_compiled_scores_are_those_of_plain_ones(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whole batches of whole windows run compiled: other shapes would each cost half a minute."""
    compiled: list[int] = []
    stances: list[str] = []
    monkeypatch.setattr("catmaps.scoring.compile_blocks", lambda network: compiled.append(1))
    set_stance = torch.compiler.set_stance

    def noted(stance: str) -> object:
        stances.append(stance)
        return set_stance(stance)

    monkeypatch.setattr(torch.compiler, "set_stance", noted)
    windows = [Window(row) for row in torch.cat([*cut(run, words(8, 60)[: 5 * LENGTH])[:1]])]
    windows.append(Window(windows[0].tokens[:5]))
    lean = bound_windows(run, windows, ScoringConfig(samples=2, batch=2, compile=True))
    assert compiled == [1]
    assert stances == ["force_eager"] * 2  # the fifth whole window, and the short one
    plain = bound_windows(run, windows, ScoringConfig(samples=2, batch=2))
    assert [bound.nats.item() for bound in lean] == [bound.nats.item() for bound in plain]


def test_a_linear_network_is_scored_by_what_it_sees() -> None:
    from small_network import fresh

    assert seen_directions(fresh(input="linear", skip=False)) is None  # width 16 > V = 7: it sees everything
    assert seen_directions(fresh(width=4, input="linear")) is None  # the skip sees the rest
    assert seen_directions(fresh(width=4)) is None
    network = fresh(width=4, input="linear", skip=False)
    basis = seen_directions(network)
    assert basis is not None
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64))
    table = network.embedding.table.weight.detach().double()
    torch.testing.assert_close(table @ basis @ basis.mT, table)


def test_training_validates_a_linear_network_by_what_it_sees() -> None:
    from small_network import fresh

    from catmaps.flow.flow_map import FlowMap
    from catmaps.flow.times import uniform
    from catmaps.training.objectives import objective_of

    network, tokens = fresh(width=4, input="linear", skip=False), torch.arange(30).view(6, 5) % 7
    seeded = {"num_samples": 8, "generator": torch.Generator().manual_seed(1)}
    found = objective_of(Config(), network, None).bound(network, uniform(), seeded["generator"])(tokens).nats
    for integrand, equal in ((integrand_of(network), True), (squared_error, False)):
        seeded["generator"].manual_seed(1)
        nats = nelbo(FlowMap(network), tokens, uniform(), **seeded, integrand=integrand).nats
        assert torch.equal(found, nats) is equal
        assert bool((found <= nats).all())


def test_spread_is_that_about_the_common_rate() -> None:
    tokens = torch.tensor([10.0, 20.0, 30.0])
    assert ratio_stderr(2.5 * tokens, tokens) == pytest.approx(0.0, abs=1e-9)
    equal = torch.tensor([1.0, 2.0, 4.0, 7.0])
    assert ratio_stderr(equal, torch.full((4,), 5.0)) == pytest.approx(equal.std().item() * 2)
    assert math.isnan(ratio_stderr(equal[:1], tokens[:1]))


def test_texts_and_windows_have_their_own_spread() -> None:
    """Two texts of two like windows each: the windows of a text are no independent sample."""
    one, five = torch.ones(2, dtype=torch.float64), torch.full((2,), 5.0, dtype=torch.float64)
    scores = [
        TextScore("", nats, 0 * nats, 10 * one, torch.zeros(20).long(), nats.repeat_interleave(10) / 10, 20, 20, False)
        for nats in (one, five)
    ]
    total = pool(scores, 4)
    assert total.windows_stderr == pytest.approx(math.sqrt(4 / 3 * 16))
    assert total.texts_stderr == pytest.approx(math.sqrt(2 * 32))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"samples": 1}, "--samples must be at least 2, not 1"),
        ({"bound": "finite-step"}, "--steps N belongs to --bound finite-step"),
        ({"steps": 4}, "--steps N belongs to --bound finite-step"),
        ({"bound": "finite-step", "steps": 0}, "--steps must be at least 1"),
        ({"t_max": 1.0}, "--t-max inside"),
    ],
)
def test_mistaken_configs_are_refused(mistake: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScoringConfig(**mistake)
