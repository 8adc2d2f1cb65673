import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Integer
from oracle_runs import OracleRun, stationary_chain
from rich.console import Console

from catmaps.errors import UserError
from catmaps.evaluation.collect import apart
from catmaps.evaluation.judge import BLOCK, LETTERS, Judge, JudgeConfig, encode_symbols
from catmaps.evaluation.ngram import NGramModel
from catmaps.evaluation.quality import (
    HELDOUT,
    Bars,
    Quality,
    control_rows,
    draw_chunks,
    evenly,
    heldout_quality,
    join_texts,
    quality,
    quality_table,
    to_json,
    verdict,
)
from catmaps.text import metrics
from catmaps.text.alphabets import ByteTokenizer, Text8Tokenizer

SYLLABLES = ("ka", "to", "ri", "mo", "na", "shi", "lu", "ve")


class PairIds:
    """Ids of consecutive character pairs."""

    def encode(self, text: str) -> Integer[np.ndarray, "l"]:
        return np.array([ord(a) * 256 + ord(b) for a, b in zip(text[::2], text[1::2], strict=False)], dtype=np.int64)


class LetterIds:
    def encode(self, text: str) -> Integer[np.ndarray, "l"]:
        return np.array([ord(a) for a in text], dtype=np.int64)


def language(chars: int, seed: int) -> str:
    """A language whose words are made of a few syllables, some words far more frequent than others."""
    lexicon_rng, rng = np.random.default_rng(99), np.random.default_rng(seed)
    words = ["".join(lexicon_rng.choice(SYLLABLES, size=lexicon_rng.integers(1, 4))) for _ in range(300)]
    frequency = 1 / np.arange(1, 301)
    drawn = rng.choice(words, size=chars // 3, p=frequency / frequency.sum())
    return " ".join(drawn.tolist())[:chars]


@pytest.fixture(scope="module")
def judge() -> Judge:
    train = [language(120_000, seed) for seed in range(2)]
    return Judge.build(train, [language(90_000, 7), language(40_000, 8)], PairIds())


def test_controls_in_bytes_are_as_long_as_asked_in_characters() -> None:
    train = [language(60_000, 3).replace("shi", "ší").replace("ka", "ké")]
    of_bytes = Judge.build(train, [language(30_000, 4)], LetterIds(), JudgeConfig(alphabet=None, min_chars=200))
    rows = control_rows(of_bytes, 64, 40, np.random.default_rng(0), num_texts=4)
    assert {row.text_chars for row in rows.values()} == {200}
    assert {row.num_chars for row in rows.values()} == {64 * 40}


def test_join_texts_reaches_the_length_and_drops_the_rest() -> None:
    assert join_texts(["abc", "de", "fgh", "i"], 6) == ["abc de"]
    assert join_texts(["abc", "de", "fgh", "ij"], 6) == ["abc de", "fgh ij"]
    assert join_texts(["abcdefg", "hijklm"], 6) == ["abcdefg", "hijklm"]
    with pytest.raises(UserError, match="1,024"):
        join_texts(["abc"], 1024)


def test_chunks_of_one_pass_do_not_overlap() -> None:
    text = "".join(chr(200 + i) for i in range(100))
    chunks = draw_chunks(text, 7, 13, np.random.default_rng(0))
    assert all(len(chunk) == 7 and chunk in text for chunk in chunks)
    assert len(set("".join(chunks))) == 91
    assert len(draw_chunks(text, 7, 50, np.random.default_rng(0))) == 50
    assert draw_chunks(text, 100, 2, np.random.default_rng(0)) == [text, text]
    with pytest.raises(UserError):
        draw_chunks(text, 101, 1, np.random.default_rng(0))


def test_real_text_is_better_than_the_controls_where_it_should_be(judge: Judge) -> None:
    rows = control_rows(judge, 256, 240, np.random.default_rng(0))
    assert list(rows) == ["i.i.d. letters", "trigram chain", "order-5 Markov chain", HELDOUT]
    iid, trigram, chain, real = rows.values()
    assert iid.forward_bits > trigram.forward_bits > real.forward_bits
    assert iid.reverse_bits > trigram.reverse_bits > real.reverse_bits
    assert iid.valid_word_rate < trigram.valid_word_rate < chain.valid_word_rate <= real.valid_word_rate
    assert chain.forward_bits == pytest.approx(real.forward_bits, rel=0.05)
    assert iid.token_entropy > real.token_entropy
    assert iid.letter_entropy_pooled == pytest.approx(real.letter_entropy_pooled, rel=0.02)


def test_reverse_bits_catch_a_model_that_repeats_one_good_sample(judge: Judge) -> None:
    real = heldout_quality(judge, 1024, 40, np.random.default_rng(1))
    same = quality(draw_chunks(judge.drawn, 1024, 1, np.random.default_rng(1)) * 40, judge)
    assert same.forward_bits == pytest.approx(real.forward_bits, rel=0.1)
    assert same.reverse_bits > 1.2 * real.reverse_bits
    assert same.zlib_ratio < 0.5 * real.zlib_ratio


def test_token_entropy_and_distinct_2_catch_a_text_that_repeats_itself(judge: Judge) -> None:
    real = heldout_quality(judge, 1024, 20, np.random.default_rng(2))
    sample = judge.drawn[:32] * 32
    stuck = quality([sample] * 20, judge)
    assert stuck.token_entropy < 0.9 * real.token_entropy
    assert stuck.distinct_2 < 0.2


def test_diversity_is_that_of_the_long_texts_if_they_are_given(judge: Judge) -> None:
    samples = draw_chunks(judge.drawn, 300, 24, np.random.default_rng(3))
    texts = draw_chunks(judge.drawn, 1100, 5, np.random.default_rng(4))
    row, joined = quality(samples, judge, texts), quality(samples, judge)
    assert (row.forward_bits, row.reverse_bits) == (joined.forward_bits, joined.reverse_bits)
    assert row.token_entropy == metrics.mean_token_entropy(texts, PairIds()).mean
    assert (row.num_texts, row.text_chars) == (5, 1100)
    with pytest.raises(UserError, match="1,024"):
        quality(samples, judge, [*texts, "short"])


def test_joined_strangers_hide_what_a_markov_chain_lacks(judge: Judge) -> None:
    joined = control_rows(judge, 128, 480, np.random.default_rng(5))
    whole = control_rows(judge, 128, 480, np.random.default_rng(5), num_texts=60)
    for rows in (joined, whole):
        assert rows[HELDOUT].num_texts >= 50
    chain = "order-5 Markov chain"
    gap = whole[chain].distinct_2 / whole[HELDOUT].distinct_2
    assert gap > joined[chain].distinct_2 / joined[HELDOUT].distinct_2


def test_figures_are_those_of_their_definitions(judge: Judge) -> None:
    samples = draw_chunks(judge.drawn, 300, 24, np.random.default_rng(3))
    row = quality(samples, judge)
    texts = join_texts(samples, 1024)
    symbols = [encode_symbols(sample, LETTERS) for sample in samples]
    assert row.forward_bits == judge.forward.bits_per_char(symbols).mean
    reverse = NGramModel.fit(symbols, 4, 27)
    assert row.reverse_bits == reverse.bits_per_char([encode_symbols(t, LETTERS) for t in judge.scored]).mean
    assert row.token_entropy == metrics.mean_token_entropy(texts, PairIds()).mean
    assert row.letter_entropy == metrics.mean_letter_entropy(texts).mean
    assert (row.num_samples, row.num_chars, row.num_texts) == (24, 7200, 6)
    assert row.text_chars == 4 * 300 + 3


def test_reverse_model_is_fitted_to_at_most_so_many_characters(judge: Judge) -> None:
    samples = draw_chunks(judge.drawn, 300, 40, np.random.default_rng(4))
    short = replace(judge, config=replace(judge.config, reverse_chars=5000))
    row = quality(samples, short)
    assert row.reverse_chars == 5000
    cut = [*samples[:16], samples[16][:200]]
    assert row.reverse_bits == quality(cut, judge).reverse_bits
    assert quality(samples, judge).reverse_chars == 12_000


def test_rows_of_unequal_amounts_compare_once_they_are_measured_evenly(judge: Judge) -> None:
    many = draw_chunks(judge.drawn, 300, 40, np.random.default_rng(4))
    few = draw_chunks(judge.drawn, 280, 40, np.random.default_rng(5))
    reference = quality(many, judge)
    with pytest.raises(UserError, match="do not compare"):
        verdict(quality(few, judge), reference, reference)
    even = evenly(judge, (many, few))
    verdict(quality(few, even), quality(many, even), reference)
    assert quality(few, even).reverse_bits == quality(few, judge).reverse_bits
    assert quality(many, even).reverse_chars == 11_200
    assert evenly(judge, (many, few), 9000).config.reverse_chars == 9000
    assert evenly(judge, ()).config == judge.config


def test_rows_measured_one_by_one_are_of_so_many_characters_as_each_of_them_has(judge: Judge) -> None:
    pieces = OracleRun(stationary_chain(), 256, ByteTokenizer())
    assert apart(pieces, judge, 40).config.reverse_chars == 0.75 * 40 * 256
    letters = OracleRun(stationary_chain(), 256, Text8Tokenizer())
    assert apart(letters, judge, 40) is judge


def test_scored_and_drawn_text_are_apart(judge: Judge) -> None:
    heldout = " ".join([language(90_000, 7), language(40_000, 8)])
    assert sum(map(len, judge.scored)) + len(judge.drawn.replace(" ", "")) < len(heldout)
    assert all(block in heldout for block in judge.scored)
    assert judge.scored[0] == heldout[:BLOCK]
    assert heldout[BLOCK : 2 * BLOCK] in judge.drawn
    assert len(judge.scored) == math.ceil(math.ceil(len(heldout) / BLOCK) / 4)


def test_a_saved_judge_judges_the_same(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge")
    again = Judge.load(tmp_path / "judge", PairIds())
    samples = draw_chunks(judge.drawn, 512, 20, np.random.default_rng(5))
    assert quality(samples, again) == quality(samples, judge)
    with pytest.raises(UserError, match="another retokeniser"):
        Judge.load(tmp_path / "judge", LetterIds())
    with pytest.raises(UserError, match="build the judge"):
        Judge.load(tmp_path / "nothing", PairIds())


def test_bytes_are_an_alphabet_too(tmp_path: Path) -> None:
    text = "Größe, naïve café! " * 2000
    config = JudgeConfig(alphabet=None, forward_order=3)
    judge = Judge.build([text], [text], LetterIds(), config)
    judge.save(tmp_path)
    rows = control_rows(Judge.load(tmp_path, LetterIds()), 1100, 3, np.random.default_rng(0))
    assert list(rows) == ["i.i.d. letters", "trigram chain", HELDOUT]  # order 3 holds no chain of context 5
    assert rows[HELDOUT].forward_bits < 0.5
    assert rows[HELDOUT].num_chars == 3300


def test_characters_outside_the_alphabet_are_named(judge: Judge) -> None:
    assert encode_symbols("ab z", LETTERS).tolist() == [1, 2, 0, 26]
    with pytest.raises(UserError, match="'A'"):
        quality(["A" * 2000], judge)
    with pytest.raises(UserError, match="é"):
        encode_symbols("é", LETTERS)


def some_quality(**changes: float) -> Quality:
    values: dict[str, float] = dict.fromkeys(Quality.__dataclass_fields__, 1.0)
    values |= {"reverse_chars": 1000, "num_samples": 10, "num_chars": 1000, "num_texts": 5}
    return Quality(**(values | changes))  # pyright: ignore[reportArgumentType]


def test_verdict_applies_each_bar_alone() -> None:
    base, reference = (
        some_quality(forward_bits=2.0, reverse_bits=3.0),
        some_quality(token_entropy=5.0, distinct_2=0.8),
    )
    good = some_quality(forward_bits=2.1, reverse_bits=3.0, token_entropy=5.1, distinct_2=0.79)
    bars = Bars(forward=1.1, reverse=1.0, diversity=0.03)
    result = verdict(good, base, reference, bars)
    assert result.passed
    assert result.forward_ratio == pytest.approx(1.05)
    assert result.token_entropy_ratio == pytest.approx(1.02)
    assert not verdict(replace(good, forward_bits=2.3), base, reference, bars).forward_ok
    assert not verdict(replace(good, reverse_bits=3.1), base, reference, bars).reverse_ok
    for entropy in (4.8, 5.2):  # too little and too much
        bad = verdict(replace(good, token_entropy=entropy), base, reference, bars)
        assert not bad.token_entropy_ok
        assert not bad.passed
    assert not verdict(replace(good, distinct_2=0.9), base, reference, bars).distinct_2_ok
    with pytest.raises(UserError, match="do not compare"):
        verdict(replace(good, reverse_chars=900), base, reference, bars)


def shown(rows: dict[str, Quality], reference: Quality | None) -> Sequence[str]:
    console = Console(width=240, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(quality_table(rows, reference))
    return capture.get().splitlines()


def test_table_and_json() -> None:
    rows = {
        "map, 4 calls": some_quality(token_entropy=1.1),
        "base [64]": some_quality(forward_stderr=math.nan),
    }
    lines = "\n".join(shown(rows, some_quality()))
    assert "map, 4 calls" in lines
    assert "base [64]" in lines  # a name is not markup
    assert "1.100 (+10.0%)" in lines
    assert "reference" in lines
    assert "reference" not in "\n".join(shown(rows, None))
    record = json.loads(to_json(rows))
    assert record["map, 4 calls"]["token_entropy"] == 1.1
    assert record["base [64]"]["forward_stderr"] is None
