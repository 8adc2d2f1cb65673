"""Tokens a second and peak memory of building shards: the embedded corpus 5 and 20 times over (110 and 440 MB).

Each build is a `catmaps data build` of its own, whose largest process counts. Memory must not grow with the corpus.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import record

from catmaps.text import tokenizers
from catmaps.text.corpus import embedded_documents


def write_corpus(folder: Path, copies: int) -> int:
    """One file a copy, whose documents have names of their own; returns the bytes of text."""
    folder.mkdir(parents=True)
    documents, size = list(embedded_documents()), 0
    for copy in range(copies):
        with (folder / f"copy-{copy:03d}.jsonl").open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps({"id": f"{copy}/{document.id}", "text": document.text}) + "\n")
                size += len(document.text.encode())
    return size


def watch(session: int, seen: dict[int, tuple[int, float]]) -> None:
    """Notes peak memory (kB) and processor seconds of every process of a session, by its id."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            status = (stat.parent / "status").read_text()
        except OSError:  # it has ended
            continue
        peak = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
        before = seen.get(int(stat.parent.name), (0, 0.0))
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        seen[int(stat.parent.name)] = max(peak, before[0]), max(seconds, before[1])


def build(corpus: Path, out: Path, tokenizer: str, workers: int) -> dict[str, Any]:
    """One build: seconds (wall and processor), tokens, megabytes of its largest process."""
    how = [] if workers == 0 else ["--executor", "local", "--tasks", "4", "--workers", str(workers)]
    command = [sys.executable, "-m", "catmaps", "data", "build", str(corpus), "--out", str(out), *how]
    seen: dict[int, tuple[int, float]] = {}
    begin = time.monotonic()
    with (out.parent / "answer").open("w+") as answer:
        process = subprocess.Popen(
            [*command, "--tokenizer", tokenizer, "--json"],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            stdout=answer,
            start_new_session=True,
        )
        while process.poll() is None:
            watch(process.pid, seen)
            time.sleep(0.1)
        seconds = time.monotonic() - begin
        if process.returncode != 0:
            raise SystemExit(f"the build ended with status {process.returncode}")
        answer.seek(0)
        tokens = sum(split["tokens"] for split in json.load(answer)["splits"].values())
    return {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(cpu for _, cpu in seen.values()), 1),
        "tokens_per_second": round(tokens / seconds),
        "peak_megabytes": round(max(peak for peak, _ in seen.values()) / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tokenise"), help="removed at the end")
    parser.add_argument("--copies", nargs="+", type=int, default=[5, 20])
    parser.add_argument("--tokenizers", nargs="+", default=["text8", "bpe:4096"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="0: inline")
    parser.add_argument("--name", default="tokenise", help="of the record")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    rows = []
    try:
        sizes = {copies: write_corpus(options.out / f"{copies}", copies) for copies in options.copies}
        for spec in options.tokenizers:
            texts = (document.text for document in embedded_documents() if document.split == "train")
            trained = options.out / spec.replace(":", "-")
            tokenizers.save(tokenizers.from_spec(spec, texts), trained)
            for workers in options.workers:
                for copies, size in sizes.items():
                    shards = options.out / "shards"
                    figures = build(options.out / f"{copies}", shards, f"{trained}", workers)
                    shutil.rmtree(shards)
                    row = {"tokenizer": spec, "workers": workers, "copies": copies, "megabytes": round(size / 1e6)}
                    rows.append({**row, **figures})
                    print(rows[-1], flush=True)
    finally:
        shutil.rmtree(options.out)
    print(record(options.name, {"rows": rows}))


if __name__ == "__main__":
    main()
