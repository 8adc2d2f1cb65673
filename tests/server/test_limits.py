"""Queue, time, key, disconnects, shutdown."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from live_server import Live, live

from catmaps.cli import main
from catmaps.model import Run
from catmaps.server import app, batching
from catmaps.server.pieces import Ids, Piece


class Slow:
    """Drawing that waits to be let go."""

    def __init__(self, draw: Callable[[Run, list[Piece]], list[Ids]]) -> None:
        self.go, self.drawn, self._draw = threading.Event(), 0, draw

    def __call__(self, run: Run, pieces: list[Piece]) -> list[Ids]:
        self.go.wait(20)
        self.drawn += len(pieces)
        return self._draw(run, pieces)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow(batching.draw_pieces)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(batching, "draw_pieces", made)
    yield made
    made.go.set()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_answers_429_and_empties(map_run: Path, slow: Slow) -> None:
    with live(map_run, rows=4) as server, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.ask, prompt="the", seed=i, n=2) for i in range(2)]
        until(lambda: server.service.active == 4)
        answer = server.ask(prompt="the")
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        streamed = server.ask(prompt="the", stream=True)
        assert streamed.status_code == 429
        slow.go.set()
        assert [done.result().status_code for done in waiting] == [200, 200]
        assert server.service.active == 0
        assert server.ask(prompt="the").status_code == 200


def test_what_takes_too_long_answers_503(map_run: Path, slow: Slow) -> None:
    with live(map_run, seconds=0.6) as server:
        slow.go.set()
        until(lambda: server.ask(prompt="the").status_code == 200)  # shapes are checked for the first time: slow
        slow.go.clear()
        answer = server.ask(prompt="the")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "timeout"
        events = server.ask(prompt="the", stream=True).text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert server.service.active == 0
        slow.go.set()
        until(lambda: server.service.batcher.queued == 0)
        until(lambda: server.ask(prompt="the").status_code == 200)  # a busy machine may take longer once more


def test_what_a_client_leaves_is_not_drawn(map_run: Path, slow: Slow) -> None:
    with live(map_run, workers=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, prompt="the", max_tokens=8, num_steps=1)
        until(lambda: server.service.active == 1 and server.service.batcher.queued == 0)
        for stream in (False, True):
            with server.client() as client, pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={"prompt": "two", "n": 3, "stream": stream}, timeout=0.3)
        until(lambda: server.service.active == 1)
        slow.go.set()
        assert first.result().status_code == 200
        assert server.ask(prompt="red", max_tokens=8).status_code == 200
        assert slow.drawn == 2


def test_freed_memory_is_handed_back_while_it_serves(map_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed = threading.Semaphore(0)
    monkeypatch.setattr(app, "TIDY_SECONDS", 0.01)
    monkeypatch.setattr(app, "hand_back_freed_memory", handed.release)
    with live(map_run) as server:
        for _ in range(3):
            assert handed.acquire(timeout=20)
        assert len(server.texts(max_tokens=4)) == 1


def test_a_fault_of_ours_answers_500_and_tells_nothing(map_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Run, pieces: list[Piece]) -> list[Ids]:
        raise ArithmeticError("a secret")

    with live(map_run) as server:
        monkeypatch.setattr(batching, "draw_pieces", broken)
        answers = [server.ask(prompt="the"), server.ask(prompt="the", stream=True)]
        assert answers[0].status_code == 500
        assert all("server_error" in answer.text and "secret" not in answer.text for answer in answers)
        monkeypatch.undo()
        assert server.ask(prompt="the").status_code == 200


def test_with_a_key_only_its_bearer_is_served(map_run: Path) -> None:
    with live(map_run, api_key="open sesame") as server:
        assert server.ask(prompt="the").status_code == 401
        for value in ("Bearer wrong", "open sesame", "Basic open sesame", "Bearer", "Bearer öpen"):
            server.headers = {b"authorization": value.encode()}
            assert server.ask(prompt="the").json()["error"]["code"] == "invalid_api_key"
        with server.client() as client:
            assert [client.get(path).status_code for path in ("/metrics", "/v1/models", "/openapi.json")] == [401] * 3
            assert [client.get(path).status_code for path in ("/", "/health")] == [200] * 2
        server.headers = {b"authorization": b"Bearer open sesame"}
        assert server.ask(prompt="the").status_code == 200


def test_a_signal_ends_it_once_all_is_answered(map_run: Path) -> None:
    command = [sys.executable, "-m", "catmaps", "serve", str(map_run), "--port", "0", "--workers", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        url = line.split()[3]
        server = Live(None, url)  # pyright: ignore[reportArgumentType]
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(server.ask, prompt="the", max_tokens=100, num_steps=8, seed=1)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert len(long.result().json()["choices"][0]["text"]) == 100
        out, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(out)["model"] == "map"
    with pytest.raises(httpx.ConnectError):
        server.ask(prompt="the")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "run nowhere does not exist"),
        (["RUN", "--port", "70000"], "--port"),
        (["RUN", "--batch", "0"], "--batch must be at least 1"),
        (["RUN", "--timeout", "nan"], "--timeout"),
        (["RUN", "--name", "a/b"], "is no name for a model"),
        (["RUN", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], message: str, map_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *[str(map_run) if arg == "RUN" else arg for arg in args]]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_port_that_is_taken_is_named(map_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with live(map_run) as server:
        assert main(["serve", str(map_run), "--port", server.url.rpartition(":")[2]]) == 2
    assert "choose --host and --port" in capsys.readouterr().err
