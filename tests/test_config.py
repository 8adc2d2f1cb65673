"""Configurations survive their JSON; what does not belong is named."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from catmaps.cli import main
from catmaps.config import ClockConfig, Config, DataConfig, OptimiserConfig, TrainingConfig, from_json, to_json
from catmaps.errors import UserError
from catmaps.flow.objective import ObjectiveConfig
from catmaps.network.denoiser import NetworkConfig
from catmaps.presets import DISTILLATIONS, PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back(name: str) -> None:
    config = replace(PRESETS[name](), preset=name)
    assert from_json(to_json(config), "config.json") == config
    for distillation in DISTILLATIONS.values():
        below = replace(distillation(config), base="runs/base")
        assert from_json(to_json(below), "config.json") == below
        assert below.network == config.network
        assert below.data == config.data
        assert 0 < below.objective.off_diagonal < 1


def test_every_field_is_kept() -> None:
    config = Config(
        preset="own",
        base="somewhere",
        data=DataConfig(shards="s", tokenizer="bytes", length=7),
        network=NetworkConfig(width=8, blocks=1, heads=2, conditioning=3, mlp_ratio=2, input="linear", skip=False),
        clock=ClockConfig(law="uniform", adaptive=False),
        objective=ObjectiveConfig(loss="esd", off_diagonal=0.1, anchor=0.2, anchor_gap=0.3, boundary=0.4, clean=0.5),
        optimiser=OptimiserConfig(name="adamw", lr=1.0, muon_lr=2.0, beta1=0.5, ema=0.1, weight_decay=3.0, warmup=4),
        training=TrainingConfig(steps=3, batch=4, seed=5, precision="fp32", compile=False, threads=6),
    )
    assert from_json(to_json(config), "config.json") == config
    assert asdict(config) == json.loads(to_json(config))


def changed(path: str, value: Any) -> str:
    tree = json.loads(to_json(Config()))
    at = tree
    *parents, last = path.split(".")
    for name in parents:
        at = at[name]
    at[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", 1, "unknown field colour"),
        ("network.wdth", 64, "unknown field network.wdth"),
        ("network", 3, "network is not an object"),
        ("network.width", "64", "network.width must be of type int, not '64'"),
        ("network.width", True, "network.width must be of type int, not True"),
        ("network.width", 7, "width 7 must be heads"),
        ("network.heads", 0, "every size of the network must be at least 1"),
        ("network.input", "magic", "network.input must be one of belief, linear, not 'magic'"),
        ("network.skip", 1, "network.skip must be of type bool, not 1"),
        ("optimiser.name", "sgd", "optimiser.name must be one of adamw, muon, not 'sgd'"),
        ("optimiser.lr", 0.0, "optimiser.lr"),
        ("optimiser.lr", float("nan"), "optimiser.lr"),
        ("optimiser.lr", None, "optimiser.lr must be of type float, not None"),
        ("optimiser.decay", 1.5, "decay must lie in"),
        ("optimiser.beta2", 1.0, "optimiser.beta2 must lie in"),
        ("optimiser.ema", 1.0, "optimiser.ema must lie in"),
        ("objective.loss", "mse", "objective.loss must be one of psd, lsd, lsd_kl, esd, ecld, not 'mse'"),
        ("objective.clean", -0.1, "objective.clean must lie in"),
        ("training.steps", 0, "training.steps must be at least 1, not 0"),
        ("training.steps", 1.5, "training.steps must be of type int, not 1.5"),
        ("training.seed", -1, "training.seed"),
        ("training.threads", 0, "training.threads must be at least 1"),
        ("training.evaluate_every", -1, "training.evaluate_every"),
        ("data.length", 0, "data.length must be at least 1"),
        ("data.shards", 5, "data.shards must be of type str | None, not 5"),
    ],
)
def test_what_does_not_belong_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"^run/config\.json is not a configuration of this version") as caught:
        from_json(changed(path, value), "run/config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["base", "training", "training.steps"])
def test_what_is_missing_is_named(path: str) -> None:
    tree = json.loads(to_json(Config()))
    *parents, last = path.split(".")
    del (tree[parents[0]] if parents else tree)[last]
    with pytest.raises(UserError, match=f"missing field {path}$"):
        from_json(json.dumps(tree), "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^here\.json is not a configuration"):
        from_json(text, "here.json")


def test_whole_numbers_may_stand_for_fractions() -> None:
    rate = from_json(changed("optimiser.lr", 1), "config.json").optimiser.lr
    assert isinstance(rate, float)
    assert rate == 1


def info(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", name, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("name", "size"), [("130m", 130e6), ("400m", 400e6), ("1.7b", 1.7e9)])
def test_presets_have_the_size_in_their_name(name: str, size: float, capsys: pytest.CaptureFixture[str]) -> None:
    facts = info(name, capsys)
    width = PRESETS[name]().network.width
    assert facts["vocabulary"] == 50_304
    assert facts["parameters_vocabulary"] == 2 * width * 50_304
    total = facts["parameters_body"] + facts["parameters_vocabulary"]
    assert total == pytest.approx(size, rel=0.03)
    assert facts["config"]["network"]["width"] == width


def test_the_vocabulary_of_a_preset_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "small", "--vocabulary", "27", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters_vocabulary"] == 2 * 256 * 27
    assert 4e6 < facts["parameters_body"] < 5e6


def test_an_average_that_teaches_without_a_base_looks_at_noise_through_no_other_table() -> None:
    linear, belief = NetworkConfig(input="linear"), NetworkConfig()
    joint = ObjectiveConfig(jumps="average", off_diagonal=0.5)
    with pytest.raises(ValueError, match=r"needs network\.input belief"):
        Config(network=linear, objective=joint)
    assert Config(network=linear, objective=joint, base="base").average_teaches  # its table is the base's for good
    assert Config(network=belief, objective=joint).average_teaches
    assert not Config(network=linear, objective=replace(joint, off_diagonal=0.0)).average_teaches
    assert Config(network=belief, objective=replace(joint, loss="lsd")).average_teaches
    assert not Config(network=belief, objective=replace(joint, loss="lsd"), base="base").average_teaches
