"""Baselines train on the same loop: bit-equal when resumed, however they are divided, and every command takes them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from processes import run as run_processes
from tiny_runs import LENGTH, Job, began, losses, rows, saved, state, tiny, train_on_record, trained, words

from catmaps.baselines.families import FAMILIES
from catmaps.cli import main
from catmaps.config import Config, DataConfig, OptimiserConfig, TrainingConfig
from catmaps.errors import UserError
from catmaps.generation import SamplingConfig, continue_tokens, default_sampling, generate
from catmaps.model import load_run
from catmaps.network.denoiser import NetworkConfig
from catmaps.network.tokens import TokenNetwork
from catmaps.scoring import score
from catmaps.text.build import build_shards
from catmaps.text.corpus import Document
from catmaps.text.shards import sequences
from catmaps.text.tokenizers import Text8Tokenizer
from catmaps.training.sources import find_sources
from catmaps.training.train import START_LAW, train

pytest.importorskip("olmo_core")
Name = Literal["autoregressive", "masked", "uniform"]
NAMES: tuple[Name, ...] = ("autoregressive", "masked", "uniform")


def of(family: Name, shards: Path, *, steps: int = 20) -> Config:
    return replace(tiny(shards, steps=steps, optimiser="muon"), family=family)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    """One of each family, trained for 20 steps. Not to be written to."""
    folder = tmp_path_factory.mktemp("baselines")
    return {name: trained(of(name, shards), folder / name) for name in NAMES}


def test_the_table_and_the_option_agree() -> None:
    assert set(FAMILIES) == set(NAMES)


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_ten_and_ten_steps_are_twenty(family: Name, runs: dict[str, Path], tmp_path: Path, shards: Path) -> None:
    halves = began(of(family, shards), tmp_path / "halves")
    assert train(halves, stop_after=10).step == 10
    assert train(halves).complete
    ours, theirs = state(halves, 20), state(runs[family], 20)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert saved(halves) == saved(runs[family])
    assert rows(halves) == rows(runs[family])


def test_two_processes_do_what_one_does(tmp_path: Path, shards: Path) -> None:
    config = replace(tiny(shards, steps=6), family="uniform")
    run_processes(train_on_record, 2, Job(began(config, tmp_path / "two")))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(trained(config, tmp_path / "one")), rtol=1e-5)


@pytest.mark.parametrize("family", NAMES)
def test_micro_batches_do_not_matter(family: Name, tmp_path: Path, shards: Path) -> None:
    found = []
    for size in (4, 16):
        config = replace(tiny(shards, steps=4), family=family)
        config = replace(config, training=replace(config.training, micro_batch=size))
        found.append(losses(trained(config, tmp_path / str(size))))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_the_loss_is_the_bound_in_the_mean(runs: dict[str, Path], shards: Path) -> None:
    """A batch's loss is nats per token of the family's bound: it starts at the unigram's entropy."""
    counts = np.bincount(sequences(shards, "train", LENGTH).flatten(), minlength=27) + 0.5
    entropy = -(counts / counts.sum() * np.log(counts / counts.sum())).sum()
    for name, path in runs.items():
        first = rows(path)[0]["loss"]
        assert first == pytest.approx(entropy, rel=0.05 if name != "uniform" else 0.3)


@pytest.mark.parametrize("family", NAMES)
def test_a_run_comes_back_and_bf16_and_validation_work(family: Name, tmp_path: Path, shards: Path) -> None:
    config = of(family, shards, steps=4)
    config = replace(config, training=replace(config.training, precision="bf16", evaluate_every=2))
    run = load_run(trained(config, tmp_path / "run"))
    assert isinstance(run.network, TokenNetwork)
    assert (run.is_map, run.kind) == (False, f"{family} baseline")
    assert run.config.family == family
    with pytest.raises(UserError, match=f"is of family {family}: this needs a run of family flow"):
        _ = run.flow_map
    found = [row for row in rows(run.path) if "nelbo_bits_per_char" in row]
    assert [row["step"] for row in found] == [2, 4]
    assert all(1 < row["nelbo_bits_per_char"] < 8 for row in found)


def test_the_dry_run_changes_no_state(tmp_path: Path, shards: Path) -> None:
    from catmaps.model import read_law
    from catmaps.training.loader import make_loader
    from catmaps.training.module import FlowTrainModule
    from catmaps.training.train import _networks

    config = of("uniform", shards)
    folder = began(config, tmp_path / "run")
    module = FlowTrainModule(config, *_networks(config, folder, find_sources(config)), read_law(folder / START_LAW))
    before, rng = {k: v.clone() for k, v in module.network.state_dict().items()}, torch.get_rng_state()
    loader = make_loader(config, find_sources(config))
    loader.reshuffle(1)
    module.train_batch(loader.get_mock_batch(), dry_run=True)
    assert all(torch.equal(before[name], value) for name, value in module.network.state_dict().items())
    assert all(p.grad is None for p in module.network.parameters())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("family", NAMES)
