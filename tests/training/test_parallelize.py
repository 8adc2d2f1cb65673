"""Networks that processes share train as whole ones do, whatever the loss, the micro-batches and the tiles."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from processes import run
from tiny_runs import (
    Job,
    began,
    losses,
    rows,
    saved,
    state,
    tiny,
    tiny_kind,
    train_on_record,
    trained,
    weights,
)

from catmaps.config import Config, ParallelConfig
from catmaps.errors import UserError
from catmaps.model import MODEL, load_run, network_of, read_law
from catmaps.network.denoiser import FlowNetwork, uniform_log_prior
from catmaps.network.embedding import BeliefEmbedding
from catmaps.network.published import PublishedNetwork
from catmaps.training.sources import find_sources
from catmaps.training.train import START_LAW, _networks, train

pytest.importorskip("olmo_core")
from catmaps.training.module import FlowTrainModule
from catmaps.training.parallelize import _draw, _parts, local, shard_degree

KINDS = ("base", "psd", "average", "lsd", "lsd_kl", "esd", "ecld", "linear", "masked")
STEPS = 6


def kind_of(name: str, shards: Path, base: Path) -> Config:
    """Micro-batches of 4 rows lack roles on one process or the other; blocks are done again in the backward pass."""
    config = tiny_kind("base" if name in ("linear", "masked") else name, shards, base)
    if name == "linear":
        config = replace(config, network=replace(config.network, input="linear", skip=False))
    if name == "masked":
        config = replace(config, family="masked")
    return replace(
        config,
        training=replace(config.training, steps=STEPS, micro_batch=4, evaluate_every=STEPS),
        parallel=ParallelConfig(strategy="fsdp", checkpoint_activations=True),
    )


def in_tiles(*jobs: Job) -> None:
    """Trains with tiles of 18 positions, or 75 where x is projected: different numbers of them in every process."""
    with patch("catmaps.config.NUMBERS_PER_MEGABYTE", 16):
        train_on_record(*jobs)


def in_tiles_and_shares(*jobs: Job) -> None:
    """The same, and each process leaves the numbers of parameters and moments that it holds in held-RANK.json."""
    from olmo_core.distributed.utils import get_rank

    step = FlowTrainModule.optim_step
    held: dict[str, int] = {}

    def counting(module: FlowTrainModule) -> None:
        step(module)
        moments = [t for o in module.optimisers for s in o.state.values() for t in s.values() if t.ndim]
        for name, tensors in (
            ("network", list(module.network.parameters())),
            ("average", list(module.average.parameters())),
            ("moments", moments),
        ):
            held[name] = sum(local(t).numel() for t in tensors)

    with patch.object(FlowTrainModule, "optim_step", counting):
        for job in jobs:
            in_tiles(job)
            (job.folder / f"held-{get_rank()}.json").write_text(json.dumps(held))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, shards: Path, base_run: Path) -> Path:
    """Each kind on one process; `elastic`, stopped early."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        in_tiles(Job(began(replace(kind_of(kind, shards, base_run), parallel=ParallelConfig()), folder / kind)))
    in_tiles(Job(began(kind_of("base", shards, base_run), folder / "elastic"), stop_after=2))
    return folder


@pytest.fixture(scope="module")
def shared(alone: Path, shards: Path, base_run: Path) -> Path:
    """Each kind on two processes that share a copy; halves of one; and `elastic`, from one process."""
    folder = alone.with_name("shared")
    jobs = [Job(began(kind_of(kind, shards, base_run), folder / kind)) for kind in KINDS]
    halves = began(kind_of("psd", shards, base_run), folder / "halves")
    jobs += [Job(halves, stop_after=3), Job(halves), Job(alone / "elastic", stop_after=4)]
    run(in_tiles_and_shares, 2, *jobs)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_copy_trains_as_a_whole_one(kind: str, alone: Path, shared: Path) -> None:
    assert len(losses(shared / kind)) == STEPS
    np.testing.assert_allclose(losses(shared / kind), losses(alone / kind), rtol=1e-5)
    for name in ("loss_diagonal", "loss_off_diagonal", "loss_anchor", "gradient_norm"):
        ours, theirs = ([row.get(name, 0.0) for row in rows(f / kind)[:STEPS]] for f in (shared, alone))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)
    ours, theirs = weights(shared / kind), weights(alone / kind)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in ours)


@pytest.mark.parametrize("kind", ["base", "psd", "masked"])
def test_validation_sees_the_whole_average(kind: str, shared: Path, alone: Path) -> None:
    ours, theirs = (row for f in (shared, alone) for row in rows(f / kind) if "nelbo_stderr" in row)
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["nelbo_bits_per_char"] == pytest.approx(theirs["nelbo_bits_per_char"], rel=1e-5)
    assert ours["nelbo_stderr"] == pytest.approx(theirs["nelbo_stderr"], rel=1e-4)


def test_processes_hold_their_shares_alone(shared: Path, base_run: Path) -> None:
    whole = sum(p.numel() for p in load_run(base_run).network.parameters())
    first, second = (json.loads((shared / "base" / f"held-{rank}.json").read_text()) for rank in (0, 1))
    for name, copies in (("network", 1), ("average", 1), ("moments", 2)):
        assert first[name] + second[name] == copies * whole
        assert 0.4 * copies * whole < second[name] <= first[name] < 0.6 * copies * whole


