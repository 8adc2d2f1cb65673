"""Frontiers: figures at equal entropy by hand, rows that are kept, and the command on a run of seconds."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import tiny, trained, words

from catmaps.cli import main
from catmaps.errors import UserError
from catmaps.evaluation import frontier as module
from catmaps.evaluation.frontier import Setting, Task, Texts, control_tasks, trace
from catmaps.evaluation.frontier_rows import FrontierRow, key_of, name_of, read_rows, write_rows
from catmaps.evaluation.judge import Judge, JudgeConfig
from catmaps.evaluation.matched import crossing, curves, matched
from catmaps.evaluation.quality import HELDOUT, draw_chunks
from catmaps.text.build import build_shards
from catmaps.text.corpus import Document
from catmaps.text.metrics import Mean
from catmaps.text.tokenizers import Text8Tokenizer


def row(temperature: float | None, entropy: float, bits: float, **changes: Any) -> FrontierRow:
    values: dict[str, Any] = {name: 0.1 for name, kind in FrontierRow.__annotations__.items() if kind is float}
    values |= {"series": "map", "weights": "" if temperature is None else "abc", "sampler": "flow_map", "steps": 4}
    values |= {"num": 10, "num_texts": 2, "seed": 0, "corpus": "c", "judge": "", "calls": 4}
    values |= {"temperature": temperature, "token_entropy": entropy, "forward_bits": bits}
    return FrontierRow(**(values | changes))


def test_quality_at_an_entropy_by_hand() -> None:
    rows = [row(1.0, 5.0, 3.0), row(0.5, 4.0, 1.0), row(0.8, 4.5, 2.0), row(None, 4.6, 9.0)]
    (one,) = matched(rows, Mean(4.6, 0.05))
    assert one.temperature == pytest.approx(0.84)
    assert one.forward is not None
    assert one.forward.mean == pytest.approx(2.2)
    slope = 2.0  # bits per nat; every standard error of the rows is 0.1
    assert one.forward.stderr == pytest.approx(math.hypot(0.1, slope * 0.1, slope * 0.05))
    assert one.judge is None
    assert (one.series, one.steps, one.calls, one.reached) == ("map", 4, 4, (4.0, 5.0))
    assert str(one).startswith("map, 4 steps: forward 2.200 ± 0.2")


@pytest.mark.parametrize(("target", "side", "other"), [(3.9, "above", "lower"), (5.1, "below", "higher")])
def test_a_curve_is_never_extrapolated(target: float, side: str, other: str) -> None:
    (one,) = matched([row(1.0, 5.0, 3.0), row(0.5, 4.0, 1.0)], Mean(target, 0.0))
    assert one.temperature is None
    assert one.forward is None
    assert f"it stays {side}: 4.000 to 5.000); try {other} temperatures" in str(one)
    assert one.as_dict()["forward_bits"] is None
    (point,) = matched([row(1.0, 5.0, 3.0)], Mean(target, 0.0))
    assert str(point).endswith("(it is a point, at 5.000)")


def test_of_several_crossings_the_one_nearest_to_temperature_1() -> None:
    curve = [row(0.3, 4.0, 1.0), row(0.5, 5.0, 2.0), row(0.9, 4.0, 3.0), row(1.3, 5.0, 4.0)]
    place = crossing(curve, 4.5)
    assert place is not None
    assert place.temperature == pytest.approx(1.1)
    assert crossing(curve[:1], 4.0) is None


def test_curves_are_of_one_run_and_number_of_steps() -> None:
    rows = [row(1.0, 5.0, 3.0), row(0.5, 4.0, 1.0), row(0.7, 5.0, 3.0, steps=8), row(0.7, 5.0, 3.0, series="base")]
    drawn = curves([*rows, row(None, 4.0, 2.0)])
    assert [name for name, _ in drawn.items()] == [("map", 4), ("map", 8), ("base", 4)]
    assert [one.temperature for one in drawn["map", 4]] == [0.5, 1.0]


def test_judge_bits_are_interpolated_too() -> None:
    low, high = row(0.5, 4.0, 1.0, judge_bits=2.0, judge_bits_stderr=0.1), row(1.0, 5.0, 3.0, judge_bits=4.0)
    (one,) = matched([low, high], Mean(4.5, 0.0))
    assert one.judge is not None
    assert one.judge.mean == 3.0
    (one,) = matched([low, replace(high, judge_bits=None)], Mean(4.5, 0.0))
    assert one.judge is None


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [row(0.1 + 0.2, 1 / 3, 2.0, flattered="a, b; c"), row(None, 4.0, 1e-20, judge_bits=2.5, sampler="")]
    file = tmp_path / "deep" / "frontier.csv"
    write_rows(file, rows)
    assert read_rows(file) == rows
    assert read_rows(tmp_path / "none.csv") == []
    assert [f.name for f in file.parent.iterdir()] == ["frontier.csv"]
    file.write_text(file.read_text().replace("flow_map,4", "flow_map,four"))
    with pytest.raises(UserError, match="damaged"):
        read_rows(file)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a frontier of this version"):
        read_rows(file)


def test_a_row_is_known_by_everything_but_its_runs_name() -> None:
    one = row(1.0, 5.0, 3.0)
    assert key_of(replace(one, series="moved", forward_bits=9.0)) == key_of(one)
    for change in (
        {"weights": "d"},
        {"temperature": 0.9},
        {"noise": 0.9},
        {"steps": 8},
        {"sampler": "heun"},
        {"batch": 8},
    ):
        assert key_of(replace(one, **change)) != key_of(one)
    for change in ({"num": 11}, {"num_texts": 3}, {"seed": 1}, {"judge": "gpt2"}, {"corpus": "d"}):
        assert key_of(replace(one, **change)) != key_of(one)
    control = row(None, 5.0, 3.0)
    assert key_of(replace(control, series="other")) != key_of(control)
    assert name_of(one) == "map, 4 steps, temperature 1"


class WordIds:
    def encode(self, text: str) -> np.ndarray:
        return np.array([len(word) * 31 + ord(word[0]) for word in text.split()], dtype=np.int64)


@pytest.fixture(scope="module")
def setting() -> Setting:
    judge = Judge.build([words(0, 4000)], [words(1, 12_000)], WordIds())
    return Setting(judge=judge, causal=None, length=64, num=24, num_texts=4, seed=3, corpus="c")


def test_controls_have_the_form_of_the_samples(setting: Setting) -> None:
    tasks = control_tasks(setting)
    names = [task.key.series for task in tasks]
    assert names == [HELDOUT, "i.i.d. letters", "trigram chain", "order-5 Markov chain", "one phrase repeated"]
    for task in tasks:
        samples, texts = task.draw()
        assert [len(text) for text in samples] == [64] * 24
        assert [len(text) for text in texts] == [1024] * 4
        assert task.draw() == (samples, texts)
    phrase = tasks[-1].draw().texts[0]
    assert phrase[:32] == phrase[32:64]
    assert not set(setting.heldout[0].samples) & set(setting.heldout[1])


def test_controls_of_bytes_have_as_many_characters(setting: Setting) -> None:
    text = "Größe und naïve Cafés über Łódź 🐟 " * 800
    judge = Judge.build([text], [text], WordIds(), JudgeConfig(alphabet=None))
    for task in control_tasks(replace(setting, judge=judge)):
        samples, texts = task.draw()
        assert {len(text) for text in samples} == {64}
        assert {len(text) for text in texts} == {1024}


def test_rows_in_the_file_are_not_drawn_again(setting: Setting, tmp_path: Path) -> None:
    drawn: list[str] = []

    def task(name: str, setting: Setting = setting) -> Task:
        def draw() -> Texts:
            drawn.append(name)
            rng = np.random.default_rng(len(name))
            heldout = setting.judge.drawn
            return Texts(draw_chunks(heldout, 64, setting.num, rng), draw_chunks(heldout, 1024, 4, rng))

        return Task(replace(setting.key(name), weights=name), 1, draw)

    file, said = tmp_path / "f.csv", []
    first = trace([task("one")], setting, file)
    both = trace([task("two"), task("one")], setting, file, report=lambda name, new: said.append(new))
    assert drawn == ["one", "two"]
    assert said == [True, False]
    assert both[1] == first[0]
    assert [kept.series for kept in read_rows(file)] == ["one", "two"]
    fewer = replace(setting, num=23)
    assert trace([task("one", fewer)], fewer, file)[0].num == 23
    assert drawn == ["one", "two", "one"]


def test_what_is_finished_survives_an_interruption(setting: Setting, tmp_path: Path) -> None:
    heldout, *_ = control_tasks(setting)

    def stopped() -> Texts:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace([heldout, heldout._replace(key=setting.key("x"), draw=stopped)], setting, tmp_path / "f.csv")
    (kept,) = read_rows(tmp_path / "f.csv")
    assert kept.series == HELDOUT
    assert kept.flattered == ""
    assert kept.divergence > 0.5


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of a few steps on a corpus with enough held-out text for a judge."""
    pytest.importorskip("olmo_core")
    folder = tmp_path_factory.mktemp("frontier")
    splits = ["train"] * 4 + ["valid"] + ["test"] * 3
    documents = [Document(str(i), "tests", str(i), words(i, 3000), split) for i, split in enumerate(splits)]
    build_shards(documents, Text8Tokenizer(), folder / "shards", progress=False)
    return trained(tiny(folder / "shards", steps=2), folder / "base")