def test_samples_have_their_calls_and_their_seeds(family: Name, runs: dict[str, Path]) -> None:
    run = load_run(runs[family])
    config = default_sampling(run, 5)
    assert (config.sampler, config.calls) == ("ancestral", LENGTH if family == "autoregressive" else 5)
    assert default_sampling(run).calls == (LENGTH if family == "autoregressive" else 64)
    first, again = (torch.cat(list(generate(run, 3, config))) for _ in range(2))
    assert first.shape == (3, LENGTH)
    assert torch.equal(first, again)
    assert next(iter(generate(run, 2, config, length=40))).shape == (2, 40)  # block by block
    prompt = run.tokenizer.encode("the cat").astype(np.int64)
    assert [len(new) for new in continue_tokens(run, [prompt, prompt], 20, config)] == [20, 20]
    with pytest.raises(UserError, match=f"is a {family} baseline: sampler euler is not for it"):
        next(iter(generate(run, 1, SamplingConfig(sampler="euler"))))


def test_a_flow_has_no_ancestral_sampler(base_run: Path) -> None:
    with pytest.raises(UserError, match="is a base flow: sampler ancestral is not for it"):
        next(iter(generate(load_run(base_run), 1, SamplingConfig(sampler="ancestral"))))


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", NAMES)
def test_commands(family: Name, runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = runs[family]
    assert answer(capsys, "info", path)["kind"] == f"{family} baseline"
    steps = [] if family == "autoregressive" else ["--steps", 4]
    said = answer(capsys, "sample", path, "--num", 2, *steps)
    assert (said["sampler"], said["network_calls"]) == ("ancestral", 4 if steps else LENGTH)
    assert [len(text) for text in said["texts"]] == [LENGTH] * 2
    file = tmp_path / "novel.txt"
    file.write_text(words(5, 30))
    said = answer(capsys, "score", path, file, "--samples", 4)
    assert 1 < said["nelbo_bits_per_char"] < 8
    assert (said["stderr_bits_per_char_monte_carlo"] == 0) == (family == "autoregressive")
    assert main(["distill", "--from", str(path)]) == 2
    assert "only a flow can be distilled" in capsys.readouterr().err
    assert main(["sample", str(path), "--show-trajectory"]) == 2
    assert "has no trajectory" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["autoregressive", "uniform"])
def test_report(family: Name, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    splits = ["train"] * 2 + ["valid", "test"]  # enough held-out text for a judge
    documents = [Document(str(i), "tests", str(i), words(i, 2500), split) for i, split in enumerate(splits)]
    build_shards(documents, Text8Tokenizer(), tmp_path / "shards", progress=False)
    path, out = trained(of(family, tmp_path / "shards", steps=2), tmp_path / "run"), tmp_path / "report.html"
    counts = ["--num", 100, "--texts", 1, "--windows", 8, "--calls", 2, 4]
    said = answer(capsys, "report", path, "--out", out, *counts)
    calls = [f"{family} baseline, {n} calls" for n in ((LENGTH,) if family == "autoregressive" else (2, 4))]
    assert [name for name in said["quality"] if "baseline" in name] == calls
    assert "<svg" in out.read_text()


def test_a_baseline_has_no_map(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", "tiny", "--family", "masked", "--objective.off-diagonal", "0.5", "--out", str(out)]) == 2
    assert "family masked has no flow map" in capsys.readouterr().err
    assert main(["train", "tiny", "--family", "magic", "--out", str(out)]) == 2
    assert not out.exists()


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(shards of a cycle of four letters that is left with probability 1/4, its entropy per token of 16)."""
    rng, folder, documents = np.random.default_rng(0), tmp_path_factory.mktemp("cycle"), []
    for i, split in enumerate(["train"] * 8 + ["test"]):
        letters = np.where(rng.random(4000) < 0.25, rng.integers(0, 4, 4000), 1).cumsum() % 4
        documents.append(Document(str(i), "cycle", str(i), "".join("abcd"[k] for k in letters), split))
    build_shards(documents, Text8Tokenizer(), folder / "shards", progress=False)
    step = np.array([0.75, 0, 0, 0]) + 0.0625
    return folder / "shards", float((math.log(4) - 15 * (step * np.log(step)).sum()) / 16)


@pytest.mark.parametrize("family", NAMES)
def test_a_bound_falls_towards_the_entropy_and_not_below(
    family: Name, cycle: tuple[Path, float], tmp_path: Path
) -> None:
    shards, entropy = cycle
    steps = 300 if family == "uniform" else 120  # the slowest to learn
    config = Config(
        family=family,
        data=DataConfig(shards=str(shards), length=16),
        network=NetworkConfig(width=32, blocks=1, heads=2, conditioning=16),
        optimiser=OptimiserConfig(warmup=10, ema=0.9),
        training=TrainingConfig(
            steps=steps, batch=32, micro_batch=32, precision="fp32", compile=False, threads=1, evaluate_every=0
        ),
    )
    run = load_run(trained(config, tmp_path / "run"))
    result = score(run, torch.from_numpy(sequences(shards, "test", 16)), num_samples=16)
    per_token, stderr = result.nats / result.tokens, result.windows_stderr / result.tokens
    assert entropy - 3 * stderr < per_token < 1.25  # unigram: 1.386
