"""A run that begins with another's weights: `catmaps train --from RUN`."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import config_of, make_run
from processes import run
from tiny_runs import Job, began, distilled, losses, make_shards, rows, saved, state, tiny, train_on_record, trained

from catmaps.cli import main
from catmaps.commands.train import Start, read
from catmaps.config import Config, ParallelConfig
from catmaps.errors import UserError
from catmaps.hub.export import export, export_run
from catmaps.hub.published import PublishedConfig
from catmaps.model import CLOCK, MODEL, START, load_run, read_config, read_law, write_law
from catmaps.presets import small
from catmaps.text.tokenizers import ByteTokenizer
from catmaps.training.sources import find_sources
from catmaps.training.train import START_LAW, _networks, start, train

pytest.importorskip("olmo_core")
STEPS = 6


def warm(base: Path, shards: Path, *, steps: int = STEPS, strategy: str = "ddp") -> Config:
    """Six steps of the base's own kind, with validation at both ends."""
    config = tiny(shards, steps=steps)
    parallel = ParallelConfig(strategy=strategy)  # pyright: ignore[reportArgumentType]
    training = replace(config.training, evaluate_every=steps)
    return replace(config, start=str(base), training=training, parallel=parallel)


def asked(*words: str | Path) -> Start:
    command = read("train", [str(word) for word in words])
    assert isinstance(command, Start)
    return command


def steps_of(folder: Path) -> list[dict[str, float]]:
    return [row for row in rows(folder) if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base_run: Path, shards: Path) -> Path:
    folder = began(warm(base_run, shards), tmp_path_factory.mktemp("warm") / "alone")
    train_on_record(Job(folder))
    return folder


@pytest.fixture(scope="module")
def in_company(alone: Path, base_run: Path, shards: Path) -> Path:
    """The same on two processes: whole copies, one that is shared out, and halves of the latter."""
    folder = alone.parent
    jobs = [Job(began(warm(base_run, shards, strategy=name), folder / name)) for name in ("ddp", "fsdp")]
    halves = began(warm(base_run, shards, strategy="fsdp"), folder / "halves")
    run(train_on_record, 2, *jobs, Job(halves, stop_after=3), Job(halves))
    return folder


def test_network_and_average_begin_with_the_sources_weights(tmp_path: Path, base_run: Path, shards: Path) -> None:
    config = replace(warm(base_run, shards), training=replace(tiny(shards).training, seed=5))
    folder = began(config, tmp_path / "run")
    network, average, teacher = _networks(config, folder, find_sources(config))
    expected = load_run(base_run).network.state_dict()
    assert teacher is None
    for net in (network, average):
        own = net.state_dict()
        assert own.keys() == expected.keys()
        assert [name for name in own if not torch.equal(own[name], expected[name])] == []
    assert all(p.requires_grad for p in network.parameters())


def test_before_the_first_step_the_bound_is_the_sources(alone: Path, base_run: Path) -> None:
    first, last = rows(alone)[0], [row for row in rows(base_run) if "nelbo_stderr" in row][-1]
    assert (first["step"], first["tokens"]) == (0, 0)
    assert [first[name] for name in ("nelbo_bits_per_char", "nelbo_stderr")] == pytest.approx(
        [last[name] for name in ("nelbo_bits_per_char", "nelbo_stderr")], rel=1e-6
    )
    assert [row["step"] for row in rows(alone) if "nelbo_stderr" in row] == [0, STEPS]


