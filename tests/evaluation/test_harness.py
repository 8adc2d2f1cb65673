"""`CatmapsLM` on exact models: what lm-eval is told is the likelihood, whatever the order, the batches, the lengths."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import MarkovChain
from oracle_runs import AnyLength, Ask, K, Letters, OracleRun, stationary_chain
from tiny_runs import LENGTH, words

from catmaps.baselines.families import FAMILIES
from catmaps.errors import UserError
from catmaps.evaluation import conditional, writing
from catmaps.evaluation.encoding import Encoder
from catmaps.evaluation.harness import Harness
from catmaps.model import Run, build_baseline, load_run
from catmaps.text.tokenizers import ByteTokenizer, Text8Tokenizer, train_bpe


@pytest.fixture(scope="module")
def chain() -> AnyLength:
    return stationary_chain()


def make(chain: AnyLength, *, length: int = 12, ends: bool = False, **options: Any) -> Harness:
    return Harness(OracleRun(chain, length, Letters(ends)), **options)


def exact(chain: AnyLength, prompt: str, text: str, letters: str = "abcde") -> float:
    """log p(text | prompt)."""
    ids = torch.tensor([[letters.index(letter) for letter in prompt + text]])
    known = torch.arange(ids.shape[1])[None] < len(prompt)
    return MarkovChain(chain.initial, chain.transition, ids.shape[1]).log_prob(ids, known).item()


def ask(context: str, *continuations: str, doc: int | None = 0, task: str | None = "t") -> list[Ask]:
    return [Ask((context, continuation), doc, task) for continuation in continuations]


def scores(found: Sequence[tuple[float, bool]]) -> list[float]:
    return [value for value, _ in found]


def test_sums_of_nats_of_the_continuation_given_the_prompt(chain: AnyLength) -> None:
    """Not a mean, not with the prompt: within four of the standard errors that are on record."""
    lm = make(chain, samples=1024, first=1024)
    texts = [("ab", "cda"), ("ab", "ba"), ("ab", "eeab")]
    found = scores(lm.loglikelihood(ask("ab", *(text for _, text in texts))))
    record = lm.records[-1]
    assert [-value for value in found] == list(record.nats)
    assert (record.task, record.doc, record.tokens, record.samples, record.truncated) == ("t", 0, (3, 2, 4), 1024, 0)
    for value, error, (prompt, text) in zip(found, record.stderr, texts, strict=True):
        assert abs(value - exact(chain, prompt, text)) < 4 * error


def many(seed: int = 0, number: int = 5) -> list[Ask]:
    """Questions of two to four choices."""
    rng = np.random.default_rng(seed)

    def text(least: int, most: int) -> str:
        return "".join(rng.choice(list("abcde"), rng.integers(least, most)))

    return [
        request
        for doc in range(number)
        for request in ask(text(1, 5), *{text(1, 4) for _ in range(rng.integers(2, 5))}, doc=doc)
    ]


def test_order_and_batches_change_nothing(chain: AnyLength, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = many()
    one = make(chain, samples=8, first=4).loglikelihood(requests)
    shuffled = [int(i) for i in np.random.default_rng(1).permutation(len(requests))]
    other = make(chain, samples=8, first=4).loglikelihood([requests[i] for i in shuffled])
    assert other == [one[i] for i in shuffled]
    monkeypatch.setattr(conditional, "CPU_ELEMENTS", 10 * K)
    small = make(chain, samples=8, first=4).loglikelihood(requests)
    assert scores(small) == pytest.approx(scores(one), abs=1e-9)
    alone = [request for request in requests if request.doc_id == 3]
    few = make(chain, samples=8, first=4).loglikelihood(alone)
    assert scores(few) == pytest.approx([v for v, r in zip(scores(one), requests, strict=True) if r.doc_id == 3])


def test_the_same_request_twice_is_scored_once(chain: AnyLength) -> None:
    lm = make(chain, samples=8)
    found = lm.loglikelihood(ask("ab", "cd", "cd", "da"))
    assert found[0] == found[1] != found[2]
    assert len(lm.records[-1].nats) == 2


def test_requests_without_an_item_are_one_question_if_their_context_is(chain: AnyLength) -> None:
    lm = make(chain, samples=8)
    lm.loglikelihood(ask("ab", "cd", "da", doc=None, task=None) + ask("ba", "cd", doc=None, task=None))
    assert [len(record.nats) for record in lm.records] == [2, 1]


def test_contexts_of_one_question_may_differ(chain: AnyLength) -> None:
    """As in winogrande, where the choices stand in the context: their random numbers are the same nevertheless."""
    lm = make(chain, samples=512, first=512)
    found = lm.loglikelihood([Ask(("ab", "cd"), 0, "t"), Ask(("ae", "cd"), 0, "t")])
    assert len(lm.records) == 1
    for value, error, prompt in zip(scores(found), lm.records[0].stderr, ("ab", "ae"), strict=True):
        assert abs(value - exact(chain, prompt, "cd")) < 4 * error
    lm.loglikelihood([Ask(("ab", "cd"), 1, "t"), Ask(("", "cd"), 1, "t")])
    assert len(lm.records) == 3  # the unconditional score is a question of its own


def test_empty_contexts_and_continuations(chain: AnyLength) -> None:
    lm = make(chain, samples=512, first=512)
    (bare,), (none,), (nothing,) = (lm.loglikelihood(ask(*texts)) for texts in (("", "abc"), ("ab", ""), ("", "")))
    assert abs(bare[0] - exact(chain, "", "abc")) < 4 * lm.records[0].stderr[0]
    assert none == nothing == (0.0, True)
    ends = make(chain, ends=True, samples=512, first=512)
    (after,) = ends.loglikelihood(ask("", "abc"))
    assert abs(after[0] - exact(chain, "e", "abc")) < 4 * ends.records[0].stderr[0]
    (full,) = ends.loglikelihood(ask("", "abc" * 4))  # no room for the end of a document before it
    assert full[0] < 0
    assert ends.records[-1].truncated == 0


def test_what_does_not_fit_is_refused_before_anything_is_scored(chain: AnyLength) -> None:
    lm = make(chain)
    lm.scorer = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"piqa, question 7: prompt and answer have 14 tokens, the run reads 12; give"):
        lm.loglikelihood([*ask("ab", "cd"), *ask("abcde" * 2, "ab", "abcd", doc=7, task="piqa")])
    with pytest.raises(UserError, match=r"request, question 'ab': the answer alone has 15 tokens, the run reads 12"):
        lm.loglikelihood(ask("ab", "abcde" * 3, doc=None, task=None))
    assert lm.records == []


def test_truncation_drops_prompt_tokens_only_the_same_for_all_choices_and_is_counted(chain: AnyLength) -> None:
    lm = make(chain, samples=8, truncate="left")
    short = make(chain, samples=8)
    assert lm.loglikelihood(ask("abcdeabcde", "ab", "abcd")) == short.loglikelihood(ask("cdeabcde", "ab", "abcd"))
    assert lm.records[0].truncated == 2
    assert short.records[0].truncated == 0
    (whole,) = lm.loglikelihood(ask("ab", "abcde" * 2 + "ab"))
    assert whole[0] < -10
    with pytest.raises(UserError, match=r"the answer alone has 13 tokens.*leave this task out"):
        lm.loglikelihood(ask("ab", "abcde" * 2 + "abc"))
    with pytest.raises(UserError, match="can only be left"):
        make(chain, truncate="right")


def test_what_the_vocabulary_cannot_write_is_refused(chain: AnyLength) -> None:
    with pytest.raises(UserError, match=r"t, question 0: nothing of ' \?' can be written in the run's vocabulary"):
        make(chain).loglikelihood(ask("ab", "cd", " ?"))


def test_greedy_is_answered_for_single_continuations_only(chain: AnyLength) -> None:
    best = "abcde"[max(range(K), key=lambda k: exact(chain, "a", "abcde"[k]))]
    worst = "abcde"[min(range(K), key=lambda k: exact(chain, "a", "abcde"[k]))]
    lm = make(chain)
    assert [lm.loglikelihood(ask("a", letter))[0][1] for letter in (best, worst)] == [True, False]
    assert [greedy for _, greedy in lm.loglikelihood(ask("a", best, worst))] == [False, False]


def sampled(chain: AnyLength, length: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = MarkovChain(chain.initial, chain.transition, length).sample(1, generator)[0]
    return "".join("abcde"[i] for i in ids.tolist())


@pytest.mark.parametrize("ends", [False, True])
def test_rolling_reaches_the_known_likelihood_of_a_chain(ends: bool, chain: AnyLength) -> None:
    """A chain forgets all but one letter, so half a window of context is as good as all of it: no slack is left."""
    text = sampled(chain, 61).replace("e", "" if ends else "e")
    lm = make(chain, length=8, ends=ends, rolling_samples=128)
    (found,) = lm.loglikelihood_rolling([Ask((text,), 3, "roll")])
    record = lm.records[-1]
    assert (record.task, record.doc, record.tokens, record.samples) == ("roll", 3, (len(text),), 128)
    assert record.nats == (-found,)
    assert 0 < record.stderr[0] < 5
    assert abs(found - exact(chain, "e" if ends else "", text)) < 4 * record.stderr[0]


def test_rolling_of_nothing_and_of_many(chain: AnyLength) -> None:
    lm = make(chain, length=8)
    texts = [sampled(chain, 8), "", sampled(chain, 23, seed=1)]
    found = lm.loglikelihood_rolling([Ask((text,)) for text in texts])
    assert found[1] == 0
    again = make(chain, length=8).loglikelihood_rolling([Ask((text,)) for text in texts[::-1]])
    assert again == found[::-1]
    assert [record.tokens for record in lm.records] == [(8,), (0,), (23,)]


def test_windows_cover_the_text_once_and_are_full(chain: AnyLength) -> None:
    for ends in (False, True):
        for length in (1, 2, 7, 8):
            for number in (1, 7, 8, 9, 30):
                encoder = Encoder(Letters(ends), length)
                text = ("abcd" * 8)[:number]
                windows = list(encoder.windows(text))
                assert np.array_equal(np.concatenate([w.piece for w in windows]), encoder.encode(text))
                assert all(len(w.prompt) + len(w.piece) <= length for w in windows)
                start = encoder.start[: length - 1]
                whole, done = np.concatenate([start, encoder.encode(text)]), len(start)
                for i, window in enumerate(windows):
                    assert np.array_equal(window.prompt, whole[done - len(window.prompt) : done])
                    assert i == 0 or len(window.prompt) + len(window.piece) == length
                    assert i == 0 or len(window.prompt) >= length // 2
                    done += len(window.piece)
    assert list(Encoder(Letters(True), 8).windows("")) == []


def test_prompts_are_what_all_encodings_share() -> None:
    bpe = train_bpe(["the cat sat on the mat, the cat sat"] * 50, 300)
    for tokenizer in (bpe, ByteTokenizer(), Text8Tokenizer()):
        encoder = Encoder(tokenizer, 100)
        pairs = encoder.pairs("Answer: the ca", ["t sat", "p", "ts"], "q")
        for pair, text in zip(pairs, ["t sat", "p", "ts"], strict=True):
            assert np.array_equal(pair.prompt, pairs[0].prompt)
            whole = np.concatenate([pair.prompt, pair.continuation])
            assert np.array_equal(whole, tokenizer.encode("Answer: the ca" + text))
    (pair,) = Encoder(Text8Tokenizer(), 100).pairs("Answer:", [" yes"], "q")
    assert Text8Tokenizer().decode(pair.prompt) == "answer "  # one space, whichever side it came from
    assert Text8Tokenizer().decode(pair.continuation) == "yes"


def written(monkeypatch: pytest.MonkeyPatch, text: str) -> list[tuple[list[list[int]], int]]:
    """Makes a run write `text` over and over, from its beginning for every prompt; returns the calls."""
    calls: list[tuple[list[list[int]], int]] = []
    ids = (["abcde".index(letter) for letter in text] * 100)[:1000]
    starts: dict[tuple[int, ...], int] = {}

    def fake(run: Run, prompts: Sequence[np.ndarray], num_tokens: int, config: Any) -> list[np.ndarray]:
        calls.append(([prompt.tolist() for prompt in prompts], num_tokens))
        del run, config
        found = []
        for prompt in prompts:
            known = next((s for p, s in starts.items() if tuple(prompt[: len(p)].tolist()) == p), len(prompt))
            starts.setdefault(tuple(prompt.tolist()[:known]), known)
            found.append(np.array(ids[len(prompt) - known :][:num_tokens]))
        return found

    monkeypatch.setattr(writing, "continue_tokens", fake)
    return calls


def test_writing_stops_at_strings_ends_and_numbers(chain: AnyLength, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = written(monkeypatch, "abcda")
    lm = make(chain, length=8)
    options = [
        {"until": ["aabcda"]},
        {"until": "c", "max_gen_toks": 9},
        {"max_gen_toks": 6},
        {"until": ["zz"], "max_gen_toks": 1},
    ]
    requests = [Ask(("ab", option), i, "g") for i, option in enumerate(options)]
    assert lm.generate_until(requests) == ["abcd", "ab", "abcdaa", "a"]
    assert max(size for _, size in calls) == 4  # half a window
    assert len(calls) < 10  # nothing is written after a stop
    assert [record.doc for record in lm.records] == [0, 1, 2, 3]
    del calls[:]
    assert lm.generate_until(requests[::-1]) == ["a", "abcdaa", "ab", "abcd"]
    ends = make(chain, length=8, ends=True)
    written(monkeypatch, "abe")
    assert ends.generate_until([Ask(("", {"until": []}))]) == ["ab"]


def test_writing_refuses_what_it_cannot_do(chain: AnyLength) -> None:
    lm = make(chain, length=8)
    with pytest.raises(UserError, match="has no option top_k"):
        lm.generate_until([Ask(("ab", {"top_k": 3}))])
    with pytest.raises(UserError, match=r"prompt and answer have 12 tokens, the run reads 8; give --truncate left"):
        lm.generate_until([Ask(("abcdabcd", {"max_gen_toks": 20}))])


def test_writing_drops_and_counts_the_beginning_of_long_prompts(
    chain: AnyLength, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = written(monkeypatch, "a")
    lm = make(chain, length=8, truncate="left")
    assert lm.generate_until([Ask(("abcdabcd", {"max_gen_toks": 2}))]) == ["aa"]
    assert calls == [([[2, 3, 0, 1, 2, 3]], 2)]
    assert lm.records[-1].truncated == 1


def test_a_trained_run_writes_and_scores(base_run: Path) -> None:
    lm = Harness(base_run, samples=4, first=4, steps=2)
    text = lm.generate_until([Ask(("the cat ", {"until": [], "max_gen_toks": 20}))])[0]
    assert len(text) == 20
    assert text == lm.generate_until([Ask(("the cat ", {"until": [], "max_gen_toks": 20}))])[0]
    (found,) = lm.loglikelihood(ask("the cat ", "sat"))
    assert -40 < found[0] < 0
    (rolled,) = lm.loglikelihood_rolling([Ask((words(0, 20),))])
    assert -1000 < rolled < 0
    assert (LENGTH, lm.scorer.dtype) == (16, torch.float32)


def test_workers_change_nothing(base_run: Path) -> None:
    requests = [r for i in range(6) for r in ask(words(i, 2)[:8], " cat", " sat on", doc=i)]
    found = [Harness(base_run, samples=4, first=4, workers=n).loglikelihood(requests) for n in (1, 2)]
    assert scores(found[1]) == pytest.approx(scores(found[0]), abs=1e-5)


def test_options_out_of_range(base_run: Path) -> None:
    with pytest.raises(UserError, match="--workers must be at least 1"):
        Harness(base_run, workers=0)
    with pytest.raises(UserError, match="--samples"):
        Harness(base_run, samples=1)


def test_a_baseline_is_refused(base_run: Path) -> None:
    run = load_run(base_run)
    network = build_baseline(FAMILIES["masked"], run.config.network, torch.zeros(run.tokenizer.vocab_size))
    with pytest.raises(UserError, match="of family masked: this needs a run of family flow"):
        Harness(replace(run, network=network, config=replace(run.config, family="masked")))
