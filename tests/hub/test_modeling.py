"""transformers' classes over a run: the same numbers as catmaps', saved and loaded without a network."""

import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import config_of, make_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from catmaps.config import Config
from catmaps.errors import UserError
from catmaps.flow.interpolant import gaussian
from catmaps.generation import SamplingConfig, extend
from catmaps.hub.export import export
from catmaps.model import Run, load_run
from catmaps.network.published import PublishedConfig
from catmaps.text.tokenizers import train_bpe

transformers = pytest.importorskip("transformers")

PROMPT = torch.tensor([[3, 1, 20, 0], [4, 15, 7, 0]])


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No socket opens, and copies of remote code go to a folder of their own."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    modules = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    return


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    export(load_run(make_run(folder / "run", config_of())), folder / "map")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load_run(folder / "run")


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder / "map")


def test_logits_are_those_of_the_run(model: Any, run: Run) -> None:
    state = gaussian((2, 12, 27), torch.Generator().manual_seed(0))
    s, t = torch.tensor([[0.3], [0.5]]), torch.tensor([[0.6], [1.0]])
    assert torch.equal(model(state.x, s, t).logits, run.flow_map.logits(state, s, t))
    assert torch.equal(model(state.x, s).logits, run.flow_map.logits(state, s, s))


LINEAR = replace(config_of().network, input="linear", skip=False)
CONFIGS = {
    "flow": config_of(a_map=False),
    "linear": config_of(network=LINEAR),
    "masked": config_of(a_map=False, family="masked"),
    "imported": config_of(network=LINEAR, published=PublishedConfig(kind="semicat", embedding="rms", arrival=True)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_and_loaded_it_is_equal_to_the_bit(config: Config, tmp_path: Path) -> None:
    export(load_run(make_run(tmp_path / "run", config)), tmp_path / "one")
    first = load(tmp_path / "one")
    first.save_pretrained(tmp_path / "two")
    second = load(tmp_path / "two")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys() == first.state_dict().keys()
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype
        assert torch.equal(tensor, weights[1][name])
        assert torch.equal(tensor, second.state_dict()[name])
    assert first.config.to_dict() == second.config.to_dict() | {"_name_or_path": first.config._name_or_path}
    drawn = [model.generate(PROMPT, seed=3, max_new_tokens=6).sequences for model in (first, second)]
    assert torch.equal(*drawn)
    with pytest.raises(UserError, match="tokenizer"):
        load_run(tmp_path / "two")  # transformers saves tokenizers on their own
    transformers.AutoTokenizer.from_pretrained(tmp_path / "one", trust_remote_code=True).save_pretrained(
        tmp_path / "two"
    )
    assert load_run(tmp_path / "two").config == load_run(tmp_path / "one").config


def test_the_classes_serve_without_remote_code(folder: Path, model: Any) -> None:
    from catmaps.hub.modeling import CatmapsConfig, CatmapsModel, from_run

    assert type(model) is CatmapsModel
    assert type(model.config) is CatmapsConfig
    own = CatmapsModel.from_pretrained(folder / "map")
    assert type(transformers.AutoModel.from_pretrained(folder / "map")) is CatmapsModel
    direct = from_run(load_run(folder / "run"))
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, direct.state_dict()[name])
    assert CatmapsModel(CatmapsConfig()).network.vocab_size == 27


def test_what_is_incomplete_is_refused(folder: Path, tmp_path: Path) -> None:
    export(load_run(folder / "run"), tmp_path / "dir")
    file = tmp_path / "dir" / "model.safetensors"
    tensors = load_file(file)
    for wrong, change in (
        ("missing keys.*head.weight", lambda t: t.pop("network.head.weight")),
        ("unexpected keys.*network.tail", lambda t: t.update({"network.tail": torch.zeros(3)})),
    ):
        changed = dict(tensors)
        change(changed)
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=wrong):
            load(tmp_path / "dir")


