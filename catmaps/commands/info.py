"""`catmaps info`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from catmaps.cli import parse


@dataclass(frozen=True)
class Info:
    """What a run, or a preset that has not run yet, is."""

    run_: tyro.conf.Positional[Path]
    """Folder of a run, or the name of a preset."""
    vocabulary: int = 50_304
    """For a preset: size of the vocabulary to count parameters at."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.model import load_run
        from catmaps.models import located
        from catmaps.presets import PRESETS

        if str(self.run_) in PRESETS and not located(self.run_).exists():
            config, name = PRESETS[str(self.run_)](), f"preset {self.run_}"
            body, words = count_parameters(config.network, self.vocabulary)
            facts: dict[str, Any] = {"vocabulary": self.vocabulary}
        else:
            from catmaps.evaluation.collect import read_metrics

            run = load_run(self.run_)
            config, name = run.config, f"run {self.run_}"
            body, words = run.network.num_parameters()
            rows = read_metrics(run)
            facts = {
                "kind": run.kind,
                "tokenizer": run.tokenizer.name,
                "vocabulary": run.tokenizer.vocab_size,
                "step": max((int(row["step"]) for row in rows), default=0),
                "training_minutes": round(max((row["seconds"] for row in rows), default=0.0) / 60, 2),
                "validation": next((row for row in reversed(rows) if "nelbo_bits_per_char" in row), None),
            }
        facts |= {"parameters_body": body, "parameters_vocabulary": words, "config": asdict(config)}
        print(f"{name}: {body / 1e6:.2f}M parameters in the body, {words / 1e6:.2f}M in the vocabulary")
        for key, value in facts.items():
            if key != "config":
                print(f"  {key}: {value}")
        return {"name": name, **facts}


def count_parameters(network: Any, vocabulary: int) -> tuple[int, int]:
    """(body, vocabulary) of a network that is never allocated."""
    import torch

    from catmaps.flow.evidence import OffDiagonalGain, TimeFeatures
    from catmaps.flow.times import uniform
    from catmaps.network.denoiser import FlowNetwork

    features = TimeFeatures(uniform())
    with torch.device("meta"):
        gains = (OffDiagonalGain(), OffDiagonalGain())
        return FlowNetwork(network, features, gains, torch.zeros(vocabulary)).num_parameters()


def read(name: str, args: list[str]) -> Info:
    return parse(Info, args, f"catmaps {name}")
