"""Trackers get the rows of metrics.jsonl, as read back from the files and stores of TensorBoard, wandb and Trackio."""

import importlib.util
import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from processes import run
from tiny_runs import Job, began, tiny, train_on_record

from catmaps.config import Config, TrackingConfig, from_json, to_json
from catmaps.errors import UserError
from catmaps.model import EVENTS, METRICS
from catmaps.training import tracking
from catmaps.training.train import start, train

Name = Literal["tensorboard", "wandb", "trackio"]
Points = set[tuple[int, str, float]]


def tracked(shards: Path, to: Name) -> Config:
    config = tiny(shards, steps=6)
    training = replace(config.training, evaluate_every=3, save_every=2)
    return replace(config, tracking=TrackingConfig(to=to, project="tests"), training=training)


def on_record(folder: Path) -> Points:
    """(step, name, value) of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return points((int(row["step"]), row) for row in lines)


def points(rows: Any) -> Points:
    return {(step, name, rounded(value)) for step, row in rows for name, value in row.items() if name != "step"}


def rounded(value: float) -> float:
    """To what fp32, in which TensorBoard keeps values, can tell apart."""
    return float(f"{value:.5g}")


def event_files(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert any("config" in tag for tag in events.Tags()["tensors"])
    names = events.Tags()["scalars"]
    return {(event.step, name, rounded(event.value)) for name in names for event in events.Scalars(name)}


def wandb_records(file: Path) -> list[Any]:
    """The records of a .wandb file, a log as LevelDB's: blocks of 32 KiB, each piece behind crc, length and kind."""
    Record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is padding
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(whole))
            whole = b""
    return records


def test_tensorboard_has_the_rows_of_a_run_that_was_stopped_and_resumed(tmp_path: Path, shards: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = began(tracked(shards, "tensorboard"), tmp_path / "run")
    train(folder, stop_after=4)
    assert train(folder).complete
    assert event_files(folder) == on_record(folder)
    assert {step for step, name, _ in event_files(folder) if name == "loss"} == set(range(1, 7))


def test_steps_that_are_done_again_replace_the_old_ones_in_tensorboard(tmp_path: Path, shards: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tracked(shards, "tensorboard")
    first = tracking.TensorBoard(config, tmp_path, 0)
    first.write(4, {"loss": 1.0})
    first.write(5, {"loss": 2.0})
    again = tracking.TensorBoard(config, tmp_path, 4)
    first.close(True)
    again.write(5, {"loss": 3.0})
    again.close(False)
    assert event_files(tmp_path) == {(4, "loss", 1.0), (5, "loss", 3.0)}


def test_of_two_processes_one_writes(tmp_path: Path, shards: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = began(tracked(shards, "tensorboard"), tmp_path / "run")
    run(train_on_record, 2, Job(folder))
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert event_files(folder) == on_record(folder)


def test_wandb_offline(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = began(tracked(shards, "wandb"), tmp_path / "run")
    train(folder, stop_after=4)
    assert train(folder).complete
    lives = [wandb_records(file) for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]
    assert len(lives) == 2
    runs = [record.run for life in lives for record in life if record.HasField("run")]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        (tracking.identity(folder), "tests", "run")
    }
    history = [record.history for life in lives for record in life if record.HasField("history")]
    items = [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in row.item} for row in history]
    own = [({name: value for name, value in row.items() if not name.startswith("_")}, row["step"]) for row in items]
    assert points((step, row) for row, step in own) == on_record(folder)


def test_trackio_on_this_machine(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is loaded, which is here
    folder = began(tracked(shards, "trackio"), tmp_path / "run")
    train(folder, stop_after=4)
    assert train(folder).complete
    with sqlite3.connect(tmp_path / "trackio" / "tests.db") as store:
        rows = store.execute("select step, metrics, run_name, run_id from metrics").fetchall()
    store.close()
    assert points((step, json.loads(row)) for step, row, _, _ in rows) == on_record(folder)
    assert {name for _, _, name, _ in rows} == {f"run-{tracking.identity(folder)}"}
    assert len({which for *_, which in rows}) == 1
    assert importlib.import_module("trackio.context_vars").current_run.get() is None  # else it prints at the very end


@pytest.mark.parametrize("to", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_told_before_anything_is_made(
    to: Name, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"pip install {to}"):
        start(tracked(shards, to), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Failing:
    """A tracker that fails at the third row, or at once."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        self.rows = 0
        if config.tracking.project == "at once":
            raise OSError("no way\nout")

    def write(self, step: int, row: dict[str, float | int]) -> None:
        self.rows += 1
        if self.rows == 3:
            raise OSError("no way\nout")

    def close(self, failed: bool) -> None:
        raise AssertionError("closed after it failed")


@pytest.mark.parametrize("project", ["later", "at once"])
def test_training_goes_on_without_a_tracker_that_fails(
    project: str, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Failing)
    monkeypatch.setattr(tracking, "require", lambda _: None)
    config = replace(tracked(shards, "tensorboard"), tracking=TrackingConfig(to="tensorboard", project=project))
    folder = began(config, tmp_path / "run")
    assert train(folder).complete
    told = [line for line in capsys.readouterr().err.splitlines() if "tracking by tensorboard ended" in line]
    assert len(told) == 1
    assert told[0].endswith("OSError: no way out")
    events = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    assert [event["error"] for event in events if event["event"] == "tracking ended"] == ["OSError: no way out"]
    assert {step for step, name, _ in on_record(folder) if name == "loss"} == set(range(1, 7))


def test_a_tracker_hears_whether_training_failed(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bool] = []

    class Listening(Failing):
        def write(self, step: int, row: dict[str, float | int]) -> None:
            if step == 2:
                raise KeyboardInterrupt  # not a fault of the tracker: it ends the training

        def close(self, failed: bool) -> None:
            heard.append(failed)

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Listening)
    monkeypatch.setattr(tracking, "require", lambda _: None)
    folder = began(tracked(shards, "tensorboard"), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(folder)
    assert heard == [True]


def test_files_of_earlier_versions_track_nothing() -> None:
    values = json.loads(to_json(Config()))
    del values["tracking"]
    assert from_json(json.dumps(values), "config.json").tracking == TrackingConfig()
