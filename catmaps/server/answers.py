"""Texts as OpenAI's API says them."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from catmaps.server.asks import Ask
from catmaps.server.pieces import Ids
from catmaps.server.trajectory import as_json
from catmaps.server.writing import Choice, Step
from catmaps.text.tokenizers import Tokenizer


class Answers:
    """The JSON of one request's answer, whole or in parts."""

    def __init__(self, ask: Ask, model: str, fingerprint: str, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._ask, self._tokenizer, self._strings = ask, tokenizer, strings
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Everything at once."""
        said = [self._choice(choice) for choice in choices]
        return {**self._head, "choices": said, "usage": self._usage(choices), "catmaps": self._how(choices)}

    def step(self, step: Step) -> dict[str, Any]:
        """A draft: `text`, whose parts a client joins, stays empty."""
        said = {"index": step.index, "text": "", "finish_reason": None, "logprobs": None}
        return {**self._head, "choices": [{**said, "draft": step.text, "step": step.step, "t": round(step.t, 6)}]}

    def end(self, choice: Choice) -> dict[str, Any]:
        """A text of a stream."""
        return {**self._head, "choices": [self._choice(choice)], "catmaps": self._how([choice])}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The counts, at the end of a stream."""
        return {**self._head, "choices": [], "usage": self._usage(choices)}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        prompt = sum(order.given for order in self._ask.orders)
        written = 0
        for choice in choices:
            order = self._ask.orders[choice.index // self._ask.copies]
            written += len(choice.ids) - (order.given if order.whole else 0)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _how(self, choices: Sequence[Choice]) -> dict[str, Any]:
        settings = self._ask.settings
        windows = max((len(choice.written.windows) for choice in choices), default=0)
        return {
            "seed": self._ask.seed,
            "sampler": settings.sampler,
            "num_steps": settings.steps,
            "network_calls": settings.config.calls * windows,
            "seconds": round(max((choice.written.seconds for choice in choices), default=0.0), 4),
            "batch_rows": max((choice.written.rows for choice in choices), default=0),
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        order = self._ask.orders[choice.index // self._ask.copies]
        prompt = self._tokenizer.decode(order.tokens) if self._ask.echo else ""
        said: dict[str, Any] = {
            "index": choice.index,
            "text": prompt + choice.text,
            "finish_reason": choice.finish,
            "logprobs": self._logprobs(choice) if self._ask.logprobs else None,
        }
        if self._ask.logprobs:
            bounds = [share for share in choice.shares if share is not None]
            variance = sum(share.stderr**2 for share in bounds)
            said["bound"] = {"nats": sum(share.nats for share in bounds), "stderr_nats": variance**0.5}
        if self._ask.trajectory is not None:
            window = choice.written.windows[-1]
            said["trajectory"] = as_json(choice.written.drafts, window.known, self._ask.settings, self._strings)
        return said

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        """Minus what each token adds to the bound; null for given ones, which nothing is said of."""
        order = self._ask.orders[choice.index // self._ask.copies]
        ids, values = (order.tokens if self._ask.echo else choice.ids), list[float | None]()
        for window, shares in zip(choice.written.windows, choice.shares, strict=True):
            assert shares is not None
            own = [None if k else -v for k, v in zip(window.known.tolist(), shares.per_token, strict=True)]
            values += own[order.shown] if order.known is not None else [v for v in own if v is not None]
        tokens, offsets = split(ids, self._tokenizer)
        return {
            "tokens": tokens,
            "token_logprobs": values[: len(tokens)],
            "top_logprobs": None,
            "text_offset": offsets,
        }


def split(ids: Ids, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    """The share of each token in the text of all, and where it begins."""
    whole = tokenizer.decode(ids)
    ends = np.maximum.accumulate([len(tokenizer.decode(ids[: k + 1])) for k in range(len(ids))] or [0])
    ends = np.minimum(ends, len(whole))[: len(ids)]
    starts = [0, *ends[:-1].tolist()][: len(ids)]
    return [whole[a:b] for a, b in zip(starts, ends.tolist(), strict=True)], starts
