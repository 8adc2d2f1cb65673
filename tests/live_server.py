"""A server in a thread of the tests, on a port of its own."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from catmaps.server.batching import Batcher
from catmaps.server.http import listen, make_server
from catmaps.server.limits import Limits
from catmaps.server.metrics import Metrics
from catmaps.server.service import Service, served_run


@dataclass
class Live:
    """A server that runs."""

    service: Service
    url: str
    headers: dict[bytes, bytes] = field(default_factory=dict)

    def client(self) -> httpx.Client:
        # verify=False: certificates, of no use here, take longer to load than a text to write.
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=30, trust_env=False, verify=False)

    def ask(self, **body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/completions", json=body)

    def texts(self, **body: Any) -> list[str]:
        response = self.ask(**body)
        assert response.status_code == 200, response.text
        return [choice["text"] for choice in response.json()["choices"]]


@contextmanager
def live(path: Path, *, workers: int = 2, api_key: str | None = None, **limits: Any) -> Iterator[Live]:
    """Serves a run while the block lasts."""
    run, model, fingerprint = served_run(path)
    bounds = Limits(**limits)
    metrics = Metrics()
    batcher = Batcher(run, workers=workers, rows=bounds.batch, observe=metrics.batch)
    hosts = frozenset({"127.0.0.1", "localhost"})
    service = Service(run, model, fingerprint, bounds, batcher, metrics, api_key, hosts)
    listener = listen("127.0.0.1", 0)
    server = make_server(service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Live(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()
