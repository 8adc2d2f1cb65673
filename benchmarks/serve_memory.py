"""Whether a server's memory rises under requests of every kind.

    python benchmarks/serve_memory.py catmaps/models/letters --seconds 720

Clients ask for texts of any length, with prompts, blanks, several at once, streamed, with bounds and with trajectories;
some requests are wrong, and some clients leave before their answer. After a warm-up, which begins with the largest
batches of every kind, the server's resident memory is read every few seconds. Its slope is that of a line through ten
means, one of each tenth of the time, and the error that of their scatter about it. Writes
benchmarks/results/serve_memory.json.
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from serve_load import machine, resident, serving

RESULTS = Path(__file__).parent / "results" / "serve_memory.json"
PARTS = 10


def request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """What is asked for next, and the body."""
    kind = draw.choice(["plain", "prompt", "long", "blanks", "several", "stream", "bounds", "drafts", "wrong", "left"])
    seed = draw.randrange(10**9)
    if kind == "blanks":
        return kind, {
            "infill": f"the king [[{draw.randint(1, 40)}]] of the [[{draw.randint(1, 30)}]] war",
            "seed": seed,
        }
    more: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": "the king of the north"[: draw.randint(1, 20)]},
        "long": {"max_tokens": draw.randint(129, 256)},
        "several": {"n": draw.randint(2, 6)},
        "stream": {"stream": True},
        "bounds": {"logprobs": 1},
        "drafts": {"trajectory": 2},
        "wrong": {"temperature": -1.0},
    }
    usual = {"max_tokens": draw.randint(1, 128), "num_steps": draw.randint(1, 3), "seed": seed}
    return kind, usual | more.get(kind, {})


async def largest(url: str, window: int, rows: int) -> None:
    """What takes the most memory at once, in each worker: full batches of whole windows."""
    host, port = url.removeprefix("http://").split(":")
    whole = {"max_tokens": window, "num_steps": 2, "n": rows}
    kinds = whole, whole | {"prompt": "the king"}, whole | {"trajectory": 2}, whole | {"stream": True}
    bound = {"prompt": ["the king of the north "[: window // 8] * 8] * 8, "max_tokens": 0, "echo": True, "logprobs": 1}
    for body in (*kinds, bound):
        statuses = await asyncio.gather(*(ask((host, int(port)), body, None) for _ in range(4)))
        assert set(statuses) == {200}, (body, statuses)


async def ask(place: tuple[str, int], body: dict[str, Any], patience: float | None) -> int | None:
    """Status; None for a client that left, which it does after `patience` seconds."""
    reader, writer = await asyncio.open_connection(*place)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        async with asyncio.timeout(patience):
            return int((await reader.read()).split()[1])
    except TimeoutError:
        return None
    finally:
        writer.close()


async def drive(url: str, clients: int, seconds: float, every: float) -> tuple[Counter[str], list[tuple[float, float]]]:
    """Answers by kind and status, and (seconds, MB of the server)."""
    host, port = url.removeprefix("http://").split(":")
    answers, points, began = Counter[str](), list[tuple[float, float]](), time.monotonic()

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() - began < seconds:
            kind, body = request(draw)
            status = await ask((host, int(port)), body, draw.random() if kind == "left" else None)
            answers[f"{kind} {status or 'left'}"] += 1

    async def memory() -> None:
        while (now := time.monotonic() - began) < seconds:
            with contextlib.suppress(OSError):  # too busy to say
                points.append((now, await asyncio.to_thread(resident, url)))
            await asyncio.sleep(every)

    await asyncio.gather(memory(), *(client(number) for number in range(clients)))
    return answers, points


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """MB an hour and its standard error."""
    size = len(points) // PARTS
    parts = [points[size * i : size * (i + 1)] for i in range(PARTS)]
    t, mb = ([statistics.fmean(point[i] for point in part) for part in parts] for i in (0, 1))
    line = statistics.linear_regression(t, mb)
    rest = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(t, mb, strict=True)) / (PARTS - 2)
    return line.slope * 3600, 3600 * math.sqrt(rest / (statistics.variance(t) * (PARTS - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--warm-up", type=float, default=180.0)
    parser.add_argument("--seconds", type=float, default=720.0)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with serving(args.run) as url:
        first = resident(url)
        asyncio.run(largest(url, json.loads((args.run / "config.json").read_text())["data"]["length"], 32))
        asyncio.run(drive(url, args.clients, args.warm_up, args.every))
        answers, points = asyncio.run(drive(url, args.clients, args.seconds, args.every))
    rate, error = slope(points)
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(args.note),
        "clients": args.clients,
        "seconds": args.seconds,
        "answers": dict(sorted(answers.items())),
        "resident_mb": {
            "at_the_start": first,
            "after_the_warm_up": points[0][1],
            "last": points[-1][1],
            "most": max(mb for _, mb in points),
        },
        "resident_mb_an_hour": rate,
        "standard_error": error,
        "every_minute_mb": [round(points[i][1], 1) for i in range(0, len(points), max(1, round(60 / args.every)))],
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
