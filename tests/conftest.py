"""Runs that several files of tests read: trained once per process, in seconds."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run
from tiny_runs import KINDS, Job, began, make_shards, tiny, tiny_kind, train_on_record, trained


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_an_own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False  # a hundred lines per checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATMAPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of a small corpus of 27 letters."""
    return make_shards(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture(scope="session")
def base_run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A base flow, trained for 20 steps with validation every 10. Not to be written to."""
    pytest.importorskip("olmo_core")
    config = tiny(shards)
    config = replace(config, training=replace(config.training, evaluate_every=10))
    return trained(config, tmp_path_factory.mktemp("runs") / "base")


@pytest.fixture(scope="session")
def map_run(base_run: Path, shards: Path) -> Path:
    """A flow map, distilled from `base_run` for 20 steps. Not to be written to."""
    return trained(tiny_kind("psd", shards, base_run), base_run.with_name("map"))


@pytest.fixture(scope="session")
def two_processes(base_run: Path, shards: Path) -> Path:
    """Runs of two processes: of every kind, halves of three (stopped at 10 and resumed), signalled."""
    folder = base_run.with_name("two")
    jobs = [Job(began(tiny_kind(kind, shards, base_run), folder / kind)) for kind in KINDS]
    for kind in ("muon", "psd", "average"):
        halves = began(tiny_kind(kind, shards, base_run), folder / f"halves-{kind}")
        jobs += [Job(halves, stop_after=10), Job(halves)]
    run(train_on_record, 2, *jobs, Job(began(tiny(shards), folder / "signalled"), signal_at=5))
    return folder
