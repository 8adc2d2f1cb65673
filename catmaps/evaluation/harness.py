"""A run as a model of lm-eval (the Language Model Evaluation Harness): what docs/evaluation.md describes.

`CatmapsLM` is made when it is first asked for, because its base class is lm-eval's, which is an extra.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from catmaps.errors import UserError
from catmaps.evaluation.conditional import Draw, Scorer, content_hash, drawing
from catmaps.evaluation.encoding import Encoder, Pair
from catmaps.evaluation.questions import Budget, Question, answer, likeliest
from catmaps.evaluation.writing import Writing, write
from catmaps.generation import default_sampling
from catmaps.model import Run, load_run

if TYPE_CHECKING:
    from lm_eval.api.model import LM

NAME = "catmaps"


@runtime_checkable
class Request(Protocol):
    """What is read of lm-eval's `Instance`."""

    task_name: str | None
    doc_id: int | None

    @property
    def args(self) -> tuple[Any, ...]: ...


class Asked(NamedTuple):
    """What makes requests one question: they are of one item of one task, or have the same context."""

    task: str | None
    doc: int | str
    prompted: bool
    """Where an unconditional score is asked for beside the conditional one, it is a question of its own."""

    @classmethod
    def of(cls, request: Request) -> "Asked":
        context = request.args[0]
        return cls(request.task_name, context if request.doc_id is None else request.doc_id, bool(context))

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task or 'request'}, question {self.doc if isinstance(self.doc, int) else repr(self.doc[:40])}"


@dataclass(frozen=True)
class Record:
    """How a question, a long text or a writing task was dealt with: what the sample logs say beside lm-eval's own."""

    task: str | None
    doc: int | str | None
    nats: tuple[float, ...] = ()
    """Upper bound on -log p of each distinct continuation, in the order of its requests; of a text one."""
    stderr: tuple[float, ...] = ()
    """Their Monte-Carlo standard errors."""
    tokens: tuple[int, ...] = ()
    """Scored tokens of each."""
    samples: int = 0
    """Draws of each; for a text of each of its windows."""
    decided: bool | None = None
    """Whether the draws tell the best continuation from the others; None where there is nothing to tell."""
    lead: float | None = None
    """Of the best over the closest other one, in standard errors of their paired difference."""
    truncated: int = 0
    """Requests whose prompt has lost its beginning."""


