"""Models of the package, by name: taken where no run is named, never written to, never in a folder's way."""

from pathlib import Path

import pytest
import torch
from made_runs import config_of, make_run

from catmaps import models
from catmaps.cli import main
from catmaps.hub.export import export_run
from catmaps.model import MODEL, load_run, read_tensors
from catmaps.network.denoiser import NetworkConfig

BASES = {"words": True, "words-base": False}


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two small models, and an empty folder to work in."""
    folder = tmp_path / "package"
    for name, a_map in BASES.items():
        export_run(load_run(make_run(tmp_path / name, config_of(a_map=a_map))), folder / name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(models, "FOLDER", folder)
    return folder


def test_sample_and_score_need_no_run(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("the cat sat on the mat")
    said = []
    for run in (["words"], [], [str(packaged / "words")]):
        assert main(["sample", *run, "--num", "2", "--seed", "3"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != ""
    for run in (["words-base"], []):
        assert main(["score", *run, "text.txt", "--samples", "2"]) == 0
        said.append(capsys.readouterr().out)
    assert said[3] == said[4]
    assert main(["score", "text.txt", "text.txt", "--samples", "2"]) == 0
    assert "4 windows" in capsys.readouterr().out


def test_a_folder_of_that_name_goes_before(packaged: Path) -> None:
    make_run(Path("words"), config_of(a_map=False))
    assert load_run(models.DEFAULT).path == Path("words")
    assert load_run(models.BASE).path == packaged / "words-base"
    assert models.located(Path("nowhere")) == Path("nowhere")
    assert models.located(Path("sub/words")) == Path("sub/words")


def test_it_is_never_resumed(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "words"]) == 2
    assert "words comes with the package and has no checkpoints" in capsys.readouterr().err


def test_an_unknown_name_is_told_those_that_there_are(packaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "nowhere"]) == 2
    assert "with the package come words, words-base" in capsys.readouterr().err


@pytest.mark.parametrize("half", [False, True])
def test_a_run_is_passed_on_whole_or_with_matrices_in_half_precision(tmp_path: Path, half: bool) -> None:
    run = load_run(
        make_run(tmp_path / "run", config_of(network=NetworkConfig(width=32, blocks=1, heads=2, conditioning=32)))
    )
    export_run(run, tmp_path / "out", half=half)
    other = load_run(tmp_path / "out")
    stored = read_tensors(tmp_path / "out" / MODEL)
    assert other.network.state_dict().keys() == stored.keys()
    assert any(t.dtype == torch.bfloat16 for t in stored.values()) is half
    for name, own in run.network.state_dict().items():
        kept = stored[name].dtype != torch.bfloat16
        assert other.network.state_dict()[name].dtype == own.dtype
        torch.testing.assert_close(stored[name].to(own.dtype), own, rtol=0 if kept else 2**-8, atol=0)
    assert (tmp_path / "out" / "README.md").is_file()


def test_models_that_come_along_are_whole() -> None:
    """Every one loads, is small, names no path, and has its card and its training log."""
    for name in models.names():
        folder = models.FOLDER / name
        run = load_run(folder)
        assert (folder / MODEL).stat().st_size < 25e6
        assert sum(run.network.num_parameters()) < 12e6
        assert all((folder / file).is_file() for file in ("README.md", "metrics.jsonl", "manifest.json"))
        assert run.config.data.shards is None
        assert "/" not in (run.config.base or "")
    assert {str(models.DEFAULT), str(models.BASE)} <= set(models.names())
