"""Training is a function of seed and global batch alone: not of processes, micro-batches, or what ran before."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny_runs import (
    KINDS,
    LENGTH,
    TIMES,
    Job,
    began,
    distilled,
    losses,
    make_shards,
    rows,
    saved,
    state,
    tiny,
    tiny_kind,
    train_on_record,
    trained,
    weights,
)

from catmaps.config import Config, OptimiserConfig
from catmaps.errors import UserError
from catmaps.model import METRICS, MODEL, TEACHER, load_run, read_config, read_law
from catmaps.text.manifest import load_manifest
from catmaps.text.shards import load_tokens
from catmaps.text.tokenizers import ByteTokenizer
from catmaps.training.sources import find_sources
from catmaps.training.train import START_LAW, _networks, start, train

pytest.importorskip("olmo_core")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, shards: Path, base_run: Path) -> Path:
    """Runs of every kind, for comparison with `two_processes`."""
    folder = tmp_path_factory.mktemp("one")
    for kind in KINDS:
        train_on_record(Job(began(tiny_kind(kind, shards, base_run), folder / kind), stop_after=10))
    return folder


def batches(folder: Path, processes: int) -> np.ndarray:
    """(steps, batch, L): row i of the global batch is row i // processes of process i % processes."""
    parts = [np.load(folder / f"batches-{rank}.npy") for rank in range(processes)]
    return np.stack(parts, axis=2).reshape(len(parts[0]), -1, LENGTH)


def hashes(tokens: np.ndarray) -> list[list[str]]:
    return [[hashlib.sha256(row.tobytes()).hexdigest() for row in batch] for batch in tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does(kind: str, one_process: Path, two_processes: Path) -> None:
    one, two = batches(one_process / kind, 1), batches(two_processes / kind, 2)[:10]
    assert one.shape == (10, 16, LENGTH)
    assert hashes(one) == hashes(two)
    tolerance = 1e-3 if kind == "muon" else 1e-5
    np.testing.assert_allclose(losses(two_processes / kind)[:10], losses(one_process / kind), rtol=tolerance)
    for name in ("loss_diagonal", "loss_off_diagonal", "loss_anchor"):
        ours, theirs = ([row.get(name, 0.0) for row in rows(f / kind)[:10]] for f in (two_processes, one_process))
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-7)


def test_an_epoch_shows_every_sequence_once_in_a_new_order(one_process: Path, shards: Path) -> None:
    tokens = load_tokens(shards, "train")
    whole = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)
    known = [row.tobytes() for row in whole]
    seen = batches(one_process / "base", 1)
    epoch = [row.tobytes() for row in seen[:9].reshape(-1, LENGTH).astype(np.int64)]
    assert len(whole) // 16 == 9
    assert set(epoch) <= set(known)
    assert sorted(epoch) != epoch
    counts = {row: known.count(row) for row in set(known)}
    assert all(epoch.count(row) <= counts[row] for row in set(epoch))
    assert hashes(seen[9:]) != hashes(seen[:1])


def test_a_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path, shards: Path) -> None:
    first, again = (trained(tiny(shards, steps=6), tmp_path / name) for name in ("first", "again"))
    assert saved(first) == saved(again)
    assert rows(first) == rows(again)
    other = trained(tiny(shards, steps=6, seed=1), tmp_path / "other")
    assert saved(first)[MODEL] != saved(other)[MODEL]
    assert not np.isclose(losses(first), losses(other), rtol=1e-4).any()


@pytest.mark.parametrize("kind", ["base", "psd"])
def test_micro_batches_do_not_matter(kind: str, tmp_path: Path, shards: Path, base_run: Path) -> None:
    runs = {}
    for size in (4, 16):
        config = tiny_kind(kind, shards, base_run)
        config = replace(config, training=replace(config.training, steps=10, micro_batch=size))
        runs[size] = trained(config, tmp_path / str(size))
    np.testing.assert_allclose(losses(runs[4]), losses(runs[16]), rtol=1e-5)
    clocks = [state(runs[size], 10)["clock.sums"] for size in (4, 16)]
    torch.testing.assert_close(*clocks, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["psd", "lsd", "lsd_kl", "esd", "ecld"])