def test_remote_code_says_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("configuration_catmaps", "modeling_catmaps"):
        monkeypatch.setitem(sys.modules, "catmaps.hub.modeling", None)
        with pytest.raises(ImportError) as caught:
            exec((folder / "map" / f"{name}.py").read_text(), {})
        assert "needs the package catmaps" in str(caught.value)
        assert "pip install 'catmaps[hf]'" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_generation_is_the_run_s_own(model: Any, run: Run) -> None:
    config = SamplingConfig(steps=3, sampler="flow_map", temperature=0.8, top_p=0.7)
    expected = extend(run, PROMPT, 20, config, torch.Generator().manual_seed(4))
    options = {"max_denoising_steps": 3, "sampler": "flow_map", "temperature": 0.8, "top_p": 0.7}
    written = model.generate(PROMPT, max_new_tokens=20, seed=4, **options)
    assert torch.equal(written.sequences, torch.cat([PROMPT, expected], 1))
    # Beside 4 given tokens a window of 12 has room for 8; then half a window, 6, at a time.
    assert torch.equal(written.tokens_per_forward, torch.full((2,), 20 / (3 * 3)))
    own = torch.Generator().manual_seed(4)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20, generator=own, **options).sequences, written.sequences)


def test_defaults_are_those_of_the_directory(model: Any, run: Run) -> None:
    assert model.generation_config.max_denoising_steps == 4
    expected = extend(run, PROMPT, 8, SamplingConfig(steps=4), torch.Generator().manual_seed(0))
    written = model.generate(PROMPT, seed=0)
    assert torch.equal(written.sequences[:, 4:], expected)
    assert written.tokens_per_forward.tolist() == [2, 2]
    changed = transformers.GenerationConfig(max_new_tokens=3)
    assert model.generate(PROMPT, changed, seed=0).sequences.shape == (2, 7)
    assert model.generate(PROMPT, max_length=6, seed=0).sequences.shape == (2, 6)


def test_the_global_seed_counts_where_no_other_is_given(model: Any) -> None:
    drawn = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        drawn.append(model.generate(num_return_sequences=2, return_dict_in_generate=False))
    assert drawn[0].shape == (2, 12)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_padding_on_the_left_is_never_seen(model: Any) -> None:
    short = model.generate(PROMPT[:1, 2:], seed=7, max_new_tokens=5).sequences
    padded, mask = torch.tensor([[9, 9, 20, 0], [4, 15, 7, 0]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    both = model.generate(padded, attention_mask=mask, seed=7, max_new_tokens=5)
    assert torch.equal(both.sequences[:1, 2:], short)  # the shortest prompts are drawn first
    assert torch.equal(both.sequences[:, :4], padded)
    assert both.tokens_per_forward.tolist() == [5 / 4, 5 / 4]


def test_blanks_are_filled_and_the_rest_stays(model: Any) -> None:
    text = torch.randint(0, 27, (2, 12), generator=torch.Generator().manual_seed(0))
    blank = torch.zeros(2, 12, dtype=torch.bool)
    blank[0, 3:6], blank[1, [0, 7]] = True, True
    written = model.generate(text, infill_mask=blank, seed=1)
    assert torch.equal(written.sequences[~blank], text[~blank])
    assert not torch.equal(written.sequences, text)
    assert written.tokens_per_forward.tolist() == [3 / 4, 2 / 4]


class Streamer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor]] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(("put", value))

    def put_draft(self, value: Tensor) -> None:
        self.seen.append(("draft", value))

    def end(self) -> None:
        self.seen.append(("end", torch.zeros(0)))


def test_streamers_see_drafts_of_every_block(model: Any) -> None:
    streamer = Streamer()
    written = model.generate(PROMPT, seed=0, max_new_tokens=14, max_denoising_steps=2, streamer=streamer)
    kinds = [kind for kind, _ in streamer.seen]
    assert kinds == ["put", *["draft", "draft", "put"] * 2, "end"]
    assert [value.shape[1] for kind, value in streamer.seen[:-1]] == [4, 8, 8, 8, 6, 6, 6]
    put = torch.cat([value for kind, value in streamer.seen if kind == "put"], 1)
    assert torch.equal(put, written.sequences)
    assert torch.equal(streamer.seen[2][1], streamer.seen[3][1])  # the last draft is the text


