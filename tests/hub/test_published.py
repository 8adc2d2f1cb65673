"""Published checkpoints: logits of the written-out networks, strict names, times, and no code of theirs."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import published_reference as reference
import pytest
import torch
from published_reference import F64, Sizes, Weights
from safetensors.torch import save_file
from torch import Tensor

from catmaps.cli import main
from catmaps.errors import UserError
from catmaps.flow.interpolant import State, gaussian
from catmaps.flow.samplers import SAMPLERS, sample
from catmaps.generation import SamplingConfig, default_sampling
from catmaps.hub.published import import_checkpoint, understand
from catmaps.hub.sources import Source, read_source
from catmaps.model import Run, build_published, load_run
from catmaps.network.published import PublishedNetwork
from catmaps.scoring import seen_directions
from catmaps.text.tokenizers import Text8Tokenizer, save, train_bpe

# The first use of torch.func.jvp in a process makes torch load its own scripted decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SMALL, LARGE = Sizes(), Sizes(vocab=257, width=24)  # x W has more dimensions than x, and fewer


class Case(NamedTuple):
    kind: Any
    weights: Weights
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    sizes: Sizes
    cap: float


def case(name: str, sizes: Sizes = SMALL) -> Case:
    kind = "semicat" if name.startswith("semicat") else "flm"
    cap = 1.5 if "capped" in name else 0.0
    if kind == "flm":
        weights = reference.random_weights(reference.flm_shapes(sizes, "fmlm" in name))
        forward = reference.flm(weights, sizes, cap or None)
    else:
        weights = reference.random_weights(reference.semicat_shapes(sizes, name.split()[-1]))
        forward = reference.semicat(weights, sizes)
    return Case(kind, weights | reference.buffers(kind, sizes), forward, sizes, cap)


NAMES = ["flm", "fmlm", "fmlm capped", "semicat naive", "semicat rms"]


def network(a: Case) -> PublishedNetwork:
    checkpoint = understand(Source("a file", a.weights, {}), a.kind, a.cap)
    made = build_published(checkpoint.network, checkpoint.published, checkpoint.vocab_size)
    made.load_state_dict(checkpoint.tensors)
    return made.eval().requires_grad_(False)


def at_random(sizes: Sizes, batch: int = 3) -> tuple[State, Tensor, Tensor]:
    """A state with clean positions, and times by position."""
    generator = torch.Generator().manual_seed(1)
    x = gaussian((batch, sizes.length, sizes.vocab), generator).x
    pairs = torch.rand(2, batch, 1, generator=generator).expand(-1, -1, sizes.length).sort(0).values
    s, t = pairs[0].clone(), pairs[1].clone()
    s[0, :2] = t[0, :2] = 1.0
    s[1], t[1] = 0.0, 1.0
    return State(x), s, t


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["few", "many"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_written_out_network(name: str, sizes: Sizes) -> None:
    a = case(name, sizes)
    net, (state, s, t) = network(a), at_random(sizes)
    assert net.projects == (sizes is LARGE)
    for times in ((s, t), (s, s)):
        hidden = net.encode(state, *times)
        logits = net.readout(hidden, state, *times).logits()
        expected = a.forward(state.x, *times)
        assert expected.std() > 0.3
        torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    one = torch.full((3, 1), 0.37)
    logits = net.readout(net.encode(state, one, one), state, one, one).logits()
    wide = one.expand(-1, sizes.length)
    torch.testing.assert_close(logits.double(), a.forward(state.x, wide, wide), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_matters(name: str) -> None:
    a = case(name)
    state, s, t = at_random(a.sizes)
    before = network(a).encode(state, s, t)
    for key in a.weights:
        if key in reference.buffers(a.kind, a.sizes) or key.startswith("output_layer.linear"):
            continue
        changed = a._replace(weights=a.weights | {key: a.weights[key] + 0.1 * torch.randn_like(a.weights[key])})
        assert not torch.allclose(network(changed).encode(state, s, t), before), key


@pytest.mark.parametrize("name", NAMES)
def test_tangents_are_derivatives(name: str) -> None:
    a = case(name)
    net, (state, s, t) = network(a).double(), at_random(a.sizes)
    x, s, t = state.x.double(), s[1:].double() * 0.8 + 0.05, t[1:].double() * 0.8 + 0.1
    x, ds, dt = x[1:], torch.full_like(s, 0.3), torch.full_like(t, 0.7)
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=F64)

    def logits(h: float) -> Tensor:
        at = State(x + h * dx), s + h * ds, t + h * dt
        return net.readout(net.encode(*at), *at).logits()

    hidden = net.encode_with_tangent(State(x), s, t, ds, dt, State(dx))
    value, rate = net.readout_with_tangent(hidden, State(x), (s, t, ds, dt), State(dx)).logits()
    torch.testing.assert_close(value, logits(0.0))
    # flm's clock is a table, linear in between: a step has to stay inside one of its cells.
    torch.testing.assert_close(rate, (logits(1e-6) - logits(-1e-6)) / 2e-6, atol=1e-5, rtol=1e-4)


def test_half_precision_stays_close() -> None:
    a = case("fmlm", LARGE)
    net, (state, s, t) = network(a), at_random(a.sizes)
    whole = net.readout(net.encode(state, s, t), state, s, t).logits()
    net.precision = torch.bfloat16
    half = net.readout(net.encode(state, s, t), state, s, t).logits()
    assert 1e-4 < (half - whole).abs().max() < 0.15


def written(a: Case, folder: Path, prefix: str = "") -> Path:
    folder.mkdir()
    file = folder / "model.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in a.weights.items()}, file)
    return file


def imported(name: str, tmp_path: Path, sizes: Sizes = SMALL) -> Run:
    a = case(name, replace(sizes, vocab=27))
    file = written(a, tmp_path / "source")
    import_checkpoint(str(file), a.kind, tmp_path / "run", tokenizer="text8", length=6)
    return load_run(tmp_path / "run")


def clock(kind: str, t: Tensor, vocab: int) -> Tensor:
    return reference.warp(t, vocab) if kind == "flm" else t


def times_of(kind: str, steps: int, vocab: int) -> list[float]:
    """Where the published samplers stand: equally spaced on the model's clock, inverted by bisection."""
    found = []
    for tau in torch.linspace(0, 1, steps + 1, dtype=F64)[1:-1]:
        low, high = torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if clock(kind, middle, vocab) < tau else (low, middle)
        found.append(float(low))
    return [0.0, *found, 1.0]


