"""Questions against exact models: the bound is the likelihood, the best choice is found, order and batches are idle."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import MarkovChain, Scaled, random_joint, seeded
from oracle_runs import AnyLength, K, stationary_chain

from catmaps.errors import UserError
from catmaps.evaluation.conditional import (
    T_MAX,
    PromptedMap,
    Row,
    Scorer,
    batches,
    content_hash,
    couple,
    drawing,
    path_place,
    radical_inverse,
    scoring_law,
)
from catmaps.evaluation.questions import Budget, Question, answer, likeliest
from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import State, interpolate
from catmaps.flow.times import uniform, warp


@pytest.fixture(scope="module")
def chain() -> AnyLength:
    return stationary_chain()


def scorer_of(model: object) -> Scorer:
    law = scoring_law(warp(K), warp(K))
    return Scorer(FlowMap(model), law, torch.device("cpu"), torch.float64)  # pyright: ignore[reportArgumentType]


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def nats(chain: AnyLength, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """-log p(continuation | prompt)."""
    whole = MarkovChain(chain.initial, chain.transition, len(prompt) + len(continuation))
    tokens = torch.tensor([[*prompt, *continuation]])
    known = torch.arange(tokens.shape[1])[None] < len(prompt)
    return -whole.log_prob(tokens, known).item()


def solve(questions: Sequence[Question], model: object, elements: int | None = None) -> None:
    class Small(Scorer):
        @property
        def elements(self) -> int:
            return super().elements if elements is None else elements

    scorer = scorer_of(model)
    small = Small(scorer.flow_map, scorer.law, scorer.device, scorer.dtype)
    with drawing(small) as draw:
        answer(questions, draw)


def random_questions(chain: AnyLength, budget: Budget, number: int) -> list[Question]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(number):
        prompt = ids(*rng.integers(0, K, rng.integers(0, 4)))
        choices = [ids(*rng.integers(0, K, rng.integers(1, 4))) for _ in range(3)]
        found.append(Question([prompt] * 3, choices, [len(choice) for choice in choices], budget))
    return found


def test_a_prompted_map_is_the_map_with_clean_positions(chain: AnyLength) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(K, (3, 6), generator=generator)
    noise = torch.randn(3, 6, K, generator=generator, dtype=torch.float64)
    t = torch.tensor([[0.2], [0.5], [0.7]], dtype=torch.float64)
    times = torch.where(torch.arange(6) < 2, 1.0, t)
    whole = FlowMap(chain).log_endpoint(interpolate(tokens, noise, times), times, times)
    prompted = PromptedMap(chain, prompt=tokens[:, :2])
    part = prompted.log_endpoint(interpolate(tokens[:, 2:], noise[:, 2:], t), t, t)
    assert torch.equal(part, whole[:, 2:])
    bare = PromptedMap(chain, prompt=tokens[:, :0]).log_endpoint(State(noise), t, t)
    assert torch.equal(bare, FlowMap(chain).log_endpoint(State(noise), t, t))
    with pytest.raises(NotImplementedError):
        prompted.endpoint_with_tangent(State(noise), t, t, ds=t, dt=t)


def test_the_conditional_bound_of_an_exact_model_is_the_likelihood(chain: AnyLength) -> None:
    """Equality, eq. (14): within four standard errors, which are small."""
    prompts, continuations = [ids(1, 0), ids(), ids(3)], [ids(2, 4, 0), ids(1, 1), ids(0, 2, 3, 4)]
    budget = Budget(samples=1024, first=1024)
    questions = [Question([p], [c], [1], budget) for p, c in zip(prompts, continuations, strict=True)]
    solve(questions, chain)
    for question, prompt, continuation in zip(questions, prompts, continuations, strict=True):
        exact = nats(chain, prompt.tolist(), continuation.tolist())
        assert question.samples == 1024
        assert 0 < question.stderr[0] < 0.4
        assert abs(question.nats[0] - exact) < 4 * question.stderr[0]


def test_a_wrong_model_has_a_larger_bound(chain: AnyLength) -> None:
    budget = Budget(samples=64, first=64)
    texts = [ids(*row) for row in MarkovChain(chain.initial, chain.transition, 5).sample(8, seeded(2)).tolist()]
    exact, wrong = ([Question([t[:2]], [t[2:]], [1], budget) for t in texts] for _ in range(2))
    solve(exact, chain)
    solve(wrong, Scaled(chain, 0.5))
    assert sum(q.nats[0] for q in wrong) > sum(q.nats[0] for q in exact)


def test_single_tokens_are_scored_without_noise(chain: AnyLength) -> None:
    """t_max = 0: the posterior at t = 0 given the prompt is the likelihood, with two draws and no error."""
    question = Question([ids(2, 1)] * K, [ids(k) for k in range(K)], [1] * K, Budget())
    solve([question], chain)
    assert question.nats == pytest.approx([nats(chain, [2, 1], [k]) for k in range(K)])
    assert question.stderr == pytest.approx(np.zeros(K), abs=1e-12)
    assert (question.samples, question.decided, question.lead()) == (2, True, math.inf)


def test_the_right_choice_is_found_and_clear_questions_stop_early(chain: AnyLength) -> None:
    questions = random_questions(chain, Budget(samples=256, first=8, z=2.0), 12)
    solve(questions, chain)
    right = 0
    for question in questions:
        texts = zip(question.prompts, question.continuations, strict=True)
        exact = np.array([nats(chain, prompt.tolist(), text.tolist()) for prompt, text in texts])
        right += question.nats.argmin() == exact.argmin()
        assert (np.abs(question.nats - exact) <= 5 * question.stderr + 1e-9).all()
        assert question.decided == (question.lead() >= 2)
        assert question.decided or question.samples == 256 or not question.stderr.any()  # two choices are the same
    assert right >= 11
    assert sum(question.samples <= 64 for question in questions) >= 4


def test_a_clear_question_takes_one_round_and_a_tie_the_whole_budget() -> None:
    """Token 0 after 0 has probability 0.98, token 1 after 0 has 0.005; 1 and 2 are exchangeable."""
    transition = torch.full((4, 4), 0.005, dtype=torch.float64)
    transition[:, 0] = 0.985
    model = AnyLength(torch.full((4,), 0.25, dtype=torch.float64), transition / transition.sum(1, keepdim=True), 3)
    budget = Budget(samples=64, first=8, z=2.0)
    clear = Question([ids(0)] * 2, [ids(0, 0), ids(1, 1)], [2, 2], budget)
    tie = Question([ids(0)] * 2, [ids(1, 2), ids(2, 1)], [2, 2], budget)
    scorer = Scorer(FlowMap(model), warp(4), torch.device("cpu"), torch.float64)
    with drawing(scorer) as draw:
        answer([clear, tie], draw)
    assert (clear.samples, clear.decided) == (8, True)
    assert clear.lead() > 2
    assert tie.samples == 64
    assert not tie.decided


def test_neither_order_nor_batches_change_anything(chain: AnyLength) -> None:
    budget = Budget(samples=8, first=4)
    one, other, small = (random_questions(chain, budget, 6) for _ in range(3))
    solve(one, chain)
    solve(other[::-1], chain)
    solve(small, chain, elements=3 * K)  # a row or two a batch
    for a, b, c in zip(one, other, small, strict=True):
        assert np.array_equal(a.path, b.path)
        assert np.array_equal(a.end, b.end)
        assert a.samples == c.samples
        assert np.allclose(a.path, c.path, rtol=0, atol=1e-9)
    alone = random_questions(chain, budget, 6)[3]
    solve([alone], chain)
    assert np.allclose(alone.path, one[3].path, rtol=0, atol=1e-9)


def test_draws_do_not_depend_on_the_budget_but_on_the_seed(chain: AnyLength) -> None:
    short, long, other = (
        Question([ids(1)], [ids(2, 3)], [1], Budget(samples=n, first=n, seed=seed))
        for n, seed in ((8, 0), (32, 0), (8, 1))
    )
    solve([short, long, other], chain)
    assert np.allclose(short.path[0], long.path[0, :8], rtol=0, atol=1e-12)
    assert not np.allclose(short.path, other.path)


def test_common_random_numbers_make_differences_quieter(chain: AnyLength) -> None:
    budget = Budget(samples=256, first=256, z=1e9)
    shared = Question([ids(1)] * 2, [ids(2, 3, 0), ids(2, 3, 1)], [1, 1], budget)
    apart = [Question([ids(1)], [c], [1], budget, key) for key, c in enumerate(shared.continuations)]
    solve([shared, *apart], chain)
    together = (shared.path[0] - shared.path[1]).var()
    assert together < 0.7 * (apart[0].path[0] - apart[1].path[0]).var()


def test_a_shorter_continuation_has_the_first_part_of_a_longer_ones_noise(chain: AnyLength) -> None:
    scorer = scorer_of(chain)
    long, short = (Row("path", ids(1), ids(*tokens), (0, 7), 3) for tokens in ((2, 2, 2), (2, 2)))
    assert torch.equal(scorer._noise(long)[:, :2], scorer._noise(short))
    end = scorer._noise(long._replace(kind="end"))
    assert not torch.equal(end, scorer._noise(long))


def test_coupled_noise_is_the_same_seen_from_the_right_token() -> None:
    noise = torch.randn(1, 2, K, generator=seeded(0)).expand(2, 2, K)
    tokens = torch.tensor([[0, 3], [4, 0]])
    coupled = couple(noise, tokens)
    assert torch.equal(coupled.gather(-1, tokens[..., None]), noise[..., :1])
    assert torch.equal(coupled.sort(-1).values, noise.sort(-1).values)


def test_places_are_stratified_and_uniform() -> None:
    assert [radical_inverse(i) for i in range(4)] == [0.0, 0.5, 0.25, 0.75]
    places = np.sort([path_place((0, 5), i) for i in range(64)])
    assert np.diff(places) == pytest.approx(np.full(63, 1 / 64))
    first = [path_place((0, key), 0) for key in range(2000)]
    assert np.mean(first) == pytest.approx(0.5, abs=0.03)
    assert np.var(first) == pytest.approx(1 / 12, rel=0.1)


def test_standard_errors_leave_out_what_stratification_removes(chain: AnyLength) -> None:
    """A smooth function of time has next to no error; noise has that of independent draws."""
    question = Question([ids(1)] * 2, [ids(1, 2), ids(2, 3)], [1, 1], Budget())
    places = np.array([path_place(question.key, i) for i in range(64)])
    noise = np.random.default_rng(0).normal(size=64)
    question.path, question.end = np.stack([np.sin(3 * places), noise]), np.zeros((2, 1))
    assert question.stderr[0] < 0.1 * np.sin(3 * places).std() / 8
    assert question.stderr[1] == pytest.approx(noise.std() / 8, rel=0.2)
    question.end = np.array([[2.0, 4.0], [3.0, 3.0]])
    assert question.stderr[0] == pytest.approx(1.0, abs=0.01)
    question.end = np.array([[2.0], [0.0]])
    assert question.stderr[0] == pytest.approx(2.0, abs=0.01)


def test_hashes_tell_parts_apart() -> None:
    assert content_hash(ids(1), ids(2)) != content_hash(ids(1, 2))
    assert content_hash(ids(1, 2)) == content_hash(np.array([1, 2], dtype=np.uint16).astype(np.int64))


def test_batches_hold_rows_of_one_shape_and_kind_up_to_a_size() -> None:
    rows = [Row("path", ids(*[1] * p), ids(*[2] * c), (0, 0), i) for i in range(5) for p in (0, 2) for c in (1, 3)]
    rows += [row._replace(kind="end") for row in rows]
    made = batches(rows, K, elements=3 * 3 * K)
    assert sorted(i for batch in made for i in batch) == list(range(len(rows)))
    for batch in made:
        assert len({(len(rows[i].prompt), len(rows[i].continuation), rows[i].kind) for i in batch}) == 1
        total = len(rows[batch[0]].prompt) + len(rows[batch[0]].continuation)
        assert len(batch) == 1 or len(batch) * total <= 9
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    again = batches(shuffled, K, elements=3 * 3 * K)
    assert [[_plain(rows[i]) for i in batch] for batch in made] == [[_plain(shuffled[i]) for i in b] for b in again]


def _plain(row: Row) -> tuple[object, ...]:
    return (row.kind, row.prompt.tolist(), row.continuation.tolist(), row.index)


def test_empty_continuations_are_certain(chain: AnyLength) -> None:
    only = Question([ids(1)], [ids()], [0], Budget())
    both = Question([ids(1)] * 2, [ids(), ids(2, 3)], [0, 2], Budget())
    solve([only, both], chain)
    assert (only.nats.tolist(), only.stderr.tolist(), only.samples) == ([0.0], [0.0], 0)
    assert both.nats[0] == 0
    assert both.nats[1] > 0
    assert both.stderr[0] == 0


def test_greedy_decoding(chain: AnyLength) -> None:
    """Left to right every token is the likeliest after those before it, whatever follows."""
    best = []
    for _ in range(3):
        best.append(min(range(K), key=lambda k: nats(chain, [1, *best], [k])))
    other = (best[2] + 1) % K
    texts = [best, best[:1], [*best[:2], other], [(best[0] + 1) % K, 0], []]
    questions = [Question([ids(1)], [ids(*text)], [1], Budget()) for text in texts]
    with drawing(scorer_of(chain)) as draw:
        assert likeliest(questions, draw) == [True, True, False, False, True]


def test_the_cross_entropy_at_the_end_is_part_of_the_bound() -> None:
    """Only the sum of both parts is the likelihood where a good part of the text is open at t_max."""
    joint = random_joint(2, 2, seed=1, spread=1.5)
    budget = Budget(samples=4096, first=4096)
    question = Question([ids()], [ids(0, 1)], [1], budget)
    scorer = Scorer(FlowMap(joint), uniform(), torch.device("cpu"), torch.float64)
    with drawing(scorer) as draw:
        answer([question], draw)
    exact = -joint.log_prob(torch.tensor([[0, 1]])).item()
    assert T_MAX == 0.9
    assert abs(question.nats[0] - exact) < 4 * question.stderr[0]


def test_damaged_weights_are_named(chain: AnyLength) -> None:
    with pytest.raises(UserError, match="not finite"):
        answer([Question([ids(1)], [ids(2, 3)], [1], Budget())], lambda rows: np.full(len(rows), np.nan))


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"rolling": 1}, {"z": -1.0}, {"seed": -1}, {"seed": 1 << 63}])
def test_budgets_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--samples"):
        replace(Budget(), **wrong)
