"""Goals by name, and `catmaps steer`: rewards by definition, rewards that rise, given text that stays."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from catmaps.cli import main
from catmaps.errors import UserError
from catmaps.goals import GOALS, default_steering, read_goal, steer
from catmaps.infill import Template
from catmaps.model import Run, load_run
from catmaps.text.tokenizers import Text8Tokenizer

LETTERS = Text8Tokenizer()


def goal(spec: str, strength: float = 2.0) -> Any:
    return read_goal(spec, strength, LETTERS, lambda: frozenset({"cat", "sat"}))


def rewards(spec: str, *texts: str, strength: float = 2.0) -> list[float]:
    ids = torch.stack([torch.from_numpy(LETTERS.encode(text).astype("int64")) for text in texts])
    return goal(spec, strength).reward(ids).tolist()


@pytest.fixture(scope="module")
def map_(map_run: Path) -> Run:
    return load_run(map_run)


def test_wrong_letters_at_the_best_place_cost_their_strength() -> None:
    found = rewards("contains:cat", "zzcatzzz", "zzcabzzz", "zzzzzzzz", strength=20.0)
    assert found == pytest.approx([0.0, -20.0, -60 + torch.tensor(6.0).log().item()], abs=1e-4)
    assert [goal("contains:cat").measure(text) for text in ("a cat", "a rat")] == [1.0, 0.0]


def test_a_relaxed_reward_is_the_reward_at_one_hots_and_rises_along_its_gradient() -> None:
    p = torch.full((2, 6, 27), 1 / 27, dtype=torch.float64, requires_grad=True)
    relaxed = goal("contains:cat").relaxed
    value = relaxed(p)
    (gradient,) = torch.autograd.grad(value.sum(), p)
    assert bool((gradient[..., [3, 1, 20]].sum((1, 2)) > 0).all())
    assert bool((gradient[..., 25] == 0).all())
    better = (p.detach() + 0.1 * gradient / gradient.norm()).clamp_min(0)
    assert bool((relaxed(better) > value).all())


def test_rewards_of_texts() -> None:
    assert rewards("word-length:3", "the cat", "a a a a", "abcdefg") == pytest.approx([0.0, -4.0, -8.0])
    assert rewards("valid-words", "x cat sat y", "x cat dog y", "x dogs a yz") == pytest.approx([0.0, -1.0, -2.0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("luck", "no reward luck; there are contains, word-length, valid-words"),
        ("contains", "contains what"),
        ("contains:\u732b", "outside the alphabet"),
        ("word-length:long", "needs a number of letters"),
        ("valid-words:all", "takes no argument"),
    ],
)
def test_what_is_no_goal_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        goal(spec)
    with pytest.raises(UserError, match="above 0"):
        goal("contains:a", 0.0)
    assert set(GOALS) == {"contains", "word-length", "valid-words"}


@pytest.mark.parametrize("gradient", [False, True])
def test_steering_raises_its_reward(gradient: bool, map_: Run) -> None:
    """Two letters in a row that few of 16 texts hold by chance."""
    wanted = goal("contains:ae", 6.0)
    config = default_steering(map_, wanted, particles=8, gradient=gradient)
    assert (config.tilt.move, config.steps) == (("localisation", 64) if gradient else ("renoise", 8))
    config = replace(config, steps=4)
    blind = replace(config, tilt=replace(config.tilt, particles=1, relaxed=None))
    plain, steered = (
        sum("ae" in LETTERS.decode(row.numpy()) for found in steer(map_, how, 16) for row in found.texts)
        for how in (blind, config)
    )
    assert plain <= 7
    assert steered >= 11


def test_given_text_stays_and_a_seed_gives_the_same_texts(map_: Run) -> None:
    template = Template.read("on [[6]] mat", map_.tokenizer)
    config = default_steering(map_, goal("contains:cat"), particles=4)
    first, again = ([found.texts for found in steer(map_, config, 20, template=template)] for _ in range(2))
    assert [len(texts) for texts in first] == [16, 4]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    known = torch.from_numpy(template.tokens[template.known])
    assert all(bool((texts[:, template.known] == known).all()) for texts in first)
    with pytest.raises(UserError, match="the window of"):
        next(steer(map_, config, 1, length=17))


def test_the_command(capsys: pytest.CaptureFixture[str], map_run: Path, base_run: Path) -> None:
    for run, more, noise in (
        (map_run, [], 0.75),
        (map_run, ["--steps", "2", "--noise", "1"], 1.0),
        (base_run, ["--steps", "4"], None),
        (map_run, ["--gradient", "--steps", "4", "--best"], None),
    ):
        capsys.readouterr()
        words = ["steer", str(run), "--reward", "contains:e", "--num", "3", "--particles", "4", *more]
        assert main([*words, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert [len(text) for text in said["texts"]] == [16] * 3
        assert said["measures"] == [float("e" in text) for text in said["texts"]]
        assert len(said["least_effective_particles"]) == 3
        assert said["noise"] == noise
    assert main(["steer", str(map_run), "--reward", "word-length:4", "--num", "1", "--infill", "a [[5]] mat"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("[1] a ")
    assert "letters per word: " in out[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "luck"], "no reward luck"),
        (["--reward", "contains:a", "--num", "0"], "--num must be at least 1"),
        (["--reward", "contains:a", "--length", "17"], "the window of"),
        (["--reward", "contains:a", "--length", "3", "--infill", "[[2]]"], "--length is for texts without --infill"),
        (["--reward", "contains:a", "--noise", "-1"], "noise is a variance, at least 0, not -1"),
        (
            ["--reward", "contains:a", "--gradient", "--noise", "1"],
            "noise is for the sampler renoise, not local",
        ),
        (["--reward", "word-length:4", "--gradient"], "no differentiable reward"),
        (["--reward", "contains:abcdef", "--length", "3"], "cannot hold it"),
    ],
)
def test_mistakes_cost_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], map_run: Path
) -> None:
    capsys.readouterr()
    assert main(["steer", str(map_run), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1