def test_a_shared_run_is_resumed_to_the_bit(shared: Path) -> None:
    assert saved(shared / "halves") == saved(shared / "psd")
    ours, theirs = ([row for row in rows(shared / name) if "loss" in row] for name in ("halves", "psd"))
    assert ours == theirs
    ours, theirs = (state(shared / name, STEPS) for name in ("halves", "psd"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_goes_from_one_process_to_two_that_share_and_back(shared: Path, alone: Path) -> None:
    del shared
    with patch("catmaps.config.NUMBERS_PER_MEGABYTE", 16):
        assert train(alone / "elastic").complete
    np.testing.assert_allclose(losses(alone / "elastic"), losses(alone / "base"), rtol=1e-5)


@pytest.mark.parametrize("kind", ["base", "lsd"])
def test_blocks_done_again_change_no_bit(kind: str, tmp_path: Path, shards: Path, base_run: Path) -> None:
    folders = []
    for again in (False, True):
        config = tiny_kind(kind, shards, base_run)
        config = replace(config, training=replace(config.training, steps=4))
        config = replace(config, parallel=ParallelConfig(checkpoint_activations=again))
        folders.append(trained(config, tmp_path / str(again)))
    assert saved(folders[0])[MODEL] == saved(folders[1])[MODEL]


@pytest.mark.parametrize("family", ["flow", "linear", "autoregressive"])
def test_weights_drawn_part_by_part_are_those_of_the_constructor(family: str, shards: Path) -> None:
    config = tiny(shards)
    if family == "linear":
        config = replace(config, network=replace(config.network, input="linear", blocks=2))
    elif family != "flow":
        config = replace(config, family="autoregressive")
    prior = uniform_log_prior(27)
    torch.manual_seed(3)
    expected = network_of(config, prior).state_dict()
    torch.manual_seed(3)
    drawn = network_of(config, prior, device=torch.device("meta"))
    assert all(p.is_meta for p in drawn.parameters())
    assert not any(b.is_meta for b in drawn.buffers())
    for part in _parts(drawn):
        _draw(part)
    assert not isinstance(drawn, PublishedNetwork)
    drawn.reset_parameters()
    assert expected.keys() == drawn.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in drawn.state_dict().items())


def test_reads_without_gradient_see_the_weights_of_the_present(tmp_path: Path, shards: Path, base_run: Path) -> None:
    """Fused AdamW does not raise a tensor's version: kept casts of both tables have to be dropped."""
    config = tiny_kind("psd", shards, base_run)
    config = replace(config, training=replace(config.training, steps=2, precision="bf16"))
    seen: list[bool] = []
    step = FlowTrainModule.optim_step

    def checking(module: FlowTrainModule) -> None:
        step(module)
        network = module.network
        assert isinstance(network, FlowNetwork)
        assert isinstance(network.embedding, BeliefEmbedding)
        kept = ((network.head.weight, network._cast), (network.embedding.table.weight, network.embedding.cast))
        seen.append(all(torch.equal(cast(w, torch.bfloat16), w.detach().bfloat16()) for w, cast in kept))

    with patch.object(FlowTrainModule, "optim_step", checking):
        trained(config, tmp_path / "run")
    assert seen == [True, True]


def test_rows_of_others_add_calls_and_nothing_else(tmp_path: Path, shards: Path, base_run: Path) -> None:
    folder = began(tiny_kind("psd", shards, base_run), tmp_path / "run")
    config = tiny_kind("psd", shards, base_run)
    module = FlowTrainModule(config, *_networks(config, folder, find_sources(config)), read_law(folder / START_LAW))
    batch = module.objective.batch(module.law, 16, 16, (0, 1))
    tokens = torch.randint(27, (2, 16), generator=torch.Generator().manual_seed(0))
    role = batch.whole.role  # pyright: ignore[reportAttributeAccessIssue]
    for own in (0, 1):
        index = (role == own).nonzero()[:2, 0]
        plain, padded = batch.loss(tokens, index), batch.loss(tokens, index, torch.arange(16))
        torch.testing.assert_close(padded.total, plain.total)
        assert torch.equal(padded.counts, plain.counts)
        torch.testing.assert_close(padded.sums, plain.sums)
        assert len(padded.squared_error) == len(plain.squared_error)
        padded.total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.network.parameters())


def test_degrees_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard_degree(ParallelConfig(), 8) == 1
    assert shard_degree(ParallelConfig(strategy="fsdp"), 8) == 8
    assert shard_degree(ParallelConfig(strategy="hsdp", shard_degree=4), 8) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shard_degree(ParallelConfig(strategy="hsdp"), 8) == 2
    with pytest.raises(UserError, match=r"parallel\.shard-degree 3 does not divide the 8 processes"):
        shard_degree(ParallelConfig(strategy="hsdp", shard_degree=3), 8)
    with pytest.raises(ValueError, match=r"is for parallel\.strategy hsdp"):
        ParallelConfig(strategy="fsdp", shard_degree=2)
    with pytest.raises(ValueError, match="timeout must be at least 1"):
        ParallelConfig(timeout=0)
