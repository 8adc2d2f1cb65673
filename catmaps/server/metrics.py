"""What the server counts, in Prometheus' text format."""

import os
import resource
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float | int]) -> None:
        self._bounds, self._counts, self._sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float | int) -> None:
        self._counts[sum(value > bound for bound in self._bounds)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counters of a server; safe to write to from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._latency, self._rows = Histogram(SECONDS), Histogram(ROWS)

    def request(self, route: str, status: int, seconds: float) -> None:
        """An answer; `route` is one of the server's own, never what a client wrote."""
        with self._lock:
            self._requests[route, status] += 1
            if route == "/v1/completions":
                self._latency.add(seconds)

    def batch(self, rows: int, calls: int, seconds: float) -> None:
        """A batch that was drawn or scored."""
        with self._lock:
            self._rows.add(rows)
            self._totals["network_calls"] += calls
            self._totals["batch_seconds"] += seconds

    def texts(self, texts: int, tokens: int) -> None:
        """Texts that were written."""
        with self._lock:
            self._totals["texts"] += texts
            self._totals["tokens"] += tokens

    def text(self, *, active: int, queued: int) -> str:
        """The page that Prometheus reads."""
        with self._lock:
            lines = [*_head("requests_total", "counter", "Answers by route and status.")]
            for (route, status), count in sorted(self._requests.items()):
                lines.append(f'catmaps_requests_total{{route="{route}",status="{status}"}} {count}')
            for name, about in _COUNTERS.items():
                lines += [*_head(f"{name}_total", "counter", about), f"catmaps_{name}_total {self._totals[name]:.10g}"]
            lines += _head("request_seconds", "histogram", "From a completion request to the end of its answer.")
            lines += self._latency.lines("catmaps_request_seconds")
            lines += _head("batch_rows", "histogram", "Texts of a batch.")
            lines += self._rows.lines("catmaps_batch_rows")
        gauges = {"active_rows": active, "queued_rows": queued, "resident_bytes": resident_bytes()}
        for name, value in gauges.items():
            lines += [*_head(name, "gauge", _GAUGES[name]), f"catmaps_{name} {value}"]
        return "\n".join(lines) + "\n"


_COUNTERS = {
    "texts": "Texts written.",
    "tokens": "Tokens written.",
    "network_calls": "Calls of the network, one for all rows of a batch.",
    "batch_seconds": "Seconds that workers spent on batches.",
}
_GAUGES = {
    "active_rows": "Texts that are being written or wait.",
    "queued_rows": "Windows of text that wait for a batch.",
    "resident_bytes": "Memory of the process.",
}


def _head(name: str, kind: str, about: str) -> Iterator[str]:
    yield f"# HELP catmaps_{name} {about}"
    yield f"# TYPE catmaps_{name} {kind}"


def resident_bytes() -> int:
    """Memory of this process; where /proc does not tell, the most it ever was."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
