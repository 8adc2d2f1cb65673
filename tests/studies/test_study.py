"""study.json: what its arms are, and every mistake in one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_studies import described, written

from catmaps.config import flat
from catmaps.errors import UserError
from catmaps.model import read_config
from catmaps.presets import distilled, tiny
from catmaps.studies.study import Halving, Job, read_study

SHARDS = Path("shards")


def test_an_arm_is_the_preset_with_common_and_own_fields(tmp_path: Path) -> None:
    study = written(tmp_path, described(SHARDS, common={"network.width": 128, "optimiser.lr": 0.5}))
    config = flat(study.config(Job(study.arm("fast"), 3), 77))
    preset = flat(tiny())
    own = {"network.width": 128, "optimiser.lr": 0.01, "training.steps": 77, "training.seed": 3, "training.threads": 1}
    assert config == preset | own | {"preset": "tiny"}


def test_arms_of_a_grid_are_its_product_and_named_by_values(tmp_path: Path) -> None:
    grid = {"clock.law": ["warp", "uniform"], "clock.adaptive": [True, False], "optimiser.lr": [0.01, 1e-5]}
    study = written(tmp_path, described(SHARDS, arms=None, grid=grid, baseline="warp-adaptive-lr0.01"))
    names = [arm.name for arm in study.arms]
    assert names[:3] == ["warp-adaptive-lr0.01", "warp-adaptive-lr1e-05", "warp-no_adaptive-lr0.01"]
    assert len(names) == 8
    assert study.arm("uniform-no_adaptive-lr1e-05").overrides == {
        "clock.law": "uniform",
        "clock.adaptive": False,
        "optimiser.lr": 1e-5,
    }


def test_named_arms_are_crossed_with_the_grid_and_have_baselines_of_their_own(tmp_path: Path) -> None:
    arms = {"letters": {"data.tokenizer": "text8"}, "bytes": {"data.tokenizer": "bytes"}}
    grid = {"clock.law": ["uniform", "warp"]}
    study = written(tmp_path, described(SHARDS, arms=arms, grid=grid, baseline={"clock.law": "warp"}))
    assert [(arm.name, study.baseline_of(arm).name) for arm in study.arms] == [
        ("letters-uniform", "letters-warp"),
        ("letters-warp", "letters-warp"),
        ("bytes-uniform", "bytes-warp"),
        ("bytes-warp", "bytes-warp"),
    ]


def test_a_study_may_distil_a_run(tmp_path: Path, base_run: Path) -> None:
    fields = {"objective.anchor": 0.5, "data.shards": read_config(base_run).data.shards}
    arms = {"psd": {"objective.loss": "psd"}, "lsd": {"objective.loss": "lsd"}}
    values = described(SHARDS, arms=arms, common=fields, baseline="psd", preset="quickstart") | {"from": str(base_run)}
    study = written(tmp_path, values)
    config = study.config(Job(study.arm("lsd"), 0), 5)
    assert (config.base, config.objective.loss, config.objective.off_diagonal) == (str(base_run), "lsd", 0.5)
    assert config.network == distilled(str(base_run), "quickstart").network
    with pytest.raises(UserError, match=r"network\.width is 16 in .*cannot be 32"):
        written(tmp_path, values | {"common": {"network.width": 32}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "unknown field colour"),
        ({"budget": None}, "missing field budget"),
        ({"budget": {"hours": 1}}, "budget is"),
        ({"budget": {"tokens": -1}}, "tokens must be positive"),
        ({"name": "a/b"}, "name 'a/b'"),
        ({"preset": "huge"}, "no preset huge"),
        ({"arms": None}, "needs arms or a grid"),
        ({"arms": {"a b": {}}}, "arm 'a b'"),
        ({"arms": {"slow": {"network.widht": 3}}}, "arm slow: there is no field network.widht"),
        ({"arms": {"slow": {"network.width": "wide"}}}, "network.width must be of type int"),
        ({"arms": {"slow": {"training.steps": 3}}}, "training.steps is set by budget"),
        ({"common": {"training.seed": 3}}, "training.seed is set by seeds"),
        ({"grid": {"optimiser.lr": 3}}, "optimiser.lr needs a list"),
        ({"seeds": []}, "seeds is a list"),
        ({"seeds": [True]}, "seeds is a list"),
        ({"baseline": "none"}, "no arm none; there are slow, fast"),
        ({"baseline": {"optimiser.lr": 7}}, "no arm like slow"),
        ({"measures": ["beauty"]}, 'no measure "beauty"; there are nelbo'),
        ({"measures": [{"name": "nelbo", "windows": "all"}]}, r"nelbo takes windows \(as 256\)"),
        ({"measures": [{"name": "few_step", "calls": ["one"]}]}, "few_step takes calls"),
        ({"halving": {"rungs": [0.5, 0.25]}}, "rungs rise to 1"),
        ({"halving": {"keep": 0.5, "rung": 1}}, "halving is an object with keep and rungs"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        written(tmp_path, described(SHARDS, **changes))
    assert "\n" not in str(caught.value)
    assert "study.json" in str(caught.value)


def test_no_study_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match=r"study\.json: "):
        read_study(tmp_path / "study.json")


def test_halving_has_defaults(tmp_path: Path) -> None:
    assert written(tmp_path, described(SHARDS, halving={})).halving == Halving(0.5, (0.25, 0.5, 1.0))


FOLDER = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/study.json")), ids=lambda file: file.parent.name)
def test_the_studies_that_come_along_can_be_read(file: Path, base_run: Path, tmp_path: Path) -> None:
    values = json.loads(file.read_text())
    if "from" in values:
        values["from"] = str(base_run)
        values["common"] = {**values.get("common", {}), "data.shards": read_config(base_run).data.shards}
    study = written(tmp_path, values)
    assert study.name == file.parent.name
    assert study.question
