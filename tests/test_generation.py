"""Texts from a run: how many, how long, and what a seed means."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from catmaps.errors import UserError
from catmaps.flow.samplers import SAMPLERS
from catmaps.generation import SamplingConfig, continue_tokens, default_sampling, extend, generate, generate_texts
from catmaps.model import Run, load_run
from catmaps.network.denoiser import FlowNetwork
from catmaps.network.published import PublishedConfig

CONFIG = SamplingConfig(steps=3, batch=4, seed=5)


@pytest.fixture(scope="module")
def base(base_run: Path) -> Run:
    return load_run(base_run)


@pytest.fixture(scope="module")
def map_(map_run: Path) -> Run:
    return load_run(map_run)


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """The batch sizes of the network's calls."""
    seen: list[int] = []
    encode = FlowNetwork.encode

    def counted(net: FlowNetwork, state, s, t) -> torch.Tensor:  # noqa: ANN001
        seen.append(len(s))
        return encode(net, state, s, t)

    with patch.object(FlowNetwork, "encode", counted):
        yield seen


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_the_same_texts_and_another_seed_others(sampler: str, map_: Run) -> None:
    config = replace(CONFIG, sampler=sampler)
    texts = generate_texts(map_, 6, config)
    assert generate_texts(map_, 6, config) == texts
    assert generate_texts(map_, 6, replace(config, seed=6)) != texts
    assert len(set(texts)) == 6  # batches have their own noise