def test_training_goes_on_from_where_the_source_was(alone: Path, base_run: Path, shards: Path) -> None:
    """Its first loss is near the source's last ones, and far from that of random weights on the same batch."""
    scratch = losses(base_run)
    assert losses(alone)[0] < scratch[-5:].mean() + 0.5 * (scratch[0] - scratch[-5:].mean())
    assert read_config(alone).start == str(base_run)
    assert read_config(alone).base is None
    assert not load_run(alone).is_map


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(strategy: str, in_company: Path, alone: Path) -> None:
    np.testing.assert_allclose(losses(in_company / strategy), losses(alone), rtol=1e-5)
    ours, theirs = (
        [row["nelbo_bits_per_char"] for row in rows(f) if "nelbo_stderr" in row] for f in (in_company / strategy, alone)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_shared_run_is_resumed_to_the_bit(in_company: Path) -> None:
    assert saved(in_company / "halves") == saved(in_company / "fsdp")
    assert steps_of(in_company / "halves") == steps_of(in_company / "fsdp")


def test_it_is_resumed_to_the_bit_without_its_source(tmp_path: Path, base_run: Path, shards: Path, alone: Path) -> None:
    source = shutil.copytree(base_run, tmp_path / "source")
    folder = began(warm(source, shards), tmp_path / "run")
    train(folder, stop_after=3)
    shutil.rmtree(source)
    moved = folder.rename(tmp_path / "moved")
    assert train(moved).complete
    ours, theirs = state(moved, STEPS), state(alone, STEPS)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert saved(moved) == saved(alone)
    assert steps_of(moved) == steps_of(alone)


def test_a_run_without_checkpoints_begins_with_its_sources_weights_again(
    tmp_path: Path, base_run: Path, shards: Path, alone: Path
) -> None:
    folder = began(warm(base_run, shards), tmp_path / "run")
    train(folder, stop_after=2)
    shutil.rmtree(folder / "checkpoints")
    assert train(folder).complete
    assert saved(folder) == saved(alone)


def test_the_adapted_law_goes_with_its_clock_alone(tmp_path: Path, base_run: Path, shards: Path) -> None:
    source = shutil.copytree(base_run, tmp_path / "source")
    adapted = read_law(make_run(tmp_path / "other", config_of()) / CLOCK)  # uniform: not the base's warp
    write_law(adapted, source / CLOCK)
    config = warm(source, shards)
    folder = began(config, tmp_path / "run")
    assert torch.equal(read_law(folder / START_LAW).table, adapted.table)
    train(folder, stop_after=2)
    assert torch.equal(read_law(folder / CLOCK).table, adapted.table)  # in force until the histogram is full
    train(folder, stop_after=3)
    assert torch.equal(read_law(folder / CLOCK).table, adapted.table)
    fixed = began(replace(config, clock=replace(config.clock, adaptive=False)), tmp_path / "fixed")
    assert not torch.equal(read_law(fixed / START_LAW).table, adapted.table)


@pytest.mark.parametrize("exported", [False, True])
def test_baselines_and_exported_directories_are_sources(tmp_path: Path, shards: Path, exported: bool) -> None:
    scratch = tiny(shards, steps=2)
    base = trained(scratch if exported else replace(scratch, family="masked"), tmp_path / "base")
    source = tmp_path / "source" if exported else base
    if exported:
        export(load_run(base), source)
    folder = began(replace(read_config(source), data=scratch.data, start=str(source)), tmp_path / "run")
    expected = load_run(base).network.state_dict()
    network, _, _ = _networks(read_config(folder), folder, find_sources(read_config(folder)))
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    assert train(folder).complete


def test_options_are_the_sources_or_a_presets(tmp_path: Path, base_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, own = read_config(base_run), asked("--from", base_run)
    assert own.config == replace(source, start=str(base_run))
    assert own.out == Path("runs/base-more")
    other = asked("small", "--from", base_run, "--training.steps", "7", "--objective.clean", "0", "--out", "x")
    assert (other.config.network, other.config.data, other.config.clock) == (source.network, source.data, source.clock)
    assert other.config.training == replace(small().training, steps=7)
    assert (other.config.preset, other.config.optimiser, other.out) == ("small", small().optimiser, Path("x"))


def test_other_data_replace_the_sources(tmp_path: Path, shards: Path) -> None:
    mixed = replace(tiny(shards), data=replace(tiny(shards).data, shards=None, mixture={str(shards): 1.0}))
    make_run(tmp_path / "source", replace(mixed, training=replace(mixed.training, steps=2)))
    config = asked("--from", tmp_path / "source", "--data.shards", shards).config
    assert (config.data.shards, config.data.mixture) == (str(shards), {})
    assert asked("--from", tmp_path / "source").config.data == mixed.data


def test_a_model_of_the_package_is_a_source_and_a_map_of_it_forgets_the_start() -> None:
    command = asked("--from", "letters-base", "--data.shards", "shards")
    assert (command.config.start, command.config.network.neighbours) == ("letters-base", 3)
    assert command.out == Path("runs/letters-base-more")
    with pytest.raises(ValueError, match="leave out start"):
        replace(command.config, base="letters-base")


def test_a_run_that_was_begun_so_is_distilled_and_exported(tmp_path: Path, alone: Path, shards: Path) -> None:
    config = distilled(alone, tiny(shards, steps=2))
    assert trained(config, tmp_path / "map").joinpath("teacher.safetensors").is_file()
    command = read("distill", ["--from", str(alone)])
    assert isinstance(command, Start)
    assert (command.config.base, command.config.start) == (str(alone), None)
    export_run(load_run(alone), tmp_path / "out")
    assert read_config(tmp_path / "out").start == "base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from"], "--from needs a value"),
        (["--from", "nowhere"], "run nowhere does not exist"),
        (["huge", "--from", "BASE"], "no preset huge"),
        (["--from", "BASE", "--network.width", "32"], "network.width is 16 in BASE, whose weights are taken"),
        (["--from", "BASE", "--network.input", "linear"], "and cannot be linear"),
        (["--from", "BASE", "--data.tokenizer", "bytes"], "data.tokenizer is text8 in BASE"),
        (["--from", "BASE", "--family", "masked"], "family is flow in BASE"),
        (["--from", "BASE", "--data.shards", "BYTES"], "(bytes) is not that of BASE (text8): build shards with"),
        (["--from", "BASE", "--out", "BASE"], "exists and is not empty"),
        (["--from", "BASE", "--steps", "3"], "--steps"),
        (["--from", "UNSAVED"], "model.safetensors is missing"),
        (
            ["--from", "MAP"],
            "is a flow map, and a base begins with a base's weights: begin with the base it comes from",
        ),
        (["--from", "JOINT"], "is a flow map, and a base begins with a base's weights: --resume JOINT"),
        (["--from", "IMPORTED"], "was imported: its network is sampled and scored, but not trained"),
        (["--from", "letters"], "--from letters-base"),
        (["--resume", "letters-base"], "a base is begun with: --from RUN"),
    ],
)
def test_mistakes_cost_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    base_run: Path,
    shards: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_run, "BASE", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree("BASE", "UNSAVED", ignore=shutil.ignore_patterns(MODEL))
    make_run(Path("MAP"), replace(config_of(), base="BASE"))
    make_run(Path("JOINT"), config_of())
    published = PublishedConfig(kind="flm", embedding="plain", arrival=False)
    make_run(Path("IMPORTED"), config_of(a_map=False, published=published))
    if "BYTES" in words:
        make_shards(Path("BYTES"), ByteTokenizer())
    capsys.readouterr()
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not Path("runs").exists()


def test_python_callers_are_told_as_well(tmp_path: Path, base_run: Path, shards: Path) -> None:
    config = warm(base_run, shards)
    with pytest.raises(UserError, match=r"network\.heads is 2"):
        start(replace(config, network=replace(config.network, heads=4)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    folder = began(config, tmp_path / "run")
    (folder / START).unlink()
    with pytest.raises(UserError, match=r"start\.safetensors is missing"):
        train(folder)
