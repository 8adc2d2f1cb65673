"""Many clients at once against a server of its own, and the same texts without one.

    python benchmarks/serve_load.py runs/map --seconds 300

Each client asks for one text of the run's window after another, over a connection that it keeps. Beside it stand
`catmaps sample` with batches of the server's mean size and of one text, before and after. Texts written under load are
asked for once more, alone: they must be the same. Writes benchmarks/results/serve.json.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

RESULTS = Path(__file__).parent / "results" / "serve.json"
AGAIN = 40


@dataclass
class Load:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    """Of each answer."""
    statuses: Counter[int] = field(default_factory=Counter)
    texts: dict[int, str] = field(default_factory=dict)
    """Of the first seeds."""
    resident: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, MB of the server)."""
    elapsed: float = 0.0

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Connection:
    """A client that costs little: one connection, one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._place = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status, length, closes = int((await reader.readline()).split()[1]), 0, False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            length = int(value) if name.lower() == "content-length" else length
            closes = closes or (name.lower() == "connection" and value.strip() == "close")
        answer = json.loads(await reader.readexactly(length))
        if closes:
            writer.close()
            self._streams = None
        return status, answer


async def drive(url: str, clients: int, seconds: float, tokens: int, steps: int) -> Load:
    """`clients` that ask again as soon as they are answered."""
    host, port = url.removeprefix("http://").split(":")
    load, began, seeds = Load(), time.monotonic(), iter(range(10**9))

    def body(seed: int) -> dict[str, Any]:
        return {"max_tokens": tokens, "num_steps": steps, "seed": seed}

    async def client() -> None:
        connection = Connection(host, int(port))
        while time.monotonic() - began < seconds:
            seed, asked = next(seeds), time.monotonic()
            status, answer = await connection.ask(body(seed))
            load.statuses[status] += 1
            if status == 200:
                load.seconds.append(time.monotonic() - asked)
                if seed % 7 == 0 and len(load.texts) < AGAIN:
                    load.texts[seed] = answer["choices"][0]["text"]
            else:
                await asyncio.sleep(1.0)

    async def memory() -> None:
        while time.monotonic() - began < seconds:
            load.resident.append((time.monotonic() - began, await asyncio.to_thread(resident, url)))
            await asyncio.sleep(seconds / 60)

    await asyncio.gather(memory(), *(client() for _ in range(clients)))
    load.elapsed = time.monotonic() - began
    connection = Connection(host, int(port))
    for seed, text in load.texts.items():
        _, answer = await connection.ask(body(seed))
        if answer["choices"][0]["text"] != text:
            raise SystemExit(f"seed {seed} gave another text alone than under load")
    return load


def metrics(url: str) -> str:
    with urlopen(f"{url}/metrics", timeout=30) as answer:
        return answer.read().decode()


def resident(url: str) -> float:
    return value(metrics(url), "catmaps_resident_bytes") / 1e6


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def offline(run: Path, num: int, batch: int, steps: int) -> float:
    """Texts a second of `catmaps sample`, loading left out."""
    command = [sys.executable, "-m", "catmaps", "sample", str(run), "--num", str(num), "--batch", str(batch)]
    done = subprocess.run([*command, "--steps", str(steps), "--json"], capture_output=True, text=True, check=True)
    return num / json.loads(done.stdout)["seconds"]


def slope(points: list[tuple[float, float]]) -> float:
    """MB an hour, by least squares over the second half, when everything has been allocated once."""
    late = points[len(points) // 2 :]
    line = statistics.linear_regression([t for t, _ in late], [mb for _, mb in late])
    return line.slope * 3600


@contextmanager
def serving(run: Path) -> Iterator[str]:
    """A server of its own; its address."""
    command = [sys.executable, "-m", "catmaps", "serve", str(run), "--port", "0", "--json"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        yield server.stderr.readline().split()[3]
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    finally:
        server.kill()
    if server.returncode != 0:
        raise SystemExit(f"the server ended with status {server.returncode}")


def served(args: argparse.Namespace, window: int) -> tuple[Load, float]:
    """The load, and the mean rows of a batch."""
    with serving(args.run) as url:
        asyncio.run(drive(url, args.clients, 3.0, window, args.steps))  # everything is touched once
        load = asyncio.run(drive(url, args.clients, args.seconds, window, args.steps))
        said = metrics(url)
    return load, value(said, "catmaps_batch_rows_sum") / value(said, "catmaps_batch_rows_count")


def machine(note: str) -> dict[str, Any]:
    """Processor, cores, versions and commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    python = platform.python_version()
    return {"processor": model, "cores": os.cpu_count(), "commit": commit, "python": python, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--note", default="", help="what else the machine did")
    args = parser.parse_args()
    window = json.loads((args.run / "config.json").read_text())["data"]["length"]
    batch = max(1, args.clients // min(4, os.cpu_count() or 1))
    before = {n: offline(args.run, count, n, args.steps) for n, count in ((batch, 20 * batch), (1, 64))}
    load, rows = served(args, window)
    after = {n: offline(args.run, count, n, args.steps) for n, count in ((batch, 20 * batch), (1, 64))}
    rate = load.statuses[200] / load.elapsed
    together, alone = ((before[n] + after[n]) / 2 for n in (batch, 1))
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(args.note),
        "clients": args.clients,
        "seconds": round(load.elapsed, 1),
        "tokens_a_text": window,
        "network_calls_a_text": args.steps,
        "answers": {str(status): count for status, count in sorted(load.statuses.items())},
        "texts_a_second": rate,
        "mean_rows_of_a_batch": rows,
        "latency_seconds": {name: load.quantile(q) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))},
        "offline_texts_a_second": {"batch": batch, "before": before[batch], "after": after[batch]},
        "one_at_a_time_texts_a_second": {"before": before[1], "after": after[1]},
        "of_offline_at_equal_batch": rate / together,
        "of_one_at_a_time": rate / alone,
        "resident_mb": {"first": load.resident[0][1], "last": load.resident[-1][1]},
        "resident_mb_an_hour": slope(load.resident),
        "asked_again_alone_and_equal": len(load.texts),
    }
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
