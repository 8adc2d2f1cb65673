"""What steering a flow map does to its text: how far a reward rises, and what it costs in forward bits.

Every row is as many texts of the trained length: the plain sampler, the best of 16 of its texts, tilts, top-p and
refinement. *Measure*: what the reward is about, mean over texts and its standard error. *Forward*: bits per
character under the 6-gram model of the training text. *Entropy*: of the letters of a text, bits, mean over texts.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import record

from catmaps.evaluation.collect import build_judge
from catmaps.flow.refinement import Refine, refine
from catmaps.generation import SamplingConfig, default_sampling, generate, generate_texts
from catmaps.goals import default_steering, read_goal, steer
from catmaps.model import Run, load_run
from catmaps.training.train import cache_folder, find_shards

STEPS = 8


def letter_entropy(text: str) -> float:
    """Bits per letter of one text's own frequencies."""
    counts = np.bincount(np.frombuffer(text.encode(), dtype=np.uint8)).astype(float)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def tilted(run: Run, spec: str, strength: float, particles: int, num: int, words: frozenset[str]) -> list[str]:
    goal = read_goal(spec, strength, run.tokenizer, lambda: words)
    config = replace(default_steering(run, goal, particles=particles), steps=STEPS, batch=max(64, particles))
    return [run.tokenizer.decode(row.numpy()) for found in steer(run, config, num) for row in found.texts.cpu()]


def best_of(run: Run, sampling: SamplingConfig, num: int, choices: int, measure: Callable[[str], float]) -> list[str]:
    """The best of every few plain texts: what the particles' moves have to beat."""
    texts = generate_texts(run, num * choices, replace(sampling, seed=2))
    return [max(texts[i * choices : (i + 1) * choices], key=measure) for i in range(num)]


def refined(run: Run, tokens: torch.Tensor, how: Refine) -> list[str]:
    config = default_sampling(run, 2)
    step, times = config.step(run), config.times(run)
    done = refine(run.flow_map, how, step, times, tokens.to(run.device), generator=run.generator(1))
    return [run.tokenizer.decode(row.numpy()) for row in done.cpu()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("map", type=Path)
    parser.add_argument("--texts", type=int, default=48, help="per row")
    parser.add_argument("--name", default="steering", help="of the record")
    options = parser.parse_args()
    run, num = load_run(options.map), options.texts
    judge = build_judge(find_shards(run.config), run.tokenizer, cache_folder())
    goals = {
        spec: read_goal(spec, 1.0, run.tokenizer, lambda: judge.words) for spec in ("valid-words", "contains:the king")
    }
    sampling = replace(default_sampling(run, STEPS), seed=1)
    drawn = torch.cat(list(generate(run, num, sampling)))
    plain = [run.tokenizer.decode(row.numpy()) for row in drawn]
    rows: dict[str, Callable[[], list[str]]] = {
        f"map, {STEPS} calls": lambda: plain,
        "best of 16 by valid-words": lambda: best_of(run, sampling, num, 16, goals["valid-words"].measure),
        "top-p 0.9": lambda: generate_texts(run, num, replace(sampling, top_p=0.9)),
        **{
            f"valid-words, strength {strength}, {particles} particles": (
                lambda s=strength, p=particles: tilted(run, "valid-words", s, p, num, judge.words)
            )
            for strength, particles in ((40.0, 16), (10.0, 16))
        },
        **{
            f"contains:the king, strength {strength}, {particles} particles": (
                lambda s=strength, p=particles: tilted(run, "contains:the king", s, p, num, judge.words)
            )
            for strength, particles in ((3.0, 16),)
        },
        **{
            f"refined, 8 rounds, focus {how.focus}{', exact' if how.exact else ''}": (
                lambda how=how: refined(run, drawn, how)
            )
            for how in (Refine(rounds=8), Refine(rounds=8, exact=True))
        },
    }
    figures = {}
    for name, draw in rows.items():
        began = time.monotonic()
        texts = draw()
        seconds = time.monotonic() - began
        forward = judge.forward.bits_per_char(judge.symbols(texts))
        figures[name] = {
            "forward": forward._asdict(),
            "letter_entropy": float(np.mean([letter_entropy(text) for text in texts])),
            "seconds": seconds,
            "example": texts[0],
        }
        for spec, goal in goals.items():
            values = np.array([goal.measure(text) for text in texts])
            error = float(values.std(ddof=1) / np.sqrt(num)) if num > 1 else 0.0
            figures[name][spec] = {"mean": float(values.mean()), "stderr": error}
        print(name, figures[name], flush=True)
        record(options.name, {"rows": figures, "texts": num, "steps": STEPS, "map": str(options.map)})


if __name__ == "__main__":
    main()
