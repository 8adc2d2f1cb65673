"""`catmaps judge` on files of every kind, under a random GPT-2."""

import json
from pathlib import Path

import pytest
from tiny_judges import TEXT, make_judge

from catmaps.cli import main
from catmaps.commands.judge import read_texts
from catmaps.errors import UserError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("judge") / "gpt2")


def call(*arguments: object) -> int:
    return main(["judge", *map(str, arguments)])


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "own": "x"}\n\n{"text": "two", "own": "y"}\n')
    (tmp_path / "a.json").write_text('{"texts": ["one", "two"]}')
    assert read_texts(tmp_path / "a.txt", False, "text") == ["one\n\ntwo\n"]
    assert read_texts(tmp_path / "a.txt", True, "text") == ["one", "two"]
    assert read_texts(tmp_path / "a.jsonl", False, "own") == ["x", "y"]
    assert read_texts(tmp_path / "a.json", False, "text") == ["one", "two"]
    (tmp_path / "b.json").write_text('{"texts": [1]}')
    (tmp_path / "c.jsonl").write_text("[]\n")
    for name in ("b.json", "c.jsonl"):
        with pytest.raises(UserError, match="--text-key"):
            read_texts(tmp_path / name, False, "text")


def test_figures_and_reference(judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, real = tmp_path / "own.jsonl", tmp_path / "real.txt"
    own.write_text("".join(json.dumps({"text": "the cat " * 11}) + "\n" for _ in range(3)))
    real.write_text(f"{TEXT}\n{TEXT[8:]}\n{TEXT[4:]}\n")
    assert call(own, "--judge", judge, "--reference", real, "--lines", "--json") == 0
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    assert said["texts"]["num_texts"] == said["reference"]["num_texts"] == 3
    assert said["texts"]["gen_ppl"] > 1
    assert said["texts"]["token_entropy"] < said["reference"]["token_entropy"]
    assert any("repeated words" in reason for reason in said["flattered"])
    assert "which flatters these figures" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "judge what?"),
        (["missing.txt"], "cannot read missing.txt"),
        (["here.txt"], "run `catmaps judge --fetch` once"),
        (["here.txt", "--judge", "."], "cannot load the judge ."),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text(TEXT)
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
