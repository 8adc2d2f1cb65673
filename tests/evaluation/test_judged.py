"""Figures of a judge by hand, and what betrays texts that they flatter."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_judges import TEXT, make_judge

from catmaps.errors import UserError
from catmaps.evaluation.causal_judge import CausalJudge, Scores, load_causal_judge
from catmaps.evaluation.judge import LETTERS, encode_symbols
from catmaps.evaluation.judged import figures, flattered, judge_texts
from catmaps.evaluation.ngram import NGramModel, markov_text
from catmaps.text.metrics import Diversity, Mean, diversity

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> CausalJudge:
    return load_causal_judge(str(make_judge(tmp_path_factory.mktemp("judge") / "gpt2")))


def test_figures_by_hand(judge: CausalJudge) -> None:
    nats, tokens = np.log(2) * np.array([8.0, 4.0, 0.0]), np.array([4, 4, 0])
    scores = Scores(nats, tokens, np.array([4, 2, 0]), np.array([8, 2, 0]), None)
    result = figures(["a b c", "b c", ""], scores, judge)
    assert (result.num_texts, result.num_tokens, result.num_chars) == (3, 8, 6)
    assert result.bits_per_char == pytest.approx(2.0)
    assert result.bits_per_char_stderr == pytest.approx(0.0)
    assert result.bits_per_byte == pytest.approx(1.2)
    assert result.gen_ppl == pytest.approx(2**1.5)
    assert result.gen_ppl_median == pytest.approx(math.exp((nats[0] + nats[1]) / 8))
    spread = math.log(2) * math.sqrt(2 * (2.0**2 + 2.0**2)) / 8  # of nats per token: residuals of 8 and 4 bits from 6
    assert result.gen_ppl_stderr == pytest.approx(2**1.5 * spread)
    assert result.judge == judge.id
    assert result.as_dict()["distinct_2_stderr"] == 0.0
    with pytest.raises(UserError, match="nothing to judge"):
        figures(["a"], judge.score(["a"]), judge)
    with pytest.raises(UserError, match="no texts"):
        judge_texts([], judge)


def test_gen_ppl_is_a_direct_computation(judge: CausalJudge) -> None:
    texts = [TEXT[:40], TEXT[11:50], "zq vv kk"]
    nats = tokens = 0.0
    for text in texts:
        ids = judge.encode(text).tolist()
        with torch.no_grad():
            logits = judge.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
    result = judge_texts(texts, judge)
    assert result.gen_ppl == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.bits_per_char == pytest.approx(nats / math.log(2) / result.num_chars, rel=1e-5)
    assert judge_texts(texts * 2, judge).gen_ppl == pytest.approx(result.gen_ppl, rel=1e-5)


def test_no_figure_is_shown_without_its_guards(judge: CausalJudge) -> None:
    shown = str(judge_texts([TEXT, TEXT[5:]], judge))
    for word in ("bits/char", "gen-PPL", "token entropy", "repeated words", "distinct-2", "compression"):
        assert word in shown


def row(**changes: float) -> Diversity:
    values = {"token_entropy": 5.0, "distinct_1": 0.8, "distinct_2": 0.9, "distinct_3": 1.0, "compression_ratio": 0.5}
    values |= {"repetition_rate": 0.2} | changes
    return Diversity(**{name: Mean(value, 0.001) for name, value in values.items()})


def test_what_counts_as_flattered() -> None:
    assert flattered(row(), row()) == ()
    assert flattered(row(token_entropy=4.9, repetition_rate=0.24), row()) == ()
    assert flattered(row(token_entropy=5.5, repetition_rate=0.1, distinct_2=1.0), row()) == ()
    assert flattered(row(token_entropy=4.7), row()) == ("token entropy 4.700 against 5.000",)
    assert flattered(row(repetition_rate=0.3), row()) == ("repeated words 30.0% against 20.0%",)
    assert flattered(row(compression_ratio=0.4), row()) == ("compression ratio 0.400 against 0.500",)
    unsure = row()._replace(token_entropy=Mean(4.7, 0.2))
    assert flattered(unsure, row()) == ()
    assert len(flattered(row(token_entropy=4.7)._replace(token_entropy=Mean(4.7, math.nan)), row())) == 1


class WordIds:
    def encode(self, text: str) -> np.ndarray:
        return np.unique(text.split(), return_inverse=True)[1]


def test_the_ngram_judge_ranks_what_it_can_and_the_guards_catch_the_rest() -> None:
    """Real text, Markov chains of rising order and noise in this order; repetition wins, and is caught."""
    rng = np.random.default_rng(0)
    lexicon = ["".join(rng.choice(list(LETTERS[1:]), rng.integers(2, 8))) for _ in range(400)]
    chance = 1 / np.arange(1, 401)

    def text(words: int) -> str:
        return " ".join(rng.choice(lexicon, words, p=chance / chance.sum()).tolist())

    model = NGramModel.fit([encode_symbols(text(20_000), LETTERS)], 4, 27)
    sets = {"real": [text(200)[:600] for _ in range(12)]}
    for context in (2, 1, 0):
        chain = markov_text(model, context, (12, 600), rng)
        sets[f"chain of context {context}"] = ["".join(LETTERS[i] for i in row) for row in chain]
    sets["noise"] = ["".join(rng.choice(list(LETTERS), 600)) for _ in range(12)]
    bits = {name: model.bits_per_char([encode_symbols(t, LETTERS) for t in texts]) for name, texts in sets.items()}
    ranked = sorted(bits, key=lambda name: bits[name].mean)
    assert ranked == list(sets)
    for better, worse in pairwise(ranked):
        assert bits[worse].mean - bits[better].mean > 3 * math.hypot(bits[worse].stderr, bits[better].stderr)
    real = diversity(sets["real"], WordIds())
    for name in ranked[:-1]:  # noise has few spaces, so few words to be different
        assert flattered(diversity(sets[name], WordIds()), real) == (), name
    phrases = [" ".join(one.split()[i : i + 6]) + " " for one in sets["real"] for i in range(60)]
    costs = [model.bits_per_char([encode_symbols(phrase, LETTERS)]).mean for phrase in phrases]
    repeated = [(phrases[i] * 50)[:600] for i in np.argsort(costs)[:12]]
    assert model.bits_per_char([encode_symbols(t, LETTERS) for t in repeated]).mean < bits["real"].mean
    reasons = " ".join(flattered(diversity(repeated, WordIds()), real))
    assert "token entropy" in reasons
    assert "repeated words" in reasons
    assert "compression ratio" in reasons


def test_a_causal_judge_prefers_repetition_and_the_guards_say_so(judge: CausalJudge) -> None:
    """Of many short texts the one that this random model finds likeliest, said again and again, beats them all."""
    texts = [TEXT[i : i + 24] for i in range(40)]
    per_char = judge.score(texts)
    best = texts[int(np.argmin(per_char.nats / per_char.chars))]
    stuck = judge_texts([best * 3] * 4, replace(judge, context=8, stride=4))
    whole = judge_texts([TEXT] * 4, replace(judge, context=8, stride=4))
    assert stuck.bits_per_char < whole.bits_per_char
    assert flattered(stuck.diversity, whole.diversity)
