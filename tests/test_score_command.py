"""`catmaps score`: texts from files, lines, standard input and splits; each bound; a record of every text."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import words

from catmaps.cli import main
from catmaps.model import load_run
from catmaps.scores import pool
from catmaps.scoring import ScoringConfig, Text, score_texts, windows_of


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["score", *(str(arg) for arg in args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main(["score", *(str(arg) for arg in args)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def novels(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text(words(1, 60)[:40])
    files[1].write_text(words(2, 60)[:33])
    return files


def test_several_files_are_several_texts(
    capsys: pytest.CaptureFixture[str], base_run: Path, novels: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    said = answer(capsys, base_run, *novels, "--samples", 3, "--seed", 5, "--out", out, "--per-token")
    run = load_run(base_run)
    texts = [Text(str(f), windows_of(run.tokenizer.encode(f.read_text()), 16), f.read_text()) for f in novels]
    config = ScoringConfig(samples=3, seed=5)
    scores = score_texts(run, texts, config)
    expected = pool(scores, 3).as_dict()
    assert {name: said[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert (said["texts"], said["windows"], said["bytes"]) == (2, 6, 73)
    assert said["stderr_bits_per_char_texts"] > 0
    for line, score, file in zip(lines_of(out), scores, novels, strict=True):
        assert line["text"] == str(file)
        assert (line["bound"], line["steps"], line["samples_per_window"]) == ("nelbo", None, 3)
        assert line["bound_nats"] == pytest.approx(score.nats)
        assert line["bound_bits_per_byte"] == pytest.approx(line["bound_bits_per_char"])
        assert "".join(line["token_strings"]) == file.read_text()
        assert sum(line["bound_nats_per_token"]) == pytest.approx(score.nats)
        assert len(line["bound_nats_per_token"]) == line["tokens"]


def test_each_line_is_a_text(capsys: pytest.CaptureFixture[str], base_run: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the cat sat\n\n  \non a mat and saw two red fish\n\u00e9\n")
    said = answer(capsys, base_run, tmp_path / "lines.txt", "--lines", "--out", tmp_path / "o.jsonl", "--samples", 2)
    lines = lines_of(tmp_path / "o.jsonl")
    assert [line["text"].rpartition(":")[2] for line in lines] == ["1", "4", "5"]
    assert [line["windows"] for line in lines[:2]] == [1, 2]
    assert said["texts"] == 3
    assert "token_strings" not in lines[0]
    assert main(["score", str(base_run), str(tmp_path / "lines.txt"), "--lines", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("bits/char (upper bound)") == 4  # three texts and the whole
    assert "over texts" in out


def test_standard_input_is_a_file(
    capsys: pytest.CaptureFixture[str], base_run: Path, novels: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Input:
        buffer = io.BytesIO(novels[0].read_bytes())

    expected = answer(capsys, base_run, novels[0], "--samples", 2)
    monkeypatch.setattr(sys, "stdin", Input)
    said = answer(capsys, base_run, "-", "--samples", 2)
    assert said["text"] == "-"
    assert said["nelbo_nats"] == expected["nelbo_nats"]


def test_other_bounds(capsys: pytest.CaptureFixture[str], base_run: Path, novels: list[Path]) -> None:
    tight = answer(capsys, base_run, novels[0])
    loose = answer(capsys, base_run, novels[0], "--bound", "cross-entropy")
    few = answer(capsys, base_run, novels[0], "--bound", "finite-step", "--steps", 2)
    best = answer(capsys, base_run, novels[0], "--bound", "finite-step", "--steps", 2, "--grid", "best")
    assert tight["nelbo_nats"] < loose["cross_entropy_bound_nats"]
    assert "nelbo_nats" not in loose
    assert "nelbo_nats" not in few
    assert few["finite_step_bound_perplexity_per_token"] > 1
    assert (few["steps"], few["samples_per_window"]) == (2, 8)
    assert len(best["times"]) == 3
    assert main(["score", str(base_run), str(novels[0]), "--bound", "finite-step", "--steps", "2"]) == 0
    assert capsys.readouterr().out.startswith("finite-step bound, 2 calls: ")


def test_context_is_clean_text_before_a_window(
    capsys: pytest.CaptureFixture[str], base_run: Path, novels: list[Path]
) -> None:
    alone = answer(capsys, base_run, novels[0])
    given = answer(capsys, base_run, novels[0], "--context", 8)
    assert (alone["windows"], given["windows"]) == (3, 4)
    assert given["tokens"] == alone["tokens"] == 40
    assert given["nelbo_nats"] != alone["nelbo_nats"]


def test_a_split_writes_a_line_per_window(capsys: pytest.CaptureFixture[str], base_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    said = answer(capsys, base_run, "--split", "test", "--windows", 3, "--samples", 2, "--out", out)
    assert [line["text"] for line in lines_of(out)] == ["test:1", "test:2", "test:3"]
    assert sum(line["bound_nats"] for line in lines_of(out)) == pytest.approx(said["nelbo_nats"])


def test_a_text_that_the_tokenizer_changes_is_told(
    capsys: pytest.CaptureFixture[str], base_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "loud.txt").write_text("THE CAT")
    assert main(["score", str(base_run), str(tmp_path / "loud.txt")]) == 0
    assert "normalised 1 of 1 texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words_", "message"),
    [
        (["--bound", "finite-step"], "--steps N belongs to --bound finite-step"),
        (["--steps", "4"], "--steps N belongs to --bound finite-step"),
        (["--grid", "best"], "--grid belongs to --bound finite-step"),
        (["--per-token"], "--per-token goes into --out"),
        (["--context", "16"], "--context must be at least 0 and below the run's length 16"),
        (["--t-max", "1"], "--t-max inside"),
        (["--out", "nowhere/o.jsonl"], "cannot write nowhere/o.jsonl: no folder nowhere"),
        (["--out", "."], "cannot write .: it is a folder"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    base_run: Path,
    novels: list[Path],
    words_: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, base_run, novels[0], *words_)


def test_a_split_has_windows_of_its_own(capsys: pytest.CaptureFixture[str], base_run: Path) -> None:
    assert "belong to files" in refused(capsys, base_run, "--split", "test", "--context", 4)
    assert "belong to files" in refused(capsys, base_run, "--split", "test", "--lines")
