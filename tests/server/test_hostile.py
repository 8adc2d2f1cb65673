"""Malformed, oversized and unwanted requests: a proper refusal, at once, and the server lives on."""

import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Live, live

from catmaps.server.schema import CompletionRequest

SECRET = "/etc/catmaps-hostile-test"
OPENED: list[str] = []
WRONG: list[Any] = [
    -1, 0, 2**31, 2**63, 10**30, 1.5, 1e308, True, "", "a", SECRET, f"file://{SECRET}", "é\u0000\ud83d", "[[3]]",
    "[[99999999999]]" * 3, "9" * 5000, [], [[]], [None], ["a", 1], [[1], "a"], [-1], [27], [10**12], {}, {"a": 1},
    {"__class__": SECRET}, ["a"] * 2000, "x" * 100_000,
]  # fmt: skip
JSON = {"content-type": "application/json"}
SLOW = 5.0


@pytest.fixture(scope="module")
def server(map_run: Path) -> Iterator[Live]:
    with live(map_run, tokens=64, steps=8, choices=8, rows=16, body=1 << 17) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _opened() -> None:
    """What any thread opens is on record (a hook cannot be taken away, and does nothing but this)."""
    sys.addaudithook(
        lambda event, args: OPENED.append(str(args[0])) if event == "open" and SECRET in str(args[0]) else None
    )


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    assert answer.elapsed.total_seconds() < SLOW
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert "Traceback" not in answer.text
        assert len(answer.text) < 2000
    assert OPENED == []


def mutations() -> Iterator[dict[str, Any]]:
    """Every field of the schema with every wrong value, one and several at a time."""
    fields = list(CompletionRequest.model_fields)
    for field in fields:
        for value in WRONG:
            yield {field: value}
    rng = random.Random(0)
    for _ in range(150):
        yield {rng.choice([*fields, "unknown"]): rng.choice(WRONG) for _ in range(rng.randint(2, 5))}


def test_malformed_fields(server: Live) -> None:
    count = refused = 0
    with server.client() as client:
        for body in mutations():
            answer = client.post("/v1/completions", content=json.dumps(body), headers=JSON)
            check(answer)
            count, refused = count + 1, refused + (answer.status_code >= 400)
    assert count > 700
    assert refused > 600
    assert len(server.texts(prompt="the", seed=1)) == 1


BODIES = [
    b"", b"{", b"null", b"[]", b'"a"', b"1", b"NaN", b'{"temperature": NaN}', b'{"temperature": Infinity}', b"\xff\xfe",
    b'{"prompt": "\xc3\x28"}', b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 10_000, b'{"prompt": "a"',
    b"\x80\x04\x95cos\nsystem\n(S'touch " + SECRET.encode() + b"'\ntR.", b"<?xml version='1.0'?><a/>", b"prompt=a",
    b'{"prompt": "a"}{"prompt": "b"}', b'{"seed": ' + b"9" * 10_000 + b"}", b'{"n": 1e999}',
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_requests(body: bytes, server: Live) -> None:
    with server.client() as client:
        answer = client.post("/v1/completions", content=body, headers=JSON)
    check(answer)
    assert answer.status_code in (400, 422)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "POST"])
@pytest.mark.parametrize(
    "path",
    ["/v1/completions/", "/v1/chat/completions", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f..",
     "/v1/models/x", "/%2f", "/\u00e9", "/" + "a" * 5000, "/docs", "/metrics/x", "/health?x=" + "y" * 5000],
)  # fmt: skip
def test_paths_and_methods_that_are_not_there(path: str, method: str, server: Live) -> None:
    with server.client() as client:
        answer = client.request(method, path)
    assert answer.status_code in (200, 307, 404, 405)
    assert (answer.status_code == 200) == (path.startswith("/health?") and method == "GET")
    assert OPENED == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/x-pickle", ""])
def test_only_json_is_read(kind: str, server: Live) -> None:
    with server.client() as client:
        answer = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert answer.status_code == 415


def test_too_much_is_refused_without_being_read(server: Live) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 65536

    began = time.monotonic()
    with server.client() as client:
        whole = client.post("/v1/completions", content=b"x" * (1 << 20), headers=JSON)
        assert whole.status_code == 413
        try:
            parts = client.post("/v1/completions", content=endless(), headers=JSON)
            assert parts.status_code == 413
        except httpx.WriteError:  # the connection was cut while it came
            pass
    assert time.monotonic() - began < SLOW


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"G" * 200_000,
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99\r\n\r\n{",
    ],
)  # fmt: skip
def test_what_is_no_http_breaks_nothing(raw: bytes, server: Live) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
        except OSError:  # it closed the connection, or said nothing
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")
    with server.client() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "no model 'gpt-4' here; there is 'map'"),
        ({"prompt": "\u4f60\u597d"}, 400, "outside the alphabet"),
        ({"prompt": [27]}, 400, "token 27 is outside the alphabet of 27"),
        ({"prompt": []}, 400, "empty list"),
        ({"infill": "no blank"}, 400, "no blank"),
        ({"infill": "[[17]]"}, 400, "a window holds 16"),
        ({"infill": "[[0]]"}, 400, "needs N >= 1"),
        ({"infill": "[[9999999999999999999999]]"}, 400, "a window holds 16"),
        ({"infill": "[[2]]", "prompt": "a"}, 400, "infill stands for prompt"),
        ({"infill": "[[2]]", "stop": "a"}, 400, "leave out stop"),
        ({"prompt": "a", "suffix": "b" * 16}, 400, "a window holds 16"),
        ({"prompt": "a", "suffix": "b", "max_tokens": 0}, 400, "at least 1"),
        ({"prompt": "a", "suffix": "b", "echo": True, "max_tokens": 2}, 400, "echo"),
        ({"max_tokens": 0}, 400, "nothing to write"),
        ({"max_tokens": 0, "echo": True, "logprobs": 1}, 400, "nothing to write"),
        ({"max_tokens": 65}, 422, "max_tokens is at most 64, not 65"),
        ({"num_steps": 9}, 422, "num_steps is at most 8, not 9"),
        ({"n": 9}, 422, "9 texts in one request; at most 8"),
        ({"prompt": ["a"] * 9}, 422, "at most 8"),
        ({"best_of": 2}, 422, "best_of"),
        ({"sampler": "euler", "noise": 0.5}, 422, "noise is for the sampler renoise, not euler"),
        ({"trajectory": 3, "stream": True}, 400, "trajectory"),
        ({"trajectory": 3, "max_tokens": 20}, 400, "trajectory"),
        ({"frequency_penalty": 0.5}, 422, "frequency_penalty"),
        ({"tempreature": 1}, 422, "tempreature"),
    ],
)
def test_refusals_name_the_thing(body: dict[str, Any], status: int, message: str, server: Live) -> None:
    answer = server.ask(**body)
    check(answer)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_the_run_s_folder_is_nobody_s_business(server: Live, map_run: Path) -> None:
    answers = [server.ask(**body) for body in ({"infill": "[[99]]"}, {"model": "x"}, {"prompt": "the", "seed": 1})]
    with server.client() as client:
        answers += [client.get(path) for path in ("/", "/v1/models", "/metrics", "/openapi.json")]
    assert not [answer.text for answer in answers if str(map_run.parent) in answer.text]


def test_other_names_for_this_machine_are_refused(server: Live) -> None:
    with server.client() as client:
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/health", headers={"host": "LOCALHOST:80"}).status_code == 200
