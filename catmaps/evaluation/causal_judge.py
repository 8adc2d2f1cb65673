"""A causal language model as a judge of text: nats, tokens and characters of each text, and vectors for `divergence`.

Rules, the same for every judge:

* A text is tokenised by the judge's own tokeniser, without special tokens; a text that spells one is read letter by
  letter.
* The first token of a text has no context. It is not scored, and its characters are not counted.
* A text of more than `context` tokens is read in windows, of which each scores what no earlier one has scored
  (`windows`). No text sees another.

Weights are read from safetensors only and no code of a checkpoint is run.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Integer
from torch import Tensor

from catmaps.errors import UserError

LONGEST_CONTEXT = 1024  # unless asked for more: what judges have in common
EDGE = 2**20  # bytes of either end of a file of weights that its fingerprint is made of
Precision = Literal["float32", "bfloat16", "float16"]


class Window(NamedTuple):
    """Tokens [start, stop) are read, those from `scored` on are scored."""

    start: int
    stop: int
    scored: int


class Scores(NamedTuple):
    """What a judge says of each of n texts; tokens, characters and UTF-8 bytes are those that were scored."""

    nats: Float64[np.ndarray, "n"]
    tokens: Int64[np.ndarray, "n"]
    chars: Int64[np.ndarray, "n"]
    bytes: Int64[np.ndarray, "n"]
    vectors: Float32[np.ndarray, "n d"] | None
    """Last hidden state at the last token of the first window; 0 for a text without tokens."""


def windows(length: int, context: int, stride: int) -> list[Window]:
    """Cuts a text into windows of `context` tokens, each `stride` further than the one before.

    The first scores all its tokens but the very first; each later one its last `stride` tokens, which so have at least
    context - stride tokens before them. The last window ends with the text, is as long as the others and scores what is
    left. Every token but the first is scored once.

    Args:
        length: Tokens of the text.
        context: Tokens of a window, at least 2.
        stride: 1 <= stride < context.
    """
    if length < 2:
        return []
    cut = [Window(0, min(context, length), 1)]
    while (seen := cut[-1].stop) < length:
        stop = min(seen + stride, length)
        cut.append(Window(stop - context, stop, seen))
    return cut


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalJudge:
    """A causal language model of the transformers library; made by `load_causal_judge`.

    Attributes:
        name: As the user gave it.
        fingerprint: Commit of a published model, else of the files' ends: tells two models of one name apart.
        model: In evaluation mode.
        tokenizer: A fast one.
        context: Tokens that the model sees at most.
        stride: See `windows`.
        precision: Of the weights and of all but the softmax and the sums.
        batch_tokens: Tokens, padding included, that are read together.
    """

    name: str
    fingerprint: str
    model: Any
    tokenizer: Any
    context: int
    stride: int
    precision: Precision = "float32"
    batch_tokens: int = 2048

    @property
    def id(self) -> str:
        """Everything that its figures depend on, in one word."""
        return f"{self.name}@{self.fingerprint}/{self.precision}/context{self.context}/stride{self.stride}"

    def encode(self, text: str) -> Integer[np.ndarray, "l"]:
        """Ids of the text's tokens."""
        return np.array(self._tokenise([text])["input_ids"][0], dtype=np.int64)

    @torch.inference_mode()
    def score(
        self, texts: Sequence[str], *, vectors: bool = False, progress: Callable[[float], None] | None = None
    ) -> Scores:
        """Scores texts, each on its own; their order and their company change nothing but rounding.

        Args:
            texts: Any; a text of fewer than two tokens scores nothing.
            vectors: Also return the vectors.
            progress: Told the share of the windows that are done.
        """
        if not texts:
            raise UserError("there are no texts to judge")
        encoded = self._tokenise(texts)
        ids: list[list[int]] = encoded["input_ids"]
        self._check_ids(ids)
        nats, ends = self._pass(ids, vectors, progress)
        firsts = [row[0][1] if row else 0 for row in encoded["offset_mapping"]]
        rest = [text[end:] if len(row) > 1 else "" for text, end, row in zip(texts, firsts, ids, strict=True)]
        return Scores(
            nats,
            np.array([max(0, len(row) - 1) for row in ids], dtype=np.int64),
            np.array([len(text) for text in rest], dtype=np.int64),
            np.array([len(text.encode(errors="replace")) for text in rest], dtype=np.int64),
            torch.stack(torch.broadcast_tensors(*ends)).numpy() if vectors else None,
        )

    def _pass(
        self, ids: list[list[int]], vectors: bool, progress: Callable[[float], None] | None
    ) -> tuple[Float64[np.ndarray, "n"], list[Tensor]]:
        """Nats of every text and, if wanted, its vector (a 0 without dimensions for a text without tokens)."""
        jobs = [(i, w) for i, row in enumerate(ids) for w in windows(len(row), self.context, self.stride)]
        jobs += [(i, Window(0, 1, 1)) for i, row in enumerate(ids) if vectors and len(row) == 1]
        nats, ends, done = np.zeros(len(ids)), [torch.zeros(()) for _ in ids], 0
        for batch in self._batches(jobs):
            rows = [ids[i][w.start : w.stop] for i, w in batch]
            output = self._read(rows, vectors)
            for (i, w), row, logits in zip(batch, rows, output.logits, strict=True):
                first = w.scored - w.start
                nats[i] += _nats(logits[first - 1 : len(row) - 1], row[first:])
            if vectors:
                for (i, w), hidden in zip(batch, output.hidden_states[-1], strict=True):
                    if w.start == 0:
                        ends[i] = hidden[w.stop - 1].float().cpu()
            done += len(batch)
            if progress is not None:
                progress(done / len(jobs))
        return nats, ends

    def _tokenise(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            [text.encode(errors="replace").decode() for text in texts],  # no lone surrogates
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )

    def _check_ids(self, ids: list[list[int]]) -> None:
        size = self.model.get_input_embeddings().num_embeddings
        if max((max(row) for row in ids if row), default=0) >= size:
            raise UserError(f"the tokeniser of judge {self.name} has ids beyond its {size} embeddings: they do not fit")

    def _batches(self, jobs: list[tuple[int, Window]]) -> Iterator[list[tuple[int, Window]]]:
        """Windows of like length together, the longest first; none is left out."""
        jobs = sorted(jobs, key=lambda job: job[1].start - job[1].stop)
        while jobs:
            longest = jobs[0][1].stop - jobs[0][1].start
            num = max(1, self.batch_tokens // longest)
            yield jobs[:num]
            jobs = jobs[num:]

    def _read(self, rows: list[list[int]], hidden: bool) -> Any:
        """The model's output on rows padded at their right, where a causal model does not look."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        device = self.model.device
        return self.model(input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=hidden)


def _nats(logits: Tensor, targets: list[int]) -> float:
    """-log p of the targets, summed; softmax in fp32, sum in fp64."""
    right = torch.tensor(targets, device=logits.device, dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits.float(), right, reduction="none").double().sum().item()


def load_causal_judge(
    name: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    precision: Precision = "float32",
    device: torch.device | None = None,
    alias: str | None = None,
) -> CausalJudge:
    """Loads a judge by its name on the Hugging Face hub or from a directory.

    Args:
        name: Such as gpt2-large, or a directory with config.json, safetensors and tokenizer files.
        context: Tokens it may see; None: what it was built for, at most 1,024.
        stride: See `windows`; None: half the context.
        precision: Of the weights.
        device: None: the CPU.
        alias: The name it goes by; None: `name`.

    Raises:
        UserError: transformers is not installed; the model is not there or cannot be read without running its code or
            a pickle; it is not causal; its tokeniser is of the slow kind or has too many ids.
    """
    transformers = import_transformers()
    safe: dict[str, Any] = {"trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **safe)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=precision, use_safetensors=True, **safe)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"cannot load the judge {name}: {reason[0]} (a directory with config.json, safetensors and a tokeniser, or "
            "a name on the hub; without a network: `catmaps judge --fetch`, then --judge smollm2)"
        ) from error
    model = model.to(device or torch.device("cpu")).eval().requires_grad_(False)
    model.config.use_cache = False
    limit: int | None = getattr(model.config, "max_position_embeddings", None)  # recurrent models have none
    seen = min(limit or LONGEST_CONTEXT, LONGEST_CONTEXT) if context is None else context
    step = max(1, seen // 2) if stride is None else stride
    if not (2 <= seen <= (limit or seen) and 1 <= step < seen):
        raise UserError(
            f"judge {name}: the context must lie between 2 and {limit or 'any number of'} tokens, the stride below it, "
            f"not {seen} and {step}"
        )
    if not tokenizer.is_fast:
        raise UserError(f"the judge {name} has a slow tokeniser, which does not say where tokens end; choose another")
    _check_causal(name, model)
    return CausalJudge(
        name=alias or name,
        fingerprint=_fingerprint(name, model),
        model=model,
        tokenizer=tokenizer,
        context=seen,
        stride=step,
        precision=precision,
    )


def import_transformers() -> Any:
    """The library, quiet; UserError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("judging by a language model needs transformers: pip install 'catmaps[eval]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@torch.inference_mode()
def _check_causal(name: str, model: Any) -> None:
    """Refuses models that look ahead: their figures would be worthless."""
    size = model.get_input_embeddings().num_embeddings
    rows = torch.arange(6).remainder(size).repeat(2, 1).to(model.device)
    rows[1, -1] = (rows[1, -1] + 1) % size
    first, second = model(input_ids=rows).logits[:, :-1].float()
    if not torch.allclose(first, second, atol=1e-3, rtol=1e-2):
        raise UserError(f"the judge {name} is not causal: its predictions change with later tokens; choose another")


def _fingerprint(name: str, model: Any) -> str:
    folder = Path(name)
    if not folder.is_dir():
        return str(model.config._commit_hash)[:12]
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(str(size).encode() + stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read())
    return digest.hexdigest()[:12]
