"""`catmaps export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Export:
    """A run as a directory for Hugging Face: config.json, model.safetensors, tokenizer.json, model card and the small
    modules of `AutoModel.from_pretrained(DIR, trust_remote_code=True)`, which need catmaps installed.

    `catmaps sample` and `catmaps score` take the directory in place of the run. With --format run it is a run's folder
    without checkpoints and teacher, to be passed on to users of catmaps.
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    out: Path
    """Folder to write; new or empty."""
    format: Literal["hf", "run"] = "hf"
    half: bool = False
    """Matrices in bf16: half the size, and what products round them to anyhow."""
    licence: str | None = None
    """Of the weights, by the Hub's name, as in apache-2.0; goes into the model card."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.hub.export import export, export_run
        from catmaps.model import load_run

        write = export if self.format == "hf" else export_run
        written = write(load_run(self.run_), self.out, licence=self.licence, half=self.half)
        files = [file.name for file in written]
        print(f"{self.out}: {', '.join(files)}")
        return {"run": str(self.run_), "out": str(self.out), "files": files}


def read(name: str, args: list[str]) -> Export:
    return parse(Export, args, f"catmaps {name}")