def call(*arguments: object) -> int:
    return main(["frontier", *map(str, arguments)])


def test_command(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--out", tmp_path, "--steps", 1, 2, "--num", 12, "--texts", 2, "--json", "--temperatures", 0.5]
    assert call(run_folder, *options) == 0
    said = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "frontier.json").read_text())["rows"] == said["rows"]
    assert [(one["series"], one["steps"]) for one in said["rows"][-2:]] == [("base", 1), ("base", 2)]
    assert said["matched"][1]["forward_bits"] is None  # one temperature makes no curve
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    drawn: list[float] = []
    measure, base = module.measure, shutil.copytree(run_folder, tmp_path / "again")
    monkeypatch.setattr(module, "measure", lambda task, s: (drawn.append(task.key.temperature), measure(task, s))[1])
    assert call(run_folder, *options, 5.0, "--base", base, "--base-steps", 2) == 0
    shown = capsys.readouterr()
    assert drawn == [5.0, 5.0]  # the base has the same weights, so its rows are known
    again = json.loads(shown.out)
    assert len(again["rows"]) == len(said["rows"]) + 4  # two more of the run, two of the base
    with (tmp_path / "frontier.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(said["rows"]) + 2
    assert "At the token entropy of held-out text" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", 9], "--num must be at least 10"),
        (["--texts", 1], "--num must be at least 10, --texts 2"),
        (["--steps", 0], "all steps 1"),
        (["--temperatures", 0.0, 1.0], "--temperatures must be positive"),
        (["--judge", "smollm2"], "run `catmaps judge --fetch` once"),
    ],
)
def test_mistakes(
    arguments: list[Any], message: str, run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(run_folder, "--out", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
