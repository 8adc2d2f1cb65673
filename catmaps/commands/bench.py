"""`catmaps bench`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from catmaps.cli import parse

if TYPE_CHECKING:
    from catmaps.benchmarks.suites import Suite


@dataclass(frozen=True)
class Bench:
    """Speed and memory on this machine, beside a plain dense reference, in ratios of one run."""

    suite: str = "step"
    """step, distill, sample, score, vocab, length, batch or width."""
    rounds: int = 2
    """Times that all cases are measured in turn."""
    repeats: int | None = None
    """Repeats of a case in a round; None: the suite's own, 3 or 5."""
    threads: int = 2
    """CPU threads of a case."""
    clock: Literal["wall", "cpu"] = "wall"
    """Seconds of what: cpu counts those of the processor, for busy machines, with one thread."""
    profile: bool = False
    """Where the time goes, by kinds of work, instead of how much it is."""
    plot: Path | None = None
    """Write a plot there, PNG, of a suite over vocab, length, batch or width."""
    out: Path | None = None
    """Write the record there: rows, ratios, processor, versions."""
    json: bool = False
    """One JSON object on stdout, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from rich.console import Console

        from catmaps.benchmarks.plot import plot
        from catmaps.benchmarks.suites import SUITES, official_ratio, run
        from catmaps.errors import UserError

        if self.suite not in SUITES:
            raise UserError(f"no suite {self.suite}; there are {', '.join(SUITES)}")
        if min(self.rounds, self.threads, 1 if self.repeats is None else self.repeats) < 1:
            raise UserError("rounds, repeats and threads must be at least 1")
        suite, rows = SUITES[self.suite](), {}
        if self.plot is not None and (suite.axis is None or self.profile):
            over = [name for name, made in SUITES.items() if made().axis]
            raise UserError(f"nothing to plot: --plot is for the suites {', '.join(over)}, without --profile")
        if self.profile:
            return self._profile(suite)
        options = {"clock": self.clock} | ({} if self.repeats is None else {"repeats": self.repeats})
        for name, row in run(suite, self.threads, self.rounds, **options):
            rows[name] = row | {"official_ratio": official_ratio(row)}
            print(f"{name}: {row['tokens_per_second']:,.0f} tokens/s")
        ratios = [asdict(ratio) | {"met": ratio.met} for ratio in suite.ratios(rows)]
        Console(width=130).print(table(self.suite, rows))
        for ratio in ratios:
            sign = ">=" if ratio["at_least"] else "<="
            print(f"{ratio['name']}: {ratio['value']:.2f} (bar {sign} {ratio['bar']:.2f})")
        result = {"suite": self.suite, "rows": rows, "ratios": ratios, "machine": machine(self.threads)}
        self._keep(result)
        if self.plot is not None and suite.axis is not None:
            processor = f"{result['machine']['processor']}, threads: {self.threads}"
            plot(rows, suite.axis, f"catmaps bench --suite {self.suite}: {processor}", self.plot)
            print(f"plot: {self.plot}")
        return result

    def _profile(self, suite: "Suite") -> dict[str, Any]:
        from catmaps.benchmarks.suites import profiles

        rows = {}
        for name, seconds in profiles(suite, self.threads):
            rows[name], total = seconds, sum(seconds.values())
            shares = ", ".join(
                f"{kind} {value / total:.0%}" for kind, value in seconds.items() if value > 0.005 * total
            )
            print(f"{name}: {shares}")
        result = {"suite": self.suite, "profile": rows, "machine": machine(self.threads)}
        self._keep(result)
        return result

    def _keep(self, result: dict[str, Any]) -> None:
        import json

        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"record: {self.out}")


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, versions, commit and date."""
    import time

    from catmaps import __version__
    from catmaps.studies.results import machine as described

    return described() | {"threads": threads, "date": time.strftime("%Y-%m-%d"), "catmaps": __version__}


def table(name: str, rows: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(title=f"Suite {name}")
    shown.add_column("case")
    for heading in ("tokens/s", "median s", "spread", "MB above idle", "of matrix peak", "of official code"):
        shown.add_column(heading, justify="right")
    for case, row in rows.items():
        official = "" if row["official_ratio"] is None else f"{row['official_ratio']:.2f}"
        figures = (f"{row['tokens_per_second']:,.0f}", f"{row['median_seconds']:.3f}", f"{row['spread']:.0%}")
        shown.add_row(case, *figures, f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['peak_share']:.0%}", official)
    return shown


def read(name: str, args: list[str]) -> Bench:
    return parse(Bench, args, f"catmaps {name}")
