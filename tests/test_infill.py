"""Texts with blanks and texts to go on with: reading them, keeping what is given, and the law of what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from oracle import total_variation
from oracle_runs import K, Letters, OracleRun, stationary_chain
from tiny_runs import tiny

from catmaps.cli import main
from catmaps.errors import UserError
from catmaps.flow import times
from catmaps.generation import SamplingConfig, default_sampling, draw
from catmaps.infill import Template, cut, encode, fill, go_on
from catmaps.model import Run, load_run, network_of
from catmaps.text.tokenizers import ByteTokenizer, Text8Tokenizer, train_bpe

CONFIG = SamplingConfig(steps=2, batch=4, seed=5)
Baseline = Literal["autoregressive", "masked", "uniform"]


@pytest.fixture(scope="module")
def map_(map_run: Path) -> Run:
    return load_run(map_run)


def baseline(family: Baseline, shards: Path) -> Run:
    """An untrained one."""
    config = replace(tiny(shards), family=family)
    network = network_of(config, torch.full((27,), 1 / 27).log()).eval().requires_grad_(False)
    return Run(Path(family), config, network, Text8Tokenizer(), times.uniform())


# ---- reading


def test_what_stands_between_blanks_is_given() -> None:
    template = Template.read("[[2]]the [[3]] of[[1]]", Text8Tokenizer())
    assert template.known.tolist() == [False] * 2 + [True] * 4 + [False] * 3 + [True] * 3 + [False]
    kept = Text8Tokenizer().decode(template.tokens[template.known])
    assert kept == "the  of"  # a blank keeps the spaces beside it


@pytest.mark.parametrize("tokenizer", [Text8Tokenizer(), ByteTokenizer(), train_bpe(["the cat sat on a mat"] * 9, 270)])
def test_every_alphabet_takes_the_same_mark(tokenizer: Any) -> None:
    template = Template.read("the [[5]] sat [[ 3 ]]" if tokenizer.name == "bytes" else "the [[5]] sat", tokenizer)
    assert (~template.known).sum() == 5
    pieces = ["the ", " sat [[ 3 ]]" if tokenizer.name == "bytes" else " sat"]
    expected = np.concatenate([tokenizer.encode(piece) for piece in pieces])
    assert np.array_equal(template.tokens[template.known], expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the cat", r"no blank in 'the cat': mark one with \[\[N\]\]"),
        ("the [[]] cat", "no blank"),
        ("the [[0]] cat", "needs N >= 1"),
        ("the [[3]] \u732b", "'\u732b' is outside the alphabet of text8"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Template.read(text, Text8Tokenizer())


def test_marks_and_capitals_are_folded_as_in_training() -> None:
    assert Text8Tokenizer().decode(encode("Caf\u00e9, 2!", Text8Tokenizer())) == "cafe two "
    assert encode("\u732b", ByteTokenizer()).tolist() == list("\u732b".encode())


# ---- filling


@pytest.mark.parametrize("text", ["the [[9]]", "[[9]] sat", "on [[5]] mat", "[[2]]a[[3]]b[[4]]c", "[[16]]"])
@pytest.mark.parametrize("sampler", ["renoise", "localisation", "heun"])
def test_given_tokens_never_change(text: str, sampler: str, map_: Run) -> None:
    template = Template.read(text, map_.tokenizer)
    config = replace(CONFIG, sampler=sampler)
    batches = list(fill(map_, template, 6, config))
    assert [len(batch) for batch in batches] == [4, 2]
    texts = torch.cat(batches).numpy()
    assert texts.shape == (6, len(template.tokens))
    assert bool((texts[:, template.known] == template.tokens[template.known]).all())
    assert len({tuple(row) for row in texts}) == 6
    again = torch.cat(list(fill(map_, template, 5, config))).numpy()
    assert np.array_equal(again, texts[:5])


def test_guided_and_cut_samplers_keep_them_too(map_: Run) -> None:
    template = Template.read("on [[5]] mat", map_.tokenizer)
    for changes in ({"guidance": 2.0}, {"top_p": 0.5}, {"guidance": 2.0, "weak": map_.flow_map, "top_p": 0.9}):
        (texts,) = fill(map_, template, 4, replace(CONFIG, **changes))
        assert bool((texts[:, template.known] == torch.from_numpy(template.tokens[template.known])).all())
    (plain,), (same,) = (
        fill(map_, template, 4, replace(CONFIG, **c)) for c in ({}, {"guidance": 3.0, "weak": map_.flow_map})
    )
    assert torch.equal(plain, same)  # away from oneself leads nowhere


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_baselines_fill_blanks(family: Baseline, shards: Path) -> None:
    run = baseline(family, shards)
    template = Template.read("on [[5]] mat", run.tokenizer)
    (texts,) = fill(run, template, 4, default_sampling(run, 3))
    assert bool((texts[:, template.known] == torch.from_numpy(template.tokens[template.known])).all())
    with pytest.raises(UserError, match="top-p and guidance are for flows"):
        next(fill(run, template, 1, replace(default_sampling(run, 3), top_p=0.5)))


def test_an_autoregressive_baseline_fills_ends_only(shards: Path) -> None:
    run = baseline("autoregressive", shards)
    (texts,) = fill(run, Template.read("on [[5]]", run.tokenizer), 2, default_sampling(run))
    assert texts.shape == (2, 8)
    with pytest.raises(UserError, match="leave blanks at the end only"):
        next(fill(run, Template.read("on [[5]] mat", run.tokenizer), 2, default_sampling(run)))


def test_what_cannot_be_filled_is_refused(map_: Run) -> None:
    with pytest.raises(UserError, match=r"has 17 tokens, blanks included; the window of .* holds 16"):
        next(fill(map_, Template.read("[[17]]", map_.tokenizer), 1, CONFIG))
    with pytest.raises(UserError, match="every token is given"):
        next(fill(map_, Template(np.array([1, 2]), np.array([True, True])), 1, CONFIG))
    with pytest.raises(UserError, match="sampler ancestral is not for it"):
        next(fill(map_, Template.read("[[3]]", map_.tokenizer), 1, replace(CONFIG, sampler="ancestral")))


@pytest.mark.parametrize("text", ["ab[[2]]", "b[[2]]d", "[[1]]b[[1]]d"])
def test_blanks_have_their_exact_conditional_law(text: str) -> None:
    """Of an exact chain of K letters, on 25 fillings: total variation below 0.03, of which noise 0.02."""
    chain = stationary_chain()
    template = Template.read(text, Letters())
    run, n = OracleRun(chain, 8, Letters()), 10000
    config = SamplingConfig(steps=16, sampler="localisation", batch=n)
    (texts,) = fill(run, template, n, config)
    blanks = ~torch.from_numpy(template.known)
    length = len(template.tokens)
    table = torch.zeros(K, K, dtype=torch.float64)
    for a in range(K):
        for b in range(K):
            filled = torch.from_numpy(template.tokens).clone()
            filled[blanks] = torch.tensor([a, b])
            p = chain.initial[filled[0]]
            for i in range(1, length):
                p = p * chain.transition[filled[i - 1], filled[i]]
            table[a, b] = p
    assert total_variation(texts[:, blanks], table / table.sum()) < 0.03
    assert total_variation(texts[:, blanks], torch.full((K, K), 1 / K**2)) > 0.1


# ---- going on


def test_continuations_are_cut_where_they_are_told_to_stop() -> None:
    letters = Letters(ends=True)
    ids = letters.encode("abcabd").astype(np.int64)
    assert cut(ids, letters, ()) == "abcabd"
    assert cut(ids, letters, ("bd", "ca")) == "ab"
    assert cut(ids, letters, ("dd", "")) == "abcabd"
    assert cut(np.insert(ids, 3, 4), letters, ("bd",)) == "abc"  # the document ends


def test_a_prompt_is_gone_on_from(map_: Run) -> None:
    texts = list(go_on(map_, "the cat ", 20, 6, CONFIG))
    assert [len(text) for text in texts] == [20] * 6
    assert len(set(texts)) == 6
    assert list(go_on(map_, "the cat ", 20, 6, CONFIG)) == texts
    stops = (texts[0][7], texts[0][3])
    short = list(go_on(map_, "the cat ", 20, 6, CONFIG, stops=stops))
    assert len(short[0]) <= 3
    assert all(text.startswith(cut_) and not set(cut_) & set(stops) for text, cut_ in zip(texts, short, strict=True))


def test_a_draw_without_blanks_is_a_sample(map_: Run) -> None:
    first = draw(map_, (4, 16), None, None, CONFIG, map_.generator(1), None)
    second = draw(map_, (4, 16), None, None, replace(CONFIG, guidance=2.0), map_.generator(1), None)
    assert torch.equal(first, second)  # nothing given, nothing to be guided by


# ---- the command


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["sample", *(str(arg) for arg in args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_fills_and_goes_on(capsys: pytest.CaptureFixture[str], map_run: Path) -> None:
    said = answer(capsys, map_run, "--infill", "The [[4]] sat", "--num", 3)
    assert all(text.startswith("the ") and text.endswith(" sat") and len(text) == 12 for text in said["texts"])
    assert said["infill"] == "The [[4]] sat"
    said = answer(capsys, map_run, "--prompt", "a cat ", "--tokens", 9, "--num", 3, "--top-p", 0.8, "--guidance", 2)
    assert [len(text) for text in said["texts"]] == [9] * 3
    assert said["network_calls"] == 8
    said = answer(capsys, map_run, "--prompt", "a cat ", "--stop", " ", "--num", 3)
    assert not any(" " in text for text in said["texts"])
    said = answer(capsys, map_run, "--weak", map_run, "--guidance", 3, "--num", 2)
    assert said["weak"] == str(map_run)
    assert main(["sample", str(map_run), "--prompt", "a cat ", "--num", "1"]) == 0
    assert capsys.readouterr().out.startswith("[1] a cat ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--infill", "[[2]]"], "--prompt or --infill, not both"),
        (["--tokens", "3"], "--tokens and --stop are for --prompt"),
        (["--stop", "a"], "--tokens and --stop are for --prompt"),
        (["--prompt", "a", "--tokens", "0"], "--tokens must be at least 1"),
        (["--prompt", "a", "--length", "9"], "--length and --show-trajectory are for texts without"),
        (["--infill", "[[2]]", "--show-trajectory"], "--length and --show-trajectory are for texts without"),
        (["--guidance", "2"], "needs something to lead away from"),
        (["--weak", "RUN"], "--weak is for --guidance above 1"),
        (["--top-p", "0"], "top-p is a share of the mass"),
        (["--infill", "a cat"], "no blank"),
        (["--infill", "[[17]]"], "the window of"),
        (["--prompt", "\u732b"], "outside the alphabet"),
    ],
)
def test_mistakes_cost_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], map_run: Path
) -> None:
    capsys.readouterr()
    assert main(["sample", str(map_run), *(str(map_run) if word == "RUN" else word for word in words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1
