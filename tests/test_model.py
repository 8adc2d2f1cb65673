"""A run's folder: what is written is what is read; what is missing, damaged or foreign is named, file and tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from catmaps.config import ClockConfig
from catmaps.errors import UserError
from catmaps.flow import times
from catmaps.model import (
    CLOCK,
    CONFIG,
    MODEL,
    build_network,
    load_run,
    load_weights,
    read_config,
    read_law,
    starting_law,
    write_law,
    write_tensors,
)
from catmaps.network.denoiser import NetworkConfig, uniform_log_prior
from catmaps.text import tokenizers
from catmaps.text.tokenizers import ByteTokenizer

TINY = NetworkConfig(width=16, blocks=1, heads=2, conditioning=8, mlp_ratio=2)


@pytest.fixture
def run(base_run: Path, tmp_path: Path) -> Path:
    """A copy of a run, to be damaged."""
    return shutil.copytree(base_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))


def test_a_run_comes_back(base_run: Path, map_run: Path) -> None:
    base, map_ = load_run(base_run), load_run(map_run)
    assert (base.is_map, map_.is_map) == (False, True)
    assert base.config == read_config(base_run)
    assert map_.config.base == str(base_run)
    assert base.tokenizer.vocab_size == base.network.vocab_size == 27
    stored, own = load_file(base_run / MODEL), base.network.state_dict()
    assert all(torch.equal(stored[name], own[name]) for name in own)
    assert not any(p.requires_grad for p in base.network.parameters())
    assert not base.network.training
    assert base.network.precision == torch.float32
    assert torch.equal(base.law.table, load_file(base_run / CLOCK)["table"])
    assert base.flow_map.denoiser is base.network


@pytest.mark.parametrize("file", [MODEL, CLOCK, "tokenizer.json", CONFIG])
def test_a_missing_file_is_named(file: str, run: Path) -> None:
    (run / file).unlink()
    with pytest.raises(UserError, match=file):
        load_run(run)


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run .*nowhere does not exist; train one"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run \(no config.json\)"):
        load_run(tmp_path)


@pytest.mark.parametrize("file", [MODEL, CLOCK])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1], ids=["empty", "header", "start", "half", "all but a byte"])
def test_a_truncated_file_is_named(file: str, keep: float, run: Path) -> None:
    content = (run / file).read_bytes()
    (run / file).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"{file} is damaged .*copy it again"):
        load_run(run)


@pytest.mark.parametrize("file", [MODEL, CLOCK, CONFIG, "tokenizer.json"])
def test_a_file_of_noise_is_named(file: str, run: Path) -> None:
    (run / file).write_bytes(bytes(range(256)) * 40)
    with pytest.raises(UserError, match=file):
        load_run(run)


def without(tensors: dict[str, Tensor]) -> None:
    del tensors["trunk.blocks.0.qkv.weight"]


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["module.head.weight"] = tensors["head.weight"].clone()


def widened(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"] = torch.zeros(27, 99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "misses trunk.blocks.0.qkv.weight"),
        (renamed, "has unknown module.head.weight"),
        (widened, r"head.weight has shape \(27, 99\) instead of \(27, 16\)"),
    ],
)
def test_a_foreign_tensor_is_named(change: Callable[[dict[str, Tensor]], None], message: str, run: Path) -> None:
    tensors = load_file(run / MODEL)
    change(tensors)
    save_file(tensors, run / MODEL)
    with pytest.raises(UserError, match=rf"{MODEL}.*{message}"):
        load_run(run)


def test_weights_of_another_vocabulary_are_refused(run: Path) -> None:
    tokenizers.save(ByteTokenizer(), run)
    with pytest.raises(UserError, match=r"has shape \(.*27.*\) instead of \(.*257.*\): it is of another"):
        load_run(run)


@pytest.mark.parametrize(
    "tensors",
    [
        {"t": torch.linspace(0, 1, 5)},
        {"t": torch.linspace(0, 1, 5), "table": torch.zeros(5)},
        {"t": torch.linspace(0, 1, 5), "table": torch.linspace(0, 0.9, 5)},
        {"other": torch.zeros(1)},
    ],
    ids=["no table", "flat", "short", "other"],
)
def test_what_is_no_law_of_time_is_named(tensors: dict[str, Tensor], run: Path) -> None:
    save_file(tensors, run / CLOCK)
    with pytest.raises(UserError, match=f"{CLOCK} is not a law of time"):
        load_run(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"preset": "small"', "config.json is not a configuration of this version of catmaps"),
        ('{"preset": "small"}', "missing field base"),
        (None, "unknown field network.rotary"),
    ],
    ids=["cut", "short", "newer"],
)
def test_a_configuration_of_another_version_is_named(text: str | None, message: str, run: Path) -> None:
    if text is None:
        tree = json.loads((run / CONFIG).read_text())
        tree["network"]["rotary"] = True
        text = json.dumps(tree)
    (run / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message):
        load_run(run)


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors({"a": torch.arange(6).view(2, 3).T}, file)
    assert torch.equal(load_file(file)["a"], torch.arange(6).view(2, 3).T)
    before = file.read_bytes()

    def full_disk(tensors: dict[str, Tensor], target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("catmaps.model.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_tensors({"a": torch.zeros(1)}, file)
    assert file.read_bytes() == before


def test_a_law_comes_back_to_the_bit(tmp_path: Path) -> None:
    law = times.warp(27)
    write_law(law, tmp_path / CLOCK)
    back = read_law(tmp_path / CLOCK)
    assert torch.equal(back.t, law.t)
    assert torch.equal(back.table, law.table)


def test_laws_of_time_by_name() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    expected = {"uniform": times.uniform(), "logit_normal": times.logit_normal(), "warp": times.warp(27)}
    for name, law in expected.items():
        found = starting_law(ClockConfig(law=name), 27)  # pyright: ignore[reportArgumentType]
        assert torch.equal(found.cdf(t), law.cdf(t))


def test_networks_do_not_share_their_clocks() -> None:
    one, other = (build_network(TINY, uniform_log_prior(11)) for _ in range(2))
    shared = {p.data_ptr() for p in one.state_dict().values()} & {p.data_ptr() for p in other.state_dict().values()}
    assert not shared


def test_loading_is_by_name_not_by_place(tmp_path: Path) -> None:
    net, other = (build_network(TINY, uniform_log_prior(11)) for _ in range(2))
    torch.nn.init.normal_(net.head.weight)
    tensors = dict(reversed(list(net.state_dict().items())))
    write_tensors(tensors, tmp_path / MODEL)
    load_weights(other, tmp_path / MODEL)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())
