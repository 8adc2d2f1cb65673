"""`generate` by the conventions of transformers' diffusion models: their names, drafts to streamers, their output."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.generic import ModelOutput

from catmaps.generation import SamplingConfig, Watch, blocks, default_sampling, draw, next_window
from catmaps.model import Run


class CatmapsGenerationConfig(GenerationConfig):
    """How texts are drawn; generation_config.json holds it.

    Args:
        max_denoising_steps: Steps of the sampler in every block. None: 4 for a map, 64 for a base.
        sampler: renoise, flow_map, euler, heun or localisation; None: the model's default.
        kwargs: Of transformers' own, these are read: max_new_tokens (None: the rest of the window), max_length,
            temperature, top_p, guidance_scale, num_return_sequences, eos_token_id, pad_token_id,
            return_dict_in_generate.
    """

    def __init__(self, max_denoising_steps: int | None = None, sampler: str | None = None, **kwargs: Any) -> None:
        self.max_denoising_steps, self.sampler = max_denoising_steps, sampler
        super().__init__(**({"do_sample": True, "return_dict_in_generate": True} | kwargs))

    @classmethod
    def from_model_config(cls, model_config: Any) -> "CatmapsGenerationConfig":
        """Nothing about sampling stands in a model's configuration."""
        return cls()


@dataclass
class CatmapsGenerationOutput(ModelOutput):
    """What `generate` gives."""

    sequences: Tensor | None = None
    """(N, L): prompts and what follows; beyond the first end of a document the padding token, if there is one."""
    tokens_per_forward: Tensor | None = None
    """(N,): new tokens, without padding, over network calls."""


READ = {
    "max_denoising_steps", "sampler", "max_new_tokens", "max_length", "temperature", "top_p", "guidance_scale",
    "num_return_sequences", "eos_token_id", "pad_token_id", "return_dict_in_generate", "do_sample",
}  # fmt: skip


class GenerationMixin:
    """`generate` for a model that has `run` and `generation_config`."""

    run: Run
    generation_config: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Integer[Tensor, "b n"] | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        *,
        attention_mask: Integer[Tensor, "b n"] | Bool[Tensor, "b n"] | None = None,
        infill_mask: Bool[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> CatmapsGenerationOutput | Tensor:
        """Writes texts; given tokens never change.

        Args:
            input_ids: Prompts to go on from, or with `infill_mask` texts to fill; None: texts from nothing.
            generation_config: Instead of the model's; what it leaves open is the model's.
            streamer: Gets prompts by `put`, the likeliest tokens after every step by `put_draft` if it has that,
                finished blocks by `put`, then `end`. For prompts of one length.
            attention_mask: 0 at the padding on the left of shorter prompts, which the model never sees.
            infill_mask: True where tokens are to be written; those of `input_ids` stand elsewhere.
            generator: Source of randomness, on the model's device.
            seed: Instead of a generator; without both, torch's global one gives the seed.
            kwargs: Fields of the generation configuration, for this call.

        Returns:
            Sequences and tokens per forward; sequences alone with `return_dict_in_generate=False`.

        Raises:
            ValueError: Unknown or impossible arguments, named.
            UserError: A sampler or an option that is not for this model.
        """
        config = _merged(self.generation_config, generation_config, kwargs)
        if input_ids is None:
            if attention_mask is not None or infill_mask is not None:
                raise ValueError("attention_mask and infill_mask belong to input_ids")
            input_ids = torch.zeros(1, 0, dtype=torch.long)
        run, copies = self.run, config.num_return_sequences or 1
        lengths = _lengths(input_ids, attention_mask, run).repeat_interleave(copies)
        if streamer is not None and lengths.unique().numel() > 1:
            raise ValueError("a streamer takes prompts of one length: leave out attention_mask")
        ids = input_ids.to(run.device).long().repeat_interleave(copies, 0)
        source = _source(run, generator, seed)
        writer = _Writer(run, _sampling(run, config), source, streamer)
        if infill_mask is not None:
            sequences, counts, calls = writer.fill(ids, infill_mask.to(run.device).repeat_interleave(copies, 0))
        else:
            wanted = _wanted(config, ids.shape[1], run.config.data.length)
            new, calls = ids.new_zeros(len(ids), wanted), torch.zeros(len(ids), device=run.device)
            for length in lengths.unique().tolist():
                rows = (lengths == length).nonzero()[:, 0].to(run.device)
                new[rows], calls[rows] = writer.go_on(ids[rows][:, ids.shape[1] - length :], wanted)
            new, counts = _until_end(new, config)
            sequences = torch.cat([ids, new], 1)
        if not config.return_dict_in_generate:
            return sequences
        return CatmapsGenerationOutput(sequences=sequences, tokens_per_forward=counts / calls)

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: Any,
        from_pipeline: Any,
        name: Any,
        **kwargs: Any,
    ) -> None:
        """Called by transformers at the end of `from_pretrained`: reads generation_config.json, if there is one."""
        kwargs.pop("trust_remote_code", None)
        try:
            self.generation_config = generation_config or CatmapsGenerationConfig.from_pretrained(name, **kwargs)
        except OSError:
            self.generation_config = CatmapsGenerationConfig()


class _Written(NamedTuple):
    tokens: Tensor
    calls: float


class _Filled(NamedTuple):
    tokens: Tensor
    counts: Tensor
    calls: float


