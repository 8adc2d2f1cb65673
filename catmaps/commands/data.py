"""`catmaps data build`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from catmaps.cli import parse
from catmaps.errors import UserError


@dataclass(frozen=True)
class Build:
    """Token shards from text files (.txt, .jsonl, .parquet; folders are searched).

    Whole documents go to train, valid and test by a hash of their name.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Files and folders."""
    out: Path
    """Folder to write."""
    tokenizer: str = "text8"
    """text8 (27 symbols), bytes, bpe:SIZE (trained on the train split), or a tokenizer.json."""
    text_key: str = "text"
    """Field of the text in jsonl and parquet."""
    valid: float = 0.02
    """Share of documents for validation."""
    test: float = 0.04
    """Share of documents for the test split."""
    overwrite: bool = False
    """Replace shards that are in the way."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.text.build import build_from_paths

        manifest = build_from_paths(
            list(self.paths),
            self.tokenizer,
            self.out,
            text_key=self.text_key,
            valid=self.valid,
            test=self.test,
            overwrite=self.overwrite,
        )
        splits = {
            name: {"documents": split.documents, "tokens": split.tokens, "characters": split.characters}
            for name, split in manifest.splits.items()
        }
        for name, split in splits.items():
            print(f"{name}: {split['documents']} documents, {split['tokens']} tokens, {split['characters']} characters")
        print(f"shards: {self.out}. Next: catmaps train small --data.shards {self.out}")
        return {"shards": str(self.out), "tokenizer": manifest.tokenizer, "splits": splits}


def read(name: str, args: list[str]) -> Build:
    if args and args[0] in ("-h", "--help"):
        args = ["build", "--help"]
    if not args or args[0] != "build":
        raise UserError("which data command? there is one: catmaps data build PATH... --out DIR")
    return parse(Build, args[1:], f"catmaps {name} build")