@pytest.mark.parametrize("name", ["flm", "fmlm", "semicat rms"])
def test_samples_are_those_of_the_published_sampler(name: str, tmp_path: Path) -> None:
    run, a = imported(name, tmp_path), case(name, replace(SMALL, vocab=27))
    config = default_sampling(run, 5)
    assert config.sampler == ("euler" if name == "flm" else "flow_map")
    times = times_of(a.kind, 5, 27)
    torch.testing.assert_close(config.times(run).double(), torch.tensor(times, dtype=F64), atol=1e-4, rtol=0)
    shape = (4, 6, 27)
    mine = sample(
        run.flow_map, SAMPLERS[config.sampler], config.times(run), shape, generator=torch.Generator().manual_seed(3)
    )
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
    endpoint = x
    for s, t in pairwise(times):
        at = torch.full(shape[:2], s)
        endpoint = a.forward(x, at, at if name == "flm" else torch.full(shape[:2], t)).softmax(-1)
        x = x + (t - s) * (endpoint - x) / (1 - s)
    assert torch.equal(mine, endpoint.argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_imports_samples_scores_and_exports(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = case(name, replace(LARGE, vocab=27))
    prefix = "backbone._orig_mod." if a.kind == "flm" else "net._orig_mod."
    source, run = written(a, tmp_path / "source", prefix), str(tmp_path / "run")
    cap = ["--logit-cap", str(a.cap)] if a.cap else []
    arguments = ["--format", a.kind, "--out", run, "--tokenizer", "text8", "--length", "6", *cap]
    assert main(["import", str(source.parent), *arguments]) == 0
    assert ("base flow" if name == "flm" else "flow map") in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    assert main(["export", run, "--out", str(tmp_path / "dir")]) == 0
    said = []
    for folder in (run, str(tmp_path / "dir")):
        capsys.readouterr()
        assert main(["sample", folder, "--num", "2", "--seed", "1"]) == 0
        assert main(["sample", folder, "--num", "1", "--prompt", "ab", "--sampler", "renoise", "--steps", "2"]) == 0
        assert main(["score", folder, str(tmp_path / "text.txt"), "--samples", "2"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert load_run(tmp_path / "run").config.published == load_run(tmp_path / "dir").config.published


def test_bounds_count_what_the_network_sees(tmp_path: Path) -> None:
    run = imported("flm", tmp_path, Sizes(width=16))
    basis = seen_directions(run.flow_network)
    assert basis is not None
    assert basis.shape == (27, 16)


def test_imported_networks_are_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported("flm", tmp_path)
    assert main(["distill", "--from", str(tmp_path / "run"), "--out", str(tmp_path / "map")]) == 2
    assert "was imported" in capsys.readouterr().err
    assert not (tmp_path / "map").exists()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("flm", {"vocab_embed.embedding": None}, "misses vocab_embed.embedding"),
        ("flm", {"output_layer.linear.weight": None}, "misses output_layer.linear.weight"),
        ("flm", {"blocks.1.norm2.weight": None}, r"misses blocks.1.norm2.weight \(1 in all\)"),
        ("flm", {"blocks.1.norm2.bias": torch.zeros(32)}, "has unknown blocks.1.norm2.bias"),
        ("flm", {"blocks.0.mlp.2.weight": torch.zeros(32, 64)}, r"mlp.2.weight has shape \(32, 64\)"),
        ("flm", {"rotary_emb.inv_freq": torch.ones(8)}, "buffer rotary_emb.inv_freq is not what"),
        ("flm", {"rotary_emb.inv_freq": 10_000.0 ** -(torch.arange(0, 14, 2) / 14)}, "no multiple of the 14"),
        ("fmlm", {"sigma_map_prime.mlp.2.bias": None}, "misses sigma_map_prime.mlp.2.bias"),
        ("semicat rms", {"vocab_embed.film_beta.bias": None}, "misses vocab_embed.film_beta.bias"),
        ("semicat naive", {"t_map.freqs": torch.zeros(128)}, "buffer t_map.freqs"),
        ("semicat naive", {"vocab_embed.layer_norm.weight": torch.zeros(1)}, "unknown vocab_embed.layer_norm.weight"),
    ],
)
def test_names_and_shapes_are_strict(name: str, change: dict[str, Tensor | None], said: str) -> None:
    a = case(name)
    weights = {key: tensor for key, tensor in (a.weights | change).items() if tensor is not None}
    with pytest.raises(UserError, match=said):
        understand(Source("a file", weights, {}), a.kind)


def test_the_other_format_is_refused_and_training_leftovers_are_not() -> None:
    a = case("flm")
    with pytest.raises(UserError, match="no checkpoint of format semicat: it misses rotary_emb"):
        understand(Source("a file", a.weights, {}), "semicat")
    more = {"learnable_loss_weighting.mlp.0.weight": torch.zeros(3, 3), "teacher_model.head.weight": torch.zeros(2)}
    assert understand(Source("a file", a.weights | more, {}), "flm").vocab_size == 11


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (reference.flm_shapes(Sizes(30_522, 768, 12, 128, 12, 128), False), "flm"),
        (reference.flm_shapes(Sizes(50_257, 768, 12, 128, 12, 1024), True), "flm"),
        (reference.semicat_shapes(Sizes(27, 768, 12, 128, 12, 256), "naive"), "semicat"),
        (reference.semicat_shapes(Sizes(30_522, 768, 12, 128, 12, 128), "rms"), "semicat"),
    ],
)
def test_published_sizes_are_understood(shapes: dict[str, tuple[int, ...]], kind: Any) -> None:
    vocab = shapes["output_layer.linear.weight"][0]
    sizes = Sizes(vocab, 768, 12, 128, 12, 256)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    checkpoint = understand(Source("a file", weights | reference.buffers(kind, sizes), {}), kind)
    got = checkpoint.network
    assert (got.width, got.blocks, got.heads, got.conditioning, got.mlp_ratio) == (768, 12, 12, 128, 4)
    assert checkpoint.vocab_size == vocab
    assert checkpoint.length == (256 if kind == "semicat" else None)
    assert sum(t.numel() for t in checkpoint.tensors.values()) == sum(t.numel() for t in weights.values())