def test_seeds_do_not_depend_on_the_global_generator(map_: Run) -> None:
    texts = generate_texts(map_, 4, replace(CONFIG, sampler="renoise"))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert generate_texts(map_, 4, replace(CONFIG, sampler="renoise")) == texts
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num", [1, 3, 4, 5, 9])
def test_as_many_texts_as_asked_for(num: int, map_: Run) -> None:
    batches = list(generate(map_, num, CONFIG))
    assert [len(batch) for batch in batches] == [4] * (num // 4) + ([num % 4] if num % 4 else [])
    for batch in batches:
        assert batch.shape[1] == 16
        assert batch.dtype == torch.int64
        assert bool(((batch >= 0) & (batch < 27)).all())
    assert all(len(text) == 16 for text in generate_texts(map_, num, CONFIG))


@pytest.mark.parametrize("sampler", ["flow_map", "localisation"])
def test_first_texts_do_not_depend_on_how_many_follow(sampler: str, map_: Run) -> None:
    config = replace(CONFIG, sampler=sampler)
    many = generate_texts(map_, 13, config)
    for num in (4, 5, 7, 8, 9):
        assert generate_texts(map_, num, config) == many[:num]


def test_lengths_may_differ_from_training(map_: Run) -> None:
    for length in (1, 7, 40):
        assert [batch.shape for batch in generate(map_, 2, CONFIG, length=length)] == [(2, length)]


def test_calls_are_what_the_configuration_says(map_: Run, calls: list[int]) -> None:
    for sampler in SAMPLERS:
        calls.clear()
        config = replace(CONFIG, sampler=sampler)
        list(generate(map_, 4, config))
        assert len(calls) == config.calls == (5 if sampler == "heun" else 3)
        assert set(calls) == {4}


def test_renoising_comes_back_late_with_all_of_the_noise_latest(map_: Run) -> None:
    """Other samplers step evenly on the clock."""
    even = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    renoised = {None: 1 / 2, 1.0: 1 / 3, 0.5: 1 / 2, 0.0: 1.0}
    cases = [("renoise", noise, bend) for noise, bend in renoised.items()]
    cases += [(sampler, None, 1.0) for sampler in SAMPLERS if sampler != "renoise"]
    for sampler, noise, bend in cases:
        times = SamplingConfig(steps=4, sampler=sampler, noise=noise).times(map_)
        torch.testing.assert_close(map_.clock.cdf(times.double()), even**bend, rtol=0, atol=1e-6)


def test_a_map_jumps_and_a_base_is_followed(base: Run, map_: Run) -> None:
    assert (default_sampling(map_).sampler, default_sampling(map_).steps) == ("renoise", 4)
    assert (default_sampling(base).sampler, default_sampling(base).steps) == ("euler", 64)
    assert default_sampling(map_, 2).steps == default_sampling(base, 2).steps == 2
    for run in (base, map_):
        with pytest.raises(UserError, match="steps"):
            default_sampling(run, 0)


def test_watch_sees_every_step(map_: Run) -> None:
    seen: list[tuple[float, torch.Size]] = []
    drawn = list(generate(map_, 6, CONFIG, watch=lambda t, endpoint: seen.append((t, endpoint.shape))))
    times = [t for t, _ in seen]
    assert len(seen) == 3 * len(drawn) == 6
    assert times[:3] == times[3:] == sorted(times[:3])
    assert times[2] == 1.0
    assert all(shape == (4, 16, 27) for _, shape in seen)


def test_temperature_near_zero_takes_the_likeliest(map_: Run) -> None:
    """With next to no noise every text of a batch is that of the mean, x_0 = 0."""
    config = SamplingConfig(steps=1, temperature=1e-12)
    assert len(set(generate_texts(map_, 4, config))) == 1
    assert len(set(generate_texts(map_, 4, replace(config, temperature=1.0)))) == 4


def test_temperature_scales_the_variance_of_the_first_noise(map_: Run) -> None:
    seen: list[torch.Tensor] = []
    encode = FlowNetwork.encode

    def watched(net: FlowNetwork, state, s, t) -> torch.Tensor:  # noqa: ANN001
        seen.append(state.x)
        return encode(net, state, s, t)

    with patch.object(FlowNetwork, "encode", watched):
        for temperature in (1.0, 0.25):
            list(generate(map_, 2, SamplingConfig(steps=1, temperature=temperature)))
    torch.testing.assert_close(seen[1], seen[0] / 2)


@pytest.mark.parametrize(("sampler", "divided"), [("renoise", 1.0), ("flow_map", 0.25), ("euler", 0.25)])
def test_temperature_divides_logits_but_for_renoising(sampler: str, divided: float, map_: Run) -> None:
    config = SamplingConfig(sampler=sampler, temperature=0.25)
    assert config.flow_map(map_, (1, 16), None, map_.generator(0)).temperature == divided


def test_a_map_renoises_with_half_of_the_noise(map_: Run) -> None:
    plain = SamplingConfig(steps=3, seed=5)
    assert [replace(plain, steps=n).variance(map_) for n in (1, 3, 4, 8, 64)] == [0.5, 0.5, 0.5, 0.75, 1 - 1 / 32]
    texts = generate_texts(map_, 4, plain)
    assert texts == generate_texts(map_, 4, replace(plain, noise=0.5))
    assert texts != generate_texts(map_, 4, replace(plain, noise=1.0))
    assert SamplingConfig(sampler="flow_map").variance(map_) is None
    published = replace(
        map_, config=replace(map_.config, published=PublishedConfig(kind="flm", embedding="plain", arrival=True))
    )
    assert plain.variance(published) == 1.0  # as their own sampler has it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "magic"}, "no sampler magic; there are euler, heun, flow_map, renoise, localisation"),
        ({"steps": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"noise": -0.1}, "noise is a variance, at least 0, not -0.1"),
        ({"noise": 0.5, "sampler": "flow_map"}, "for the sampler renoise, not flow_map"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, int | str | float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**change)  # pyright: ignore[reportArgumentType]


def test_long_texts_are_written_block_by_block_behind_what_is_there(map_: Run, calls: list[int]) -> None:
    length = map_.config.data.length
    (long,) = generate(map_, 3, CONFIG, length=2 * length)
    assert long.shape == (3, 2 * length)
    assert len(calls) == 3 * CONFIG.steps  # a whole window, then half a window at a time
    (short,) = generate(map_, 3, CONFIG)
    assert torch.equal(long[:, :length], short)
    assert len({tuple(row.tolist()) for row in long}) == 3


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0, 1.6])
def test_extend_writes_what_is_asked_for_and_keeps_the_prompt(sampler: str, share: float, map_: Run) -> None:
    length = map_.config.data.length
    known, wanted = round(share * length), length // 2 - 3
    prompt = torch.randint(0, 27, (2, known), generator=torch.Generator().manual_seed(1))
    config = replace(CONFIG, sampler=sampler, steps=1)
    seen: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(2)
    new = extend(map_, prompt, wanted, config, generator, lambda t, endpoint: seen.append(endpoint.argmax(-1)))
    assert new.shape == (2, wanted)
    first = min(known, length - wanted)
    assert torch.equal(seen[0][:, :first], prompt[:, known - first :])


def test_nothing_is_written_where_nothing_is_wanted(map_: Run, calls: list[int]) -> None:
    prompt = torch.zeros(2, 5, dtype=torch.long)
    assert extend(map_, prompt, 0, CONFIG, torch.Generator()).shape == (2, 0)
    assert calls == []


def test_continuations_come_back_in_the_order_of_their_prompts(map_: Run) -> None:
    prompts = [np.full(n, n % 27) for n in (3, 0, 7, 3, 100)]
    one_by_one = replace(CONFIG, batch=1)
    written = continue_tokens(map_, prompts, 20, one_by_one)
    assert [len(row) for row in written] == [20] * 5
    assert not np.array_equal(written[0], written[3])  # the same prompt, drawn with other noise
    again = continue_tokens(map_, prompts, 20, one_by_one)
    assert all(np.array_equal(a, b) for a, b in zip(written, again, strict=True))
    assert len(continue_tokens(map_, prompts, 20, CONFIG)) == 5