@dataclass
class _Writer:
    """Draws batches and tells a streamer."""

    run: Run
    sampling: SamplingConfig
    generator: torch.Generator
    streamer: Any

    def go_on(self, prompt: Int[Tensor, "b n"], wanted: int) -> _Written:
        """The tokens after prompts of one length, and network calls."""
        written, calls, parts = prompt.shape[1], 0, [prompt[:, :0]]

        def watch(t: float, endpoint: Tensor) -> None:
            context, _ = next_window(written, prompt.shape[1] + wanted - written, self.run.config.data.length)
            self._draft(endpoint[:, context:])

        self._put(prompt)
        for new in blocks(self.run, prompt, wanted, self.sampling, self.generator, self._watch(watch)):
            written, calls = written + new.shape[1], calls + self._calls(new.shape[1])
            self._put(new)
            parts.append(new)
        self._end()
        return _Written(torch.cat(parts, 1), float(calls))

    def fill(self, tokens: Int[Tensor, "b l"], blank: Bool[Tensor, "b l"]) -> _Filled:
        """Texts with their blanks filled, blanks of each, and network calls."""
        if tokens.shape != blank.shape or tokens.shape[1] > self.run.config.data.length or not bool(blank.any()):
            window = self.run.config.data.length
            raise ValueError(f"infill_mask marks blanks in input_ids, of its shape and at most {window} tokens long")
        self._put(tokens)
        watch = self._watch(lambda t, endpoint: self._draft(endpoint))
        shape = (tokens.shape[0], tokens.shape[1])
        drawn = draw(self.run, shape, tokens, ~blank, self.sampling, self.generator, watch)
        self._put(drawn)
        self._end()
        return _Filled(drawn, blank.sum(1), float(self._calls(int(blank.sum(1).max()))))

    def _calls(self, tokens: int) -> int:
        one_by_one = self.run.baseline is not None and self.run.baseline.sequential
        return tokens if one_by_one else self.sampling.calls

    def _watch(self, watch: Watch) -> Watch | None:
        return watch if hasattr(self.streamer, "put_draft") else None

    def _draft(self, endpoint: Tensor) -> None:
        self.streamer.put_draft(endpoint.argmax(-1).cpu())

    def _put(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())

    def _end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _merged(own: GenerationConfig, given: GenerationConfig | None, changes: dict[str, Any]) -> CatmapsGenerationConfig:
    """The model's configuration, under the one given, under the changes of one call."""
    unknown = sorted(set(changes) - READ)
    if unknown:
        raise ValueError(f"generate does not know {', '.join(unknown)}; it reads {', '.join(sorted(READ))}")
    merged: dict[str, Any] = {}
    for values in (own.to_dict(), {} if given is None else given.to_dict(), changes):
        merged |= {name: value for name, value in values.items() if name in READ and value is not None}
    if not merged.get("do_sample", True):
        raise ValueError("texts are drawn from noise: do_sample=False has no meaning; give a seed or a temperature")
    return CatmapsGenerationConfig(**merged)


def _lengths(
    ids: Integer[Tensor, "b n"], mask: Integer[Tensor, "b n"] | Bool[Tensor, "b n"] | None, run: Run
) -> Int[Tensor, "b"]:
    """Tokens of each prompt, which stand on the right."""
    size = run.tokenizer.vocab_size
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"input_ids must lie in [0, {size})")
    if mask is None:
        return torch.full((len(ids),), ids.shape[1])
    if mask.shape != ids.shape or bool((mask.long().diff(dim=1) < 0).any()):
        raise ValueError("attention_mask must have the shape of input_ids, and padding must stand on the left")
    return mask.long().sum(1).cpu()


def _sampling(run: Run, config: CatmapsGenerationConfig) -> SamplingConfig:
    sampling = default_sampling(run, config.max_denoising_steps)
    changes = {
        "sampler": config.sampler,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "guidance": config.guidance_scale,
    }
    return replace(sampling, **{name: value for name, value in changes.items() if value is not None})


def _source(run: Run, generator: torch.Generator | None, seed: int | None) -> torch.Generator:
    if generator is not None and seed is not None:
        raise ValueError("a generator or a seed, not both")
    return generator or run.generator(int(torch.randint(2**62, ())) if seed is None else seed)


def _wanted(config: CatmapsGenerationConfig, given: int, window: int) -> int:
    """New tokens: as asked for, or the rest of the window, or of a window's half where nothing is left of it."""
    wanted = config.max_new_tokens
    if wanted is None and config.max_length is not None:
        wanted = config.max_length - given
    wanted = (window - given if given < window else max(1, window // 2)) if wanted is None else wanted
    if wanted < 1:
        raise ValueError(f"nothing to write: prompts have {given} tokens, max_length is {config.max_length}")
    return wanted


def _until_end(new: Int[Tensor, "b n"], config: CatmapsGenerationConfig) -> tuple[Tensor, Tensor]:
    """Tokens with padding beyond the first end of a document, and how many of each are not padding."""
    counts = torch.full((len(new),), new.shape[1], device=new.device)
    if config.eos_token_id is None:
        return new, counts
    ends = torch.isin(new, torch.as_tensor(config.eos_token_id, device=new.device))
    beyond = ends.cumsum(1) - ends.long() > 0
    first = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    padding = first if config.pad_token_id is None else config.pad_token_id
    return new.masked_fill(beyond, padding), (~beyond).sum(1)