class Harness:
    """Everything of `CatmapsLM` but its base class.

    Args:
        run: A run of family flow, or its folder.
        samples: Most draws of the path per continuation (`Budget`).
        first: Draws of the first round.
        z: Standard errors at which a question is decided.
        rolling_samples: Draws of the path per window of a long text.
        seed: Of all draws.
        truncate: "left" drops the beginning of prompts that are too long; None refuses them.
        workers: Processes that share the rows, for a folder's run on CPUs; results do not depend on it.
        steps: Sampler steps of a block for `generate_until`; by default 4 for a map, 64 for a base.
        report: Sees a line about progress now and then.
        batch_size, max_batch_size, device: lm-eval gives them; batches are made by size, on the run's device.

    Raises:
        UserError: The run is a baseline, or an option is out of range.
    """

    def __init__(
        self,
        run: Run | Path | str,
        *,
        samples: int = Budget.samples,
        first: int = Budget.first,
        z: float = Budget.z,
        rolling_samples: int = Budget.rolling,
        seed: int = Budget.seed,
        truncate: str | None = None,
        workers: int = 1,
        steps: int | None = None,
        report: Callable[[str], None] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        del batch_size, max_batch_size, device
        super().__init__()
        if workers < 1:
            raise UserError("--workers must be at least 1")
        if truncate not in (None, "left"):
            raise UserError(f"--truncate can only be left, not {truncate}")
        self.run = run if isinstance(run, Run) else load_run(Path(run))
        self.path = None if isinstance(run, Run) else Path(run)
        self.budget = Budget(samples=samples, first=first, z=z, rolling=rolling_samples, seed=seed)
        self.encoder = Encoder(self.run.tokenizer, self.run.config.data.length, truncate == "left")
        self.scorer = Scorer.of(self.run)
        self.workers = workers if self.scorer.device.type == "cpu" else 1
        self.sampling = default_sampling(self.run, steps)
        self.report = report or (lambda line: None)
        self.records: list[Record] = []
        """Of everything so far."""

    @property
    def tokenizer_name(self) -> str:
        return self.run.tokenizer.name

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results."""
        return {"run": str(self.run.path), "seed": self.budget.seed, "samples": self.budget.samples}

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(-bound in nats, is_greedy) of each (context, continuation); an empty continuation is certain: 0.

        is_greedy is found out for questions of a single continuation, where accuracy is made of it (`likeliest`), and
        is False in multiple choice, where accuracy compares bounds.

        Raises:
            UserError: A request does not fit, or cannot be written in the run's vocabulary; nothing has been scored.
        """
        asked = [Asked.of(request) for request in requests]
        texts: dict[Asked, list[tuple[str, str]]] = {}
        for one, request in zip(asked, requests, strict=True):
            if _text(request) not in texts.setdefault(one, []):
                texts[one].append(_text(request))
        pairs = {one: self._pairs(one, found) for one, found in texts.items()}
        questions = {one: self._question(texts[one], pairs[one]) for one in texts}
        lone = [one for one in texts if len(texts[one]) == 1]
        with self._draw() as draw:
            answer(list(questions.values()), draw, self._progress("questions"))
            greedy = dict(zip(lone, likeliest([questions[one] for one in lone], draw), strict=True))
        self.records += [_record(one, questions[one], pairs[one]) for one in texts]
        return [
            (-float(questions[one].nats[texts[one].index(_text(request))]), greedy.get(one, False))
            for one, request in zip(asked, requests, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """-bound in nats of each whole text, by the chain rule over windows (`Encoder.windows`); 0 for an empty one."""
        budget = replace(self.budget, samples=self.budget.rolling)
        texts = [
            [
                Question([prompt], [piece], [1], budget, content_hash(prompt, piece))
                for prompt, piece in self.encoder.windows(request.args[0])
            ]
            for request in requests
        ]
        with self._draw() as draw:
            answer([window for text in texts for window in text], draw, self._progress("windows"))
        records = []
        for request, text in zip(requests, texts, strict=True):
            nats = sum((float(window.nats[0]) for window in text), 0.0)
            stderr = math.hypot(*(float(window.stderr[0]) for window in text))
            tokens = sum(len(window.continuations[0]) for window in text)
            records.append(
                Record(request.task_name, request.doc_id, (nats,), (stderr,), (tokens,), samples=budget.samples)
            )
        self.records += records
        return [-record.nats[0] for record in records]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Text after each context up to a stop string, the end of the document, or the most tokens (`write`).

        Raises:
            UserError: An option that is not understood, or a prompt that leaves no room for a block.
        """
        asked = [
            Writing.of(request.args[0], request.args[1], self.encoder, Asked.of(request).name) for request in requests
        ]
        written = write(self.run, asked, replace(self.sampling, seed=self.budget.seed))
        self.records += [
            Record(request.task_name, request.doc_id, samples=1, truncated=int(one.truncated))
            for request, one in zip(requests, asked, strict=True)
        ]
        return [written[one] for one in asked]

    def _pairs(self, asked: Asked, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        found: dict[tuple[str, str], Pair] = {}
        for context in dict(texts):
            mine = [text for text in texts if text[0] == context]
            pairs = self.encoder.pairs(context, [continuation for _, continuation in mine], asked.name)
            found |= dict(zip(mine, pairs, strict=True))
        return [found[text] for text in texts]

    def _question(self, texts: Sequence[tuple[str, str]], pairs: Sequence[Pair]) -> Question:
        # lm-eval's acc_norm divides by the characters of a choice, without the space in front of it.
        characters = [len(continuation.strip()) for _, continuation in texts]
        return Question([pair.prompt for pair in pairs], [pair.continuation for pair in pairs], characters, self.budget)

    def _draw(self) -> AbstractContextManager[Draw]:
        return drawing(self.scorer, self.workers, self.path)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.report(f"{done} of {total} {what} scored")


def _text(request: Request) -> tuple[str, str]:
    context, continuation = request.args[:2]
    return context, continuation


def _record(asked: Asked, question: Question, pairs: Sequence[Pair]) -> Record:
    several = len(pairs) > 1
    return Record(
        asked.task,
        asked.doc,
        tuple(question.nats.tolist()),
        tuple(question.stderr.tolist()),
        tuple(len(pair.continuation) for pair in pairs),
        samples=question.samples,
        decided=question.decided if several else None,
        lead=question.lead() if several else None,
        truncated=sum(pair.truncated for pair in pairs),
    )


@cache
def lm_class() -> type[Any]:
    """`CatmapsLM`: the harness as a model of lm-eval, registered there as "catmaps".

    Raises:
        UserError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(f"this needs lm-eval ({error}): pip install 'catmaps[eval]'") from error

    @register_model(NAME)
    class CatmapsLM(Harness, LM):
        __doc__ = Harness.__doc__

    return CatmapsLM


if TYPE_CHECKING:

    class CatmapsLM(Harness, LM): ...

else:

    def __getattr__(name: str) -> Any:
        if name == "CatmapsLM":
            return lm_class()
        raise AttributeError(f"module {__name__} has no attribute {name}")