def test_linear_input_is_distilled_through_its_teachers_table(tmp_path: Path, shards: Path, loss: str) -> None:
    plain = tiny(shards, steps=4)
    linear = replace(plain, network=replace(plain.network, input="linear", skip=False))
    base = trained(linear, tmp_path / "base")
    runs = {}
    for size in (4, 16):
        config = distilled(base, replace(linear, training=replace(linear.training, micro_batch=size)), loss)
        runs[size] = trained(config, tmp_path / str(size))
    np.testing.assert_allclose(losses(runs[4]), losses(runs[16]), rtol=2e-5, atol=3e-8)
    table = "embedding.table.weight"
    assert torch.equal(weights(runs[4])[table], weights(base)[table])
    assert abs(rows(runs[4])[0]["loss_diagonal"]) < 1e-6  # KL of the base to itself: both see the same noise
    assert not torch.equal(weights(runs[4])["head.weight"], weights(base)["head.weight"])


@pytest.mark.parametrize("kind", ["base", "psd"])
@pytest.mark.parametrize("mode", ["belief", "linear"])
def test_tiles_do_not_change_a_training(
    tmp_path: Path, shards: Path, kind: str, mode: Literal["belief", "linear"], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny(shards, steps=4)
    config = replace(plain, network=replace(plain.network, input=mode, skip=mode == "belief"))
    folders = {}
    for name in ("whole", "tiled"):
        if name == "tiled":
            monkeypatch.setattr("catmaps.config.NUMBERS_PER_MEGABYTE", 16)  # 75 positions, or 18
        folders[name] = trained(config, tmp_path / f"{name}-base")
        if kind == "psd":
            folders[name] = trained(distilled(folders[name], config), tmp_path / name)
    np.testing.assert_allclose(losses(folders["tiled"]), losses(folders["whole"]), rtol=1e-4, atol=3e-8)


def test_distillation_starts_from_exactly_its_base(tmp_path: Path, shards: Path, base_run: Path) -> None:
    folder = began(distilled(base_run, tiny(shards, steps=2)), tmp_path / "map")
    assert (folder / TEACHER).read_bytes() == (base_run / MODEL).read_bytes()
    network, average, teacher = _networks(read_config(folder), folder, find_sources(read_config(folder)))
    assert teacher is not None
    base = weights(base_run)
    for net in (network, average, teacher):
        own = net.state_dict()
        assert own.keys() == base.keys()
        assert all(torch.equal(own[name], base[name]) for name in base)
    # three networks, not one three times
    assert len({p.data_ptr() for net in (network, average, teacher) for p in net.parameters()}) == 3 * len(
        list(network.parameters())
    )
    assert torch.equal(read_law(folder / START_LAW).table, load_run(base_run).law.table)
    train(folder)
    first, second = rows(folder)
    assert abs(first["loss_diagonal"]) < 1e-6  # KL of the base to itself
    assert second["loss_diagonal"] > 1e-6
    assert first["loss_off_diagonal"] > 1e-3
    assert all(torch.equal(value, base[name]) for name, value in load_teacher(folder).items())


def load_teacher(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / TEACHER)


def test_the_dry_run_changes_no_state(tmp_path: Path, shards: Path, base_run: Path) -> None:
    from catmaps.training.module import FlowTrainModule

    for kind in ("base", "psd"):
        config = tiny_kind(kind, shards, base_run)
        folder = began(config, tmp_path / kind)
        module = FlowTrainModule(config, *_networks(config, folder, find_sources(config)), read_law(folder / START_LAW))
        before = flat(module.state_dict())
        rng = torch.get_rng_state()
        module.train_batch(_loader_batch(config), dry_run=True)
        after = flat(module.state_dict())
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(p.grad is None for p in module.network.parameters())
        assert torch.equal(rng, torch.get_rng_state())


def _loader_batch(config: Config) -> dict[str, torch.Tensor]:
    from catmaps.training.loader import make_loader

    loader = make_loader(config, find_sources(config))
    loader.reshuffle(1)
    return loader.get_mock_batch()


def flat(tree: object, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {name: tree.detach().clone()}
    if not isinstance(tree, dict):
        return {}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}.{key}").items()}


def test_metrics_are_means_since_the_line_before(tmp_path: Path, shards: Path) -> None:
    config = tiny(shards, steps=10)
    every = losses(trained(config, tmp_path / "every"))
    some = trained(replace(config, training=replace(config.training, log_every=4)), tmp_path / "some")
    assert [row["step"] for row in rows(some)] == [1, 4, 8, 10]
    expected = [every[:1].mean(), every[1:4].mean(), every[4:8].mean(), every[8:].mean()]
    np.testing.assert_allclose(losses(some), expected, rtol=1e-6)
    assert [row["tokens"] for row in rows(some)] == [16 * LENGTH * step for step in (1, 4, 8, 10)]
    times = [json.loads(line)[TIMES[0]] for line in (some / METRICS).read_text().splitlines()]
    assert times == sorted(times)


def test_validation_is_on_record_once_per_step(base_run: Path) -> None:
    bounds = [row for row in rows(base_run) if "nelbo_bits_per_char" in row]
    assert [row["step"] for row in bounds] == [10, 20]
    assert all(0 < row["nelbo_bits_per_char"] < 10 and row["nelbo_stderr"] > 0 for row in bounds)


def test_what_is_saved_is_the_average_of_the_last_checkpoint(base_run: Path) -> None:
    tensors, stored = state(base_run, 20), weights(base_run)
    assert all(torch.equal(tensors[f"average.{name}"], value) for name, value in stored.items())
    assert any(not torch.equal(tensors[f"model.{name}"], value) for name, value in stored.items())
    assert load_manifest(base_run).vocab_size == 27
    assert not list(base_run.glob(".*.draft"))


def test_bf16_trains_without_a_warning(tmp_path: Path, shards: Path, base_run: Path) -> None:
    for kind in ("base", "lsd"):
        config = tiny_kind(kind, shards, base_run)
        config = replace(config, training=replace(config.training, steps=3, precision="bf16"))
        assert np.isfinite(losses(trained(config, tmp_path / kind))).all()


def test_a_run_that_diverges_says_so(tmp_path: Path, shards: Path) -> None:
    config = replace(tiny(shards), optimiser=OptimiserConfig(name="adamw", lr=1e30, warmup=0))
    folder = began(config, tmp_path / "run")
    with pytest.raises(UserError, match="gradient is not finite at step"):
        train(folder)


def test_start_overwrites_nothing(tmp_path: Path, shards: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    start(tiny(shards), folder)  # an empty folder may be there
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="exists and is not empty; continue it with --resume"):
        start(tiny(shards, seed=1), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="file exists"):
        start(tiny(shards), file)
    with pytest.raises(UserError, match="cannot make"):
        start(tiny(shards), file / "below")
    assert file.read_text() == "mine"


def test_start_refuses_data_that_do_not_fit(tmp_path: Path, shards: Path, base_run: Path) -> None:
    config = tiny(shards)
    short = replace(config, training=replace(config.training, batch=1000))
    byte_shards = make_shards(tmp_path / "bytes", ByteTokenizer())
    other = distilled(base_run, tiny(byte_shards))
    for bad, message in (
        (short, "shorter than one batch"),
        (replace(config, data=replace(config.data, shards=str(tmp_path))), "no token shards"),
        (other, rf"the vocabulary of {byte_shards} \(bytes\) is not that of {base_run} \(text8\)"),
    ):
        with pytest.raises(UserError, match=message):
            start(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "clock.safetensors", "tokenizer.json"])
