"""Every kind of damage is one clear error that names the file and what to do, and nothing is overwritten."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import began, distilled, make_shards, tiny

from catmaps.errors import UserError
from catmaps.model import load_run
from catmaps.training.train import restart, start, train

pytest.importorskip("olmo_core")
Damage = Callable[[Path], None]
LATEST = "run/checkpoints/step4"


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def removed(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def unknown_field(file: Path) -> None:
    values = json.loads(file.read_text())
    values["network"]["depth"] = 3
    file.write_text(json.dumps(values))


def first_line(file: Path) -> None:
    file.write_text(file.read_text()[1:])


def wrong_kind(file: Path) -> None:
    file.write_text("[1, 2]")


WEIGHTS = f"{LATEST}/model_and_optim/__0_0.distcp"
RESUMED: list[tuple[str, Damage, str]] = [
    (WEIGHTS, truncated, r"__0_0\.distcp has \d+ bytes instead of \d+; copy .*step4 again, or remove it: .* step 2"),
    (WEIGHTS, flipped, r"__0_0\.distcp is damaged \(its hash"),
    (WEIGHTS, removed, r"__0_0\.distcp is missing; copy"),
    (f"{LATEST}/model_and_optim/.metadata", truncated, r"step4/model_and_optim/\.metadata has"),
    (f"{LATEST}/train/rank0.pt", flipped, r"step4/train/rank0\.pt is damaged"),
    (f"{LATEST}/sums.json", truncated, r"step4/sums\.json is damaged; copy"),
    ("run/config.json", truncated, r"run/config\.json is not a configuration"),
    ("run/config.json", unknown_field, r"run/config\.json .*unknown field network\.depth"),
    ("run/config.json", removed, r"is not a run \(no config\.json\)"),
    ("run/teacher.safetensors", truncated, r"run/teacher\.safetensors is damaged .*copy it again"),
    ("run/teacher.safetensors", removed, r"run/teacher\.safetensors is missing"),
    ("run/start_clock.safetensors", emptied, r"run/start_clock\.safetensors is damaged"),
    ("run/metrics.jsonl", first_line, r"run/metrics\.jsonl is damaged in line 1; remove"),
    ("shards/manifest.json", truncated, r"shards.*manifest"),
    ("shards/train-00000.bin", truncated, r"shards/train-00000\.bin"),
    ("shards/train-00000.bin", flipped, r"shards/train-00000\.bin is damaged \(its sha256"),
    ("shards/valid-00000.bin", flipped, r"shards/valid-00000\.bin is damaged \(its sha256"),
    ("run/manifest.json", removed, r"run/manifest\.json is missing: copy the run's folder again"),
    ("shards/train-00000.bin", removed, r"shards/train-00000\.bin is missing"),
]
STARTED: list[tuple[str, Damage, str]] = [
    ("shards/train-00000.bin", flipped, r"shards/train-00000\.bin"),
    ("shards/tokenizer.json", truncated, r"shards/tokenizer\.json"),
    ("shards/manifest.json", wrong_kind, r"shards.*manifest"),
    ("base/model.safetensors", truncated, r"base/model\.safetensors is damaged"),
    ("base/clock.safetensors", removed, r"base/clock\.safetensors is missing"),
    ("base/config.json", wrong_kind, r"base/config\.json is not a configuration"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, base_run: Path) -> Path:
    """Shards, a base, and a distillation of it that was stopped in step 4 with two checkpoints."""
    folder = tmp_path_factory.mktemp("sound")
    shards = make_shards(folder / "shards")
    shutil.copytree(base_run, folder / "base")
    config = distilled(folder / "base", tiny(shards, steps=6))
    run = began(replace(config, training=replace(config.training, save_every=2)), folder / "run")
    train(run, stop_after=4)
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Iterator[Path]:
    """`sound`, to be damaged: it is put back after the test, for data are known by where they are."""
    shutil.copytree(sound, tmp_path / "kept")
    yield sound
    shutil.rmtree(sound)
    shutil.copytree(tmp_path / "kept", sound)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("file", "damage", "message"), RESUMED)
def test_a_damaged_run_is_not_gone_on_with(file: str, damage: Damage, message: str, place: Path) -> None:
    damage(place / file)
    before = contents(place)
    with pytest.raises(UserError, match=message) as raised:
        train(place / "run")
    assert "\n" not in str(raised.value)
    events = "run/events.jsonl"  # that it was resumed, before its metrics are found to be damaged
    assert {**contents(place), events: b""} == {**before, events: b""}


@pytest.mark.parametrize(("file", "damage", "message"), STARTED)
def test_nothing_is_begun_on_damaged_data(file: str, damage: Damage, message: str, place: Path) -> None:
    damage(place / file)
    before, config = contents(place), distilled(place / "base", tiny(place / "shards"))
    for begin in (start, restart):
        with pytest.raises(UserError, match=message) as raised:
            begin(config, place / "new")
        assert "\n" not in str(raised.value)
    assert contents(place) == before


@pytest.mark.parametrize("file", ["model.safetensors", "clock.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_run_is_not_loaded(file: str, place: Path) -> None:
    truncated(place / "run" / file)
    before = contents(place)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        load_run(place / "run")
    assert contents(place) == before


def test_the_sound_run_is_gone_on_with(place: Path) -> None:
    assert train(place / "run").complete
