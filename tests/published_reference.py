"""Checkpoints under the published names, with random weights, and what their networks compute, written out.

Nothing of catmaps is used: attention, norms, activations, rotary positions and the warp of time are formulas. Times may
differ by position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
F64 = torch.float64


@dataclass(frozen=True)
class Sizes:
    vocab: int = 11
    width: int = 32
    heads: int = 2
    conditioning: int = 8
    blocks: int = 2
    length: int = 6


def flm_shapes(sizes: Sizes, two_times: bool) -> dict[str, tuple[int, ...]]:
    d, c, v = sizes.width, sizes.conditioning, sizes.vocab
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (v, d)}
    for name in ("sigma_map", "sigma_map_prime")[: 1 + two_times]:
        shapes |= {f"{name}.mlp.0.weight": (c, 256), f"{name}.mlp.0.bias": (c,)}
        shapes |= {f"{name}.mlp.2.weight": (c, c), f"{name}.mlp.2.bias": (c,)}
    return shapes | _blocks(sizes, bias=False)


def semicat_shapes(sizes: Sizes, embedding: str) -> dict[str, tuple[int, ...]]:
    d, c, v = sizes.width, sizes.conditioning, sizes.vocab
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.seq.weight": (d, v), "vocab_embed.seq.bias": (d,)}
    if embedding == "rms":
        shapes = {
            "vocab_embed.proj.weight": (d, v),
            "vocab_embed.proj.bias": (d,),
            "vocab_embed.mlp.0.weight": (2 * d, d),
            "vocab_embed.mlp.0.bias": (2 * d,),
            "vocab_embed.mlp.2.weight": (d, 2 * d),
            "vocab_embed.mlp.2.bias": (d,),
            "vocab_embed.film_gamma.weight": (d, c),
            "vocab_embed.film_gamma.bias": (d,),
            "vocab_embed.film_beta.weight": (d, c),
            "vocab_embed.film_beta.bias": (d,),
            "vocab_embed.final_norm.weight": (d,),
        }
    for name in ("s_map", "t_map"):
        shapes |= {f"{name}.mlp.0.weight": (c, 256), f"{name}.mlp.0.bias": (c,)}
        shapes |= {f"{name}.mlp.2.weight": (c, c), f"{name}.mlp.2.bias": (c,)}
    return shapes | _blocks(sizes, bias=True)


def _blocks(sizes: Sizes, bias: bool) -> dict[str, tuple[int, ...]]:
    d, c, v = sizes.width, sizes.conditioning, sizes.vocab
    norms = ("weight", "bias")[: 1 + bias]
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(sizes.blocks):
        at = f"blocks.{n}."
        shapes |= {f"{at}norm{i}.{kind}": (d,) for i in (1, 2) for kind in norms}
        shapes |= {f"{at}attn_qkv.weight": (3 * d, d), f"{at}attn_out.weight": (d, d)}
        shapes |= {f"{at}mlp.0.weight": (4 * d, d), f"{at}mlp.0.bias": (4 * d,)}
        shapes |= {f"{at}mlp.2.weight": (d, 4 * d), f"{at}mlp.2.bias": (d,)}
        shapes |= {f"{at}adaLN_modulation.weight": (6 * d, c), f"{at}adaLN_modulation.bias": (6 * d,)}
    last = "output_layer."
    shapes |= {f"{last}norm_final.{kind}": (d,) for kind in norms}
    shapes |= {f"{last}adaLN_modulation.weight": (2 * d, c), f"{last}adaLN_modulation.bias": (2 * d,)}
    return shapes | {f"{last}linear.weight": (v, d), f"{last}linear.bias": (v,)}


def buffers(kind: str, sizes: Sizes) -> Weights:
    h = sizes.width // sizes.heads
    inverse = 1 / 10_000 ** (torch.arange(0, h, 2) / h)
    if kind == "flm":
        return {"rotary_emb.inv_freq": inverse}
    angles = torch.outer(torch.arange(sizes.length).float(), inverse)
    both = torch.cat([angles, angles], 1)[None, :, None, None].expand(1, -1, 3, 1, h)
    cos, sin = both.cos().clone(), both.sin().clone()
    cos[:, :, 2], sin[:, :, 2] = 1, 0
    frequencies = 10_000 ** (-torch.arange(128) / 128)
    return {
        "rotary_emb.cos_cached": cos,
        "rotary_emb.sin_cached": sin,
        "s_map.freqs": frequencies,
        "t_map.freqs": frequencies.clone(),
    }


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Of a size at which every part matters and no cap or softmax is saturated."""
    generator = torch.Generator().manual_seed(seed)
    scales = {name: (shape[-1] ** -0.5 if len(shape) > 1 else 0.3) for name, shape in shapes.items()}
    made = {name: scales[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + w if "norm" in name and name.endswith("weight") else w for name, w in made.items()}


def warp(t: Tensor, vocab: int) -> Tensor:
    """tau = 1 - V/(V-1) P(argmax of t e + (1-t) noise is wrong), by a fine sum over the right token's own noise."""
    z = torch.linspace(-10, 10, 20_001, dtype=F64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    u = (t.double() / (1 - t.double())).clamp_max(1e6)[..., None]
    below = 0.5 * (1 + torch.erf((z + u) / math.sqrt(2)))
    right = (below ** (vocab - 1) * density).sum(-1) * (z[1] - z[0])
    return 1 - vocab / (vocab - 1) * (1 - right)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _time(w: Weights, name: str, time: Tensor) -> Tensor:
    angle = time[..., None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=time.dtype) / 128)
    inner = _linear(w, f"{name}.mlp.0", torch.cat([torch.cos(angle), torch.sin(angle)], -1))
    return _linear(w, f"{name}.mlp.2", _silu(inner))


def _turned(x: Tensor) -> Tensor:
    """Pairs (i, i + h/2) as complex numbers, turned by position x 10,000^(-2i/h)."""
    length, h = x.shape[-2:]
    rate = 10_000.0 ** (-torch.arange(0, h, 2, dtype=x.dtype) / h)
    angle = torch.arange(length, dtype=x.dtype)[:, None] * rate
    z = torch.complex(x[..., : h // 2], x[..., h // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def _body(w: Weights, x: Tensor, condition: Tensor, heads: int, cap: float | None) -> Tensor:
    """Blocks and output layer; x (B, L, d), condition (B, L, c)."""
    width = x.shape[-1]
    h, number = width // heads, 0
    while f"blocks.{number}.attn_qkv.weight" in w:
        at = f"blocks.{number}."
        modulation = _linear(w, f"{at}adaLN_modulation", condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[..., i * width : (i + 1) * width] for i in range(6))
        qkv = _linear(w, f"{at}attn_qkv", _layer_norm(w, f"{at}norm1", x) * (1 + scale1) + shift1)
        mixed = []
        for head in range(heads):
            q, k, v = (qkv[..., i * width + head * h : i * width + (head + 1) * h] for i in range(3))
            score = _turned(q) @ _turned(k).transpose(1, 2) / math.sqrt(h)
            score = score if cap is None else cap * torch.tanh(score / cap)
            share = torch.exp(score - score.amax(-1, keepdim=True))
            mixed.append(share / share.sum(-1, keepdim=True) @ v)
        x = x + gate1 * _linear(w, f"{at}attn_out", torch.cat(mixed, -1))
        y = _gelu(_linear(w, f"{at}mlp.0", _layer_norm(w, f"{at}norm2", x) * (1 + scale2) + shift2))
        x, number = x + gate2 * _linear(w, f"{at}mlp.2", y), number + 1
    modulation = _linear(w, "output_layer.adaLN_modulation", condition)
    shift, scale = modulation[..., :width], modulation[..., width:]
    return _linear(w, "output_layer.linear", _layer_norm(w, "output_layer.norm_final", x) * (1 + scale) + shift)


def flm(w: Weights, sizes: Sizes, logit_cap: float | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Logits of (x, s, t) in fp64, times (B, L)."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def forward(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        hidden = _time(w, "sigma_map", warp(s, sizes.vocab))
        if "sigma_map_prime.mlp.0.weight" in w:
            hidden = hidden + _time(w, "sigma_map_prime", warp(t, sizes.vocab))
        logits = _body(w, x.double() @ w["vocab_embed.embedding"], _silu(hidden), sizes.heads, 50.0)
        return logits if logit_cap is None else logit_cap * torch.tanh(logits / logit_cap)

    return forward


def semicat(w: Weights, sizes: Sizes) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Logits of (x, s, t) in fp64, times (B, L)."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def forward(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        x, s, t, v = x.double(), s.double(), t.double(), sizes.vocab
        condition = _silu(_time(w, "s_map", s)) + _silu(_time(w, "t_map", t - s))
        if "vocab_embed.seq.weight" in w:
            return _body(w, _linear(w, "vocab_embed.seq", x / math.sqrt(v)), condition, sizes.heads, None)
        scale = (s**2 + (1 - s) ** 2 * v + 1e-6) ** -0.5
        h = _linear(w, "vocab_embed.proj", scale[..., None] * x)
        h = h + 0.1 * _linear(w, "vocab_embed.mlp.2", _gelu(_linear(w, "vocab_embed.mlp.0", h)))
        h = (1 + _linear(w, "vocab_embed.film_gamma", condition)) * h + _linear(w, "vocab_embed.film_beta", condition)
        h = h / (h.square().mean(-1, keepdim=True) + 1e-8).sqrt() * w["vocab_embed.final_norm.weight"]
        return _body(w, h, condition, sizes.heads, None)

    return forward
