"""`catmaps import`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Import:
    """A published checkpoint as a run, for `catmaps sample` and `catmaps score`.

    flm: FLM and FMLM (david3684/FLM-B-LM1B, FLM-B-OWT, FMLM-B-LM1B, FMLM-B-OWT). semicat: the text models of CFM
    (olsdavis/semicat, network DIT), as safetensors or as a .ckpt of plain tensors. Code in a checkpoint is never run.
    """

    source: tyro.conf.Positional[str]
    """A .safetensors, .ckpt or .pt file, a folder with one, or a repository NAME[@REVISION] on the Hugging Face Hub."""
    format: Literal["flm", "semicat"]
    """Its layout."""
    out: Path
    """Folder of the run; new or empty."""
    tokenizer: str | None = None
    """text8, bytes, a tokenizer.json, or a repository on the Hub; default by vocabulary: 30,522 tokens
    google-bert/bert-base-uncased, 50,257 openai-community/gpt2."""
    length: int | None = None
    """Tokens of its window; default: as its files say, else 128 for 30,522 tokens and 1,024 for 50,257."""
    logit_cap: Annotated[float, tyro.conf.arg(metavar="CAP")] = 0.0
    """flm: logits are CAP tanh(logits / CAP), 30 in some revisions of its code; 0: as they are."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products in the blocks."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.errors import UserError
        from catmaps.hub.published import import_checkpoint

        if (self.length is not None and self.length < 1) or self.logit_cap < 0:
            raise UserError("--length must be at least 1 and --logit-cap not negative")
        if self.logit_cap and self.format != "flm":
            raise UserError("--logit-cap is for --format flm")
        made = import_checkpoint(
            self.source,
            self.format,
            self.out,
            tokenizer=self.tokenizer,
            length=self.length,
            logit_cap=self.logit_cap,
            precision=self.precision,
        )
        config, published = made.config, made.config.published
        assert published is not None
        kind = "flow map" if published.arrival else "base flow"
        shape = f"{config.network.blocks} blocks of width {config.network.width}, window {config.data.length}"
        how = f"{published.embedding} embedding, logit cap {published.logit_cap:g}"
        print(f"{self.out}: a {kind}, {shape}, {how}. Next: catmaps sample {self.out}")
        if made.average:
            print("note: the file also holds a moving average, a list without names, which is not read")
        return {"source": self.source, "out": str(self.out), "kind": kind, "config": asdict(config)}


def read(name: str, args: list[str]) -> Import:
    return parse(Import, args, f"catmaps {name}")