def test_plain_pickles_are_read_and_others_are_not_run(tmp_path: Path) -> None:
    a = case("semicat naive", replace(SMALL, vocab=27))
    state = {f"net.{name}": tensor for name, tensor in a.weights.items()}
    torch.save({"state_dict": state, "epoch": 3, "ema": {"shadow_params": []}}, tmp_path / "last.ckpt")
    made = import_checkpoint(str(tmp_path), "semicat", tmp_path / "run", tokenizer="text8")
    assert made.average
    assert made.config.data.length == 6
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(ran),)

    torch.save({"state_dict": state, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="runs no code of a checkpoint") as caught:
        read_source(str(tmp_path / "evil.ckpt"))
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    for content in ([1, 2], {"state_dict": {"a": 3}}):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(UserError, match="holds no state dict"):
            read_source(str(tmp_path / "odd.pt"))


def test_windows_and_tokenizers(tmp_path: Path) -> None:
    a = case("flm", replace(SMALL, vocab=270))
    file = written(a, tmp_path / "source")
    tokenizer = train_bpe(["the cat sat on the mat, and the rat saw the cat"] * 3, 270)
    assert tokenizer.vocab_size == 270
    save(tokenizer, tmp_path / "bpe")
    save(Text8Tokenizer(), tmp_path / "text8")
    give: dict[str, Any] = {"tokenizer": str(tmp_path / "bpe")}
    with pytest.raises(UserError, match="which tokenizer has these 270 tokens"):
        import_checkpoint(str(file), "flm", tmp_path / "run")
    with pytest.raises(UserError, match="has 27 tokens, the checkpoint 270"):
        import_checkpoint(str(file), "flm", tmp_path / "run", tokenizer=str(tmp_path / "text8"))
    with pytest.raises(UserError, match="--length"):
        import_checkpoint(str(file), "flm", tmp_path / "run", **give)
    assert not (tmp_path / "run").exists()
    (file.parent / "config.json").write_text('{"config": {"model": {"length": 9}}, "vocab_size": 270}')
    assert import_checkpoint(str(file), "flm", tmp_path / "run", **give).config.data.length == 9
    assert import_checkpoint(str(file), "flm", tmp_path / "two", length=7, **give).config.data.length == 7
    assert load_run(tmp_path / "two").tokenizer.name == tokenizer.name


def test_wrong_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "half.safetensors").write_bytes(b"12")
    for source, said in (
        (str(tmp_path / "nowhere"), "does not exist"),
        ("nobody/nothing-of-this-name", "nothing on this disk, and its model.safetensors cannot be fetched"),
        (str(tmp_path / "empty"), "holds no checkpoint"),
        (str(tmp_path / "notes.txt"), "is no checkpoint"),
        (str(tmp_path / "half.safetensors"), "is damaged"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            read_source(source)
        assert "\n" not in str(caught.value)


def test_the_published_churn_is_renoising(tmp_path: Path) -> None:
    """flm's sampler with gamma = 1 jumps to t = 1 and adds noise: `renoise`, here at its own equally spaced times."""
    run = imported("fmlm", tmp_path)
    times = SamplingConfig(steps=4, sampler="renoise").times(run)
    torch.testing.assert_close(reference.warp(times, 27), torch.linspace(0, 1, 5, dtype=F64), atol=1e-4, rtol=0)