def test_transformers_own_streamer_takes_it(folder: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "map", trust_remote_code=True)
    streamer = transformers.TextDiffusionStreamer(tokenizer)
    ids = tokenizer("the king", return_tensors="pt").input_ids
    written = model.generate(ids, seed=0, streamer=streamer)
    shown = re.sub("\x1b7.*?\x1b8\x1b\\[J", "", capsys.readouterr().out)  # drafts are wiped out again
    assert shown == tokenizer.decode(written.sequences[0]) + "\n"


def test_beyond_the_end_stands_padding(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 260)
    export(load_run(make_run(tmp_path / "run", config_of(), tokenizer)), tmp_path / "dir")
    model = load(tmp_path / "dir")
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 0
    free = model.generate(num_return_sequences=8, seed=0, eos_token_id=-1, max_denoising_steps=2).sequences
    end, pad = int(free[0, 5]), 259
    cut = model.generate(num_return_sequences=8, seed=0, eos_token_id=end, pad_token_id=pad, max_denoising_steps=2)
    for before, after, rate in zip(free.tolist(), cut.sequences.tolist(), cut.tokens_per_forward.tolist(), strict=True):
        kept = before.index(end) + 1 if end in before else len(before)
        assert after == before[:kept] + [pad] * (len(before) - kept)
        assert rate == kept / 2


@pytest.mark.parametrize("kind", ["flow", "linear", "imported"])
def test_half_precision_keeps_times_and_evidence_whole(kind: str, tmp_path: Path) -> None:
    export(load_run(make_run(tmp_path / "run", CONFIGS[kind])), tmp_path / "dir")
    model, half = load(tmp_path / "dir"), load(tmp_path / "dir", dtype=torch.bfloat16)
    assert half.network.trunk.blocks[0].qkv.weight.dtype == torch.bfloat16
    weights = half.network.state_dict()
    for name in {"features.clock_t", "gain_in.bias", "log_prior", "start.inner.weight"} & set(weights):
        assert weights[name].dtype == torch.float32
    state, s = gaussian((2, 12, 27), torch.Generator().manual_seed(0)), torch.full((2, 1), 0.4)
    apart = (half(state.x, s).logits.softmax(-1) - model(state.x, s).logits.softmax(-1)).abs().max()
    assert 0 < apart < 0.05


def test_a_baseline_writes_but_has_no_endpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", replace(config_of(a_map=False), family="autoregressive"))
    export(load_run(run), tmp_path / "dir")
    model = load(tmp_path / "dir")
    written = model.generate(PROMPT, max_new_tokens=5, seed=0)
    assert written.sequences.shape == (2, 9)
    assert written.tokens_per_forward.tolist() == [1, 1]
    with pytest.raises(UserError, match="family flow"):
        model(torch.zeros(1, 12, 27), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("wrong", "options"),
    [
        ("does not know steps", {"steps": 3}),
        ("not both", {"seed": 1, "generator": torch.Generator()}),
        ("do_sample", {"do_sample": False}),
        (r"\[0, 27\)", {"input_ids": torch.tensor([[27]])}),
        ("nothing to write", {"input_ids": PROMPT, "max_length": 4}),
        ("belong to input_ids", {"attention_mask": torch.ones(1, 2, dtype=torch.long)}),
        ("stand on the left", {"input_ids": PROMPT, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}),
        ("marks blanks", {"input_ids": PROMPT, "infill_mask": torch.zeros(2, 4, dtype=torch.bool)}),
    ],
)
def test_wrong_arguments_are_named(wrong: str, options: dict[str, Any], model: Any) -> None:
    with pytest.raises(ValueError, match=wrong):
        model.generate(**options)
