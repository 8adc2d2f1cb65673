"""The command line: mistakes cost one line and status 2; --json is one object on stdout; everything else works."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import make_shards, rows, words

from catmaps import __version__
from catmaps.cli import COMMANDS, main
from catmaps.model import MODEL
from catmaps.scoring import cut, score
from catmaps.text.tokenizers import ByteTokenizer

TINY = {
    "data.length": 16,
    "network.width": 16,
    "network.blocks": 1,
    "training.steps": 2,
    "training.batch": 8,
    "training.precision": "fp32",
    "training.compile": False,
    "training.threads": 1,
    "training.evaluate-every": 0,
}


def flags(**changes: Any) -> list[str]:
    values = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def call(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What a command says with --json: strictly one JSON object, on one line."""
    capsys.readouterr()
    assert call(*words, "--json") == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    assert said.err  # what people read
    assert "NaN" not in said.out
    return json.loads(said.out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on stderr with which a mistake is answered."""
    capsys.readouterr()
    assert call(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("catmaps: ")
    assert said.err.count("\n") == 1
    assert said.err.endswith("\n")
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["fly"],
            "no command fly; there are train, distill, sample, score, report",
        ),
        (["train"], "which preset?"),
        (["train", "huge"], "no preset huge; there are tiny, small"),
        (["train", "tiny", "--network.wdth", "3"], "--network.wdth"),
        (["train", "tiny", "--network.width", "wide"], "--network.width"),
        (["train", "tiny", "--network.width", "7"], "width 7 must be heads"),
        (["train", "tiny", "--training.steps", "0"], "training.steps must be at least 1, not 0"),
        (["train", "tiny", "--training.compile", "maybe"], "--training.compile"),
        (["train", "tiny", "--optimiser.name", "sgd"], "--optimiser.name"),
        (["train", "tiny", "--objective.clean", "2"], "objective.clean must lie in [0, 1]"),
        (["train", "tiny", "--data.length", "0"], "data.length must be at least 1"),
        (["train", "tiny", "--data.shards", "nowhere"], "nowhere holds no token shards"),
        (["train", "tiny", "extra"], "extra"),
        (["train", "--resume"], "--resume"),
        (["train", "--resume", "nowhere"], "run nowhere does not exist"),
        (["train", "--resume", "."], "is not a run (no config.json)"),
        (["train", "--resume", ".", "--training.steps", "3"], "--training.steps"),
        (["distill"], "which base? `catmaps distill --from RUN`"),
        (["distill", "--from"], "--from needs a value"),
        (["distill", "--from", "nowhere"], "run nowhere does not exist"),
        (["distill", "--from", "nowhere", "--preset", "slow"], "no distillation preset slow"),
        (["sample", "nowhere"], "run nowhere does not exist"),
        (["sample", "nowhere", "--sampler", "magic"], "--sampler"),
        (["sample", "nowhere", "--num", "0"], "--num and --length must be at least 1"),
        (["sample", "nowhere", "--num", "two"], "--num"),
        (["score", "nowhere"], "score one thing: a FILE, or --split"),
        (["score", "nowhere", "file", "--split", "test"], "score one thing"),
        (["score", "nowhere", "file"], "run nowhere does not exist"),
        (["score", "nowhere", "--split", "dev"], "--split"),
        (["report", "nowhere"], "run nowhere does not exist"),
        (["report", "nowhere", "--calls", "0"], "--calls, --num and --texts must be at least 1"),
        (["info", "nowhere"], "run nowhere does not exist"),
        (["info"], "Folder of a run"),
        (["data"], "which data command?"),
        (["data", "make"], "which data command?"),
        (["data", "build", "nowhere", "--out", "shards"], "nowhere does not exist"),
        (["data", "build", ".", "--out", "shards"], "holds no file to read"),
        (["data", "build", "nowhere"], "--out"),
        (["data", "build", ".", "--out", "shards", "--tasks", "2"], "--executor local or slurm"),
        (["data", "build", ".", "--out", "shards", "--executor", "local", "--workers", "0"], "--workers must be"),
        (["data", "task", "nowhere", "--task", "0"], "nowhere holds no planned build"),
        (["data", "join", "nowhere", "--out", "shards"], "nowhere holds no planned build"),
    ],
)
def test_mistakes_cost_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "RUN", "--steps", "0"], "steps and batch must be at least 1"),
        (["sample", "RUN", "--temperature", "0"], "temperature above 0"),
        (["sample", "RUN", "--batch", "0"], "steps and batch must be at least 1"),
        (["score", "RUN", "TEXT", "--samples", "1"], "--samples must be at least 2, not 1"),
        (["score", "RUN", "missing.txt"], "cannot read missing.txt: No such file"),
        (["score", "RUN", "."], "cannot read .: Is a directory; name its files, as *.txt"),
        (["score", "RUN", "LATIN"], "is not UTF-8 text (byte 3); convert it first"),
        (["score", "RUN", "EMPTY"], "empty.txt: empty, or without a character of text8"),
        (["score", "RUN", "--split", "test", "--windows", "0"], "--windows must be at least 1"),
        (["train", "tiny", "--out", "RUN"], "exists and is not empty; continue it with --resume"),
        (["distill", "--from", "RUN", "--network.width", "8"], "network.width is 16 in"),
        (["distill", "--from", "RUN", "--data.shards", "BYTES"], "the vocabulary of"),
        (["distill", "--from", "UNSAVED"], "model.safetensors is missing"),
        (["sample", "UNSAVED"], "model.safetensors is missing"),
        (["data", "build", "TEXT", "--out", "RUN"], "exists"),
    ],
)
def test_mistakes_about_a_run_cost_one_line(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base_run: Path,
    shards: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat")
    (tmp_path / "latin.txt").write_bytes("été".encode()[:3] + b"\xe9")
    (tmp_path / "empty.txt").write_text("")
    unsaved = shutil.copytree(base_run, tmp_path / "unsaved", ignore=shutil.ignore_patterns(MODEL, "checkpoints"))
    names = {
        "RUN": base_run,
        "TEXT": tmp_path / "text.txt",
        "LATIN": tmp_path / "latin.txt",
        "EMPTY": tmp_path / "empty.txt",
        "UNSAVED": unsaved,
        "BYTES": make_shards(tmp_path / "bytes", ByteTokenizer()) if "BYTES" in words else "",
    }
    before = {file.name for file in tmp_path.iterdir()}
    said = refused(capsys, *[names.get(word, word) for word in words])
    assert message in said
    assert {file.name for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("command", [*COMMANDS, "data build", "train tiny"])
def test_help_has_status_0(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command.split(), option) == 0
    said = capsys.readouterr()
    assert "usage: catmaps" in said.out
    assert "--json" in said.out
    assert said.err == ""


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert call(*arguments) == 0
        said = capsys.readouterr()
        assert all(f"\n  {name} " in said.out for name in COMMANDS)
        assert said.err == ""
    assert call("--version") == 0
    assert capsys.readouterr().out == f"catmaps {__version__}\n"


def test_sample(capsys: pytest.CaptureFixture[str], map_run: Path) -> None:
    said = answer(capsys, "sample", map_run, "--num", 3, "--steps", 2, "--seed", 7)
    assert (said["sampler"], said["steps"], said["network_calls"], said["seed"]) == ("renoise", 2, 2, 7)
    assert [len(text) for text in said["texts"]] == [16] * 3
    again = answer(capsys, "sample", map_run, "--num", 3, "--steps", 2, "--seed", 7)
    assert again["texts"] == said["texts"]
    louder = answer(capsys, "sample", map_run, "--num", 3, "--steps", 2, "--seed", 7, "--noise", 1)
    assert (said["noise"], louder["noise"]) == (0.5, 1.0)
    assert louder["texts"] != said["texts"]
    assert "for the sampler renoise, not flow_map" in refused(
        capsys, "sample", map_run, "--noise", 0.5, "--sampler", "flow_map"
    )
    assert "noise is a variance, at least 0, not -1" in refused(capsys, "sample", map_run, "--noise", -1)
    assert call("sample", map_run, "--num", 2, "--steps", 2, "--show-trajectory") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["t", "t", "[1]", "[2]"]
    assert out[1].startswith("t = 1.000")


def test_sample_looks_at_endpoints_only_where_they_are_shown(monkeypatch: pytest.MonkeyPatch, map_run: Path) -> None:
    from catmaps.flow import samplers

    seen, carry = [], samplers._carry
    monkeypatch.setattr(samplers, "_carry", lambda *given: (seen.append(given[-1] is not None), carry(*given))[1])
    assert call("sample", map_run, "--num", 2) == 0
    assert call("sample", map_run, "--num", 2, "--show-trajectory") == 0
    assert seen == [False, True]


def test_score_of_a_file_is_that_of_its_windows(
    capsys: pytest.CaptureFixture[str], base_run: Path, tmp_path: Path
) -> None:
    from catmaps.model import load_run

    run, text, file = load_run(base_run), words(5, 30), tmp_path / "novel.txt"
    file.write_text(text)
    said = answer(capsys, "score", base_run, file, "--samples", 3, "--seed", 2)
    expected = score(run, *cut(run, text), num_samples=3, seed=2).as_dict()
    assert math.isnan(expected.pop("stderr_bits_per_char_texts"))  # there is one text
    assert {name: said[name] for name in expected} == pytest.approx(expected)
    assert said["characters"] == len(text)
    assert said["text"] == str(file)
    assert call("score", base_run, file) == 0
    out = capsys.readouterr().out
    assert "bits/char (upper bound), s.e." in out
    assert f"{len(text)} characters" in out


def test_score_of_one_window_has_no_spread(capsys: pytest.CaptureFixture[str], base_run: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("cat")
    said = answer(capsys, "score", base_run, tmp_path / "short.txt")
    assert said["stderr_bits_per_char_windows"] is None
    assert said["stderr_bits_per_char_monte_carlo"] > 0


def test_score_of_a_split(capsys: pytest.CaptureFixture[str], base_run: Path) -> None:
    said = answer(capsys, "score", base_run, "--split", "test", "--windows", 5, "--samples", 2)
    assert (said["windows"], said["tokens"], said["text"]) == (5, 80, "test")
    every = answer(capsys, "score", base_run, "--split", "test", "--windows", 10_000, "--samples", 2)
    assert every["windows"] == 45


def test_info_of_a_run(capsys: pytest.CaptureFixture[str], base_run: Path, map_run: Path) -> None:
    base, map_ = answer(capsys, "info", base_run), answer(capsys, "info", map_run)
    assert (base["kind"], map_["kind"]) == ("base flow", "flow map")
    assert (base["step"], base["vocabulary"], base["tokenizer"]) == (20, 27, "text8")
    assert base["validation"]["step"] == 20
    assert map_["validation"] is None
    assert base["parameters_vocabulary"] == 2 * 16 * 27
    assert base["config"]["training"]["steps"] == 20
    assert call("info", base_run) == 0
    assert "parameters in the body" in capsys.readouterr().out


def test_from_text_to_samples(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for i in range(40):
        Path(f"texts/{i}.txt").write_text(words(i, 50))
    built = answer(capsys, "data", "build", "texts", "--out", "shards", "--valid", "0.1")
    assert (built["shards"], built["tokenizer"]) == ("shards", "text8")
    assert sum(split["documents"] for split in built["splits"].values()) == 40

    trained = answer(capsys, "train", "tiny", "--data.shards", "shards", "--out", "base", *flags())
    assert trained == {"run": "base", "step": 2, "steps": 2, "complete": True}
    distilled = answer(capsys, "distill", "--from", "base", "--preset", "quickstart", "--training.steps", 3)
    assert distilled["run"] == "base-map"
    assert distilled["step"] == 3
    config = answer(capsys, "info", "base-map")["config"]
    assert (config["preset"], config["base"], config["training"]["batch"]) == ("quickstart", "base", 8)
    assert config["objective"]["off_diagonal"] == 0.5

    assert call("train", "--resume", "base") == 0  # complete already
    assert capsys.readouterr().out == "base trained: base (2 steps). Next: catmaps sample base\n"
    assert [row["step"] for row in rows(Path("base"))] == [1, 2]
    assert call("train", "tiny", "--out", "again", "--data.shards", "shards", *flags()) == 0
    assert (Path("again") / MODEL).read_bytes() == (Path("base") / MODEL).read_bytes()


def test_only_the_first_process_speaks(
    capsys: pytest.CaptureFixture[str], map_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert call("info", map_run, "--json") == 0
    assert capsys.readouterr().out == ""


def test_the_embedded_corpus_trains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = answer(capsys, "train", "tiny", "--out", tmp_path / "run", *flags())
    assert said["complete"]


def test_a_reader_that_leaves_is_no_error(map_run: Path) -> None:
    code = "import sys; from catmaps.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "info", str(map_run)]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, "")
