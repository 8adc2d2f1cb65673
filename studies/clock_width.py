"""Does the law of time that a narrow network adapts suit a wide one? Of runs of `catmaps study run studies/width`.

The adaptive clock draws times in proportion to p, the information that the network gains there. Used for another
network it would be q in place of that one's own p: the share of draws that lie elsewhere is their total variation
distance, and the bound's variance under importance sampling grows at worst by chi^2 = E_p[p / q] - 1.

Source: the importance identity, docs/maths.md (b).
"""

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from common import record

from catmaps.flow.times import Law, warp
from catmaps.model import load_run
from catmaps.studies.results import RESULT

QUANTILES = (0.1, 0.5, 0.9)
CELLS = 512


class Apart(NamedTuple):
    """How far a law q lies from the law p that suits."""

    moved: float
    """Total variation distance, a share of the draws."""
    variance: float
    """chi^2, relative to the second moment under p."""


def apart(p: Law, q: Law) -> Apart:
    """Over the cells of q's quantiles, so that none is empty under q."""
    edges = q.quantile(torch.linspace(0, 1, CELLS + 1, dtype=torch.float64))
    mass, own = p.cdf(edges).diff(), q.cdf(edges).diff()
    return Apart((mass - own).abs().sum().item() / 2, (mass.square() / own).sum().item() - 1)


def mean_apart(ps: list[Law], qs: list[Law]) -> Apart | None:
    """Over all pairs but a law with itself; None if there is no other."""
    pairs = [apart(p, q) for p, q in product(ps, qs) if p is not q]
    return Apart(*map(statistics.mean, zip(*pairs, strict=True))) if pairs else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/studies/width"))
    parser.add_argument("--rate", default="0.02", help="of Muon, as in the names of the runs")
    options = parser.parse_args()
    runs = [load_run(file.parent) for file in sorted(options.runs.glob(f"width*-muon_lr{options.rate}-*/{RESULT}"))]
    if not runs:
        parser.error(f"no complete runs in {options.runs}: catmaps study run studies/width")
    laws = {"unadapted": [warp(runs[0].tokenizer.vocab_size)]}
    for run in sorted(runs, key=lambda run: run.config.network.width):
        laws.setdefault(f"width {run.config.network.width}", []).append(run.law)
    rows = []
    for name, own in list(laws.items())[1:]:
        points = torch.stack([law.quantile(torch.tensor(QUANTILES, dtype=torch.float64)) for law in own]).T.tolist()
        print(f"{name}: quantiles of t", *(f"{statistics.mean(p):.3f} ({min(p):.3f} to {max(p):.3f})" for p in points))
        under = {other: found for other, qs in laws.items() if (found := mean_apart(own, qs)) is not None}
        for other, (moved, variance) in under.items():
            print(f"  under the law of {other}: {moved:.1%} of draws elsewhere, variance {variance:+.1%}")
        rows.append({"width": name, "quantiles": points, "under": {o: f._asdict() for o, f in under.items()}})
    print(record("clock_width", {"rate": options.rate, "rows": rows}))


if __name__ == "__main__":
    main()