def test_start_refuses_a_base_in_parts(missing: str, tmp_path: Path, shards: Path, base_run: Path) -> None:
    base = shutil.copytree(base_run, tmp_path / "base")
    (base / missing).unlink()
    with pytest.raises(UserError, match=missing):
        start(distilled(base, tiny(shards)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_must_divide_among_the_processes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from catmaps.training.loader import make_loader

    monkeypatch.setattr("catmaps.training.loader.get_world_size", lambda: 3)
    with pytest.raises(UserError, match=r"training\.batch 16 is not a multiple of the 3 processes"):
        make_loader(tiny(shards), find_sources(tiny(shards)))


@pytest.mark.parametrize("weighting", ["likelihood", "snr", "learned", "inverse_variance"])
def test_weighted_times_train_and_resume_to_the_bit(tmp_path: Path, shards: Path, weighting: Any) -> None:
    config = tiny(shards, steps=60)
    config = replace(config, objective=replace(config.objective, weighting=weighting))
    halves = began(config, tmp_path / "halves")
    train(halves, stop_after=40)
    assert train(halves).complete
    whole = trained(config, tmp_path / "whole")
    assert losses(halves).tolist() == losses(whole).tolist()
    assert losses(whole).tolist() != losses(trained(tiny(shards, steps=60), tmp_path / "unit")).tolist()
