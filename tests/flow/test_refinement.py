"""Refinement keeps an exact model's law, moves other texts towards it, and sharpens where it is asked to."""

from typing import Any

import pytest
import torch
from oracle import ExactMap, random_joint, seeded, total_variation
from torch import Tensor

from catmaps.flow.flow_map import FlowMap
from catmaps.flow.interpolant import gaussian, interpolate
from catmaps.flow.refinement import Refine, _log_chance, _order, consistency, refine
from catmaps.flow.samplers import SAMPLERS
from catmaps.flow.times import grid, warp

JOINT = random_joint(3, 3, seed=10, spread=1.3)
N = 3000  # frequencies in 27 cells then differ from probabilities by a total variation of 0.035 +- 0.005


def refined(tokens: Tensor, known: Tensor | None = None, **how: Any) -> Tensor:
    model = FlowMap(JOINT)
    config = Refine(at=0.5, share=0.3, **how)
    step, times = SAMPLERS["localisation"], grid(warp(3), 2)  # one free token: exact in any number of steps
    return refine(model, config, step, times, tokens, known=known, generator=seeded(3), dtype=torch.float64)


@pytest.mark.parametrize("how", [{"focus": 0.0}, {"focus": 1.5, "exact": True}], ids=["any", "exact"])
def test_the_law_of_an_exact_model_stays(how: dict[str, Any]) -> None:
    texts = JOINT.sample(N, seeded(1))
    after = refined(texts, rounds=4, **how)
    assert total_variation(after, JOINT.probabilities) < 0.05
    assert (after != texts).any(1).double().mean() > 0.3


@pytest.mark.parametrize("how", [{"focus": 0.0}, {"focus": 1.0, "exact": True}], ids=["any", "exact"])
def test_other_texts_move_towards_it(how: dict[str, Any]) -> None:
    texts = torch.randint(0, 3, (N, 3), generator=seeded(2))
    before = total_variation(texts, JOINT.probabilities)
    distances = [total_variation(refined(texts, rounds=rounds, **how), JOINT.probabilities) for rounds in (1, 10)]
    assert before > distances[0] + 0.05
    assert distances[0] > distances[1] + 0.05
    assert distances[1] < 0.08


def test_focus_alone_makes_texts_likelier_than_the_model_does() -> None:
    texts = JOINT.sample(N, seeded(1))
    after = refined(texts, rounds=4, focus=3.0)
    assert total_variation(after, JOINT.probabilities) > 0.1
    likely = [JOINT.log_prob(one).mean().item() for one in (texts, after)]
    assert likely[1] > likely[0] + 0.15


def test_known_text_never_changes_and_share_counts_free_positions() -> None:
    texts = JOINT.sample(200, seeded(4))
    known = torch.tensor([[True, False, True]]).expand(200, 3)
    after = refined(texts, known=known, rounds=3, focus=1.0)
    assert torch.equal(after[known], texts[known])
    assert bool((after != texts).any())
    assert torch.equal(refined(texts, known=torch.ones_like(known), rounds=2, focus=1.0, exact=True), texts)
    assert torch.equal(refined(texts, rounds=0), texts)


def test_consistency_is_what_the_other_positions_say() -> None:
    """log p(x_l | x_t at the others): Bayes' rule without the position's own evidence."""
    tokens, t = JOINT.sample(20, seeded(5)), 0.6
    noise = gaussian((20, 3, 3), seeded(6), torch.float64).x
    evidence = t / (1 - t) ** 2 * interpolate(tokens, noise, torch.full((20, 1), t, dtype=torch.float64)).x
    found = consistency(FlowMap(JOINT), tokens, t, noise)
    for position in range(3):
        others = evidence.clone()
        others[:, position] = 0
        law = JOINT.log_marginals(others)[:, position].log_softmax(-1)
        torch.testing.assert_close(found[:, position], law.gather(1, tokens[:, position : position + 1])[:, 0])


def test_consistency_needs_no_exact_skip_on_the_diagonal_of_a_map() -> None:
    tokens = JOINT.sample(5, seeded(5))
    noise = gaussian((5, 3, 3), seeded(6), torch.float64).x
    both = [consistency(FlowMap(model), tokens, 0.6, noise) for model in (JOINT, ExactMap(JOINT, steps=2))]
    torch.testing.assert_close(both[0], both[1])


def test_positions_are_drawn_without_replacement_by_weight() -> None:
    keys = torch.tensor([2.0, 1.0, 0.0, -torch.inf]).double().expand(30000, 4)
    order, two = _order(keys, seeded(7)), torch.full((30000,), 2)
    assert bool((order[:, 3] == 3).all())
    chance = _log_chance(keys, order, two).exp()
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            rows = (order[:, 0] == first) & (order[:, 1] == second)
            p = keys[0].exp()
            expected = p[first] / p.sum() * p[second] / (p.sum() - p[first])
            torch.testing.assert_close(chance[rows][0], expected)
            assert abs(rows.double().mean() - expected) < 0.015


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"at": 1.0}, {"focus": -1.0}, {"rounds": -1}])
def test_what_cannot_be_refined_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="refinement needs"):
        Refine(**wrong)  # pyright: ignore[reportArgumentType]
