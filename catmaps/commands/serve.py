"""`catmaps serve`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from catmaps.allocator import keep_few_kernels
from catmaps.cli import parse

if TYPE_CHECKING:
    from catmaps.server.service import Service

KEY = "CATMAPS_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Serve a run over HTTP: OpenAI's /v1/completions, and a page at / on which texts can be watched as they form.

    Only this machine can reach it unless --host says otherwise. Ctrl-C or SIGTERM ends it once what was asked for is
    answered. Limits are the server's promises: what is beyond them is refused with 413, 422, 429 or 503.
    """

    run_: tyro.conf.Positional[Path]
    """Folder of a run."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one."""
    port: int = 8000
    """0: any free one."""
    name: str | None = None
    """The model's name for clients; default: the run's folder."""
    api_key: str | None = None
    """Clients must send it; better given as CATMAPS_API_KEY, which other users of the machine cannot see."""
    batch: int = 32
    """Texts drawn together, at most."""
    workers: int | None = None
    """Batches at a time; default: one a core, at most 4, and 1 on an accelerator."""
    queue: int = 256
    """Texts written or waiting, at most."""
    max_tokens: int = 1024
    """Tokens of a text, at most."""
    max_steps: int = 256
    """Steps of a sampler, at most."""
    timeout: float = 60.0
    """Seconds for an answer, at most."""
    json: bool = False
    """One JSON object on stdout when it ends, the rest on stderr."""

    def run(self) -> dict[str, Any]:
        from catmaps.errors import UserError

        try:
            from catmaps.server.http import is_loopback, listen, make_server, serve
        except ImportError as error:
            raise UserError(f"serve needs {error.name}: pip install 'catmaps[serve]'") from error
        self._check()
        keep_few_kernels()  # windows of any length, in batches of any size
        listener = listen(self.host, self.port)
        try:
            service, (address, port) = self._service(is_loopback(self.host)), listener.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            if service.api_key is None and service.hosts is None:
                print(f"anyone who can reach {shown} can use it: set {KEY}", flush=True)

            def started() -> None:
                print(f"serving {service.model} at http://{shown}:{port} until Ctrl-C", flush=True)

            serve(make_server(service), listener, started)
        finally:
            listener.close()
        return {"run": str(self.run_), "model": service.model, "host": address, "port": port}

    def _check(self) -> None:
        from catmaps.errors import UserError

        counts = {"--batch": self.batch, "--queue": self.queue, "--max-tokens": self.max_tokens}
        counts |= {"--max-steps": self.max_steps, "--workers": 1 if self.workers is None else self.workers}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port must be 0 to 65535, not {self.port}")
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"--timeout must be a number of seconds above 0, not {self.timeout}")

    def _service(self, local: bool) -> "Service":
        from catmaps.server.batching import Batcher
        from catmaps.server.limits import Limits
        from catmaps.server.metrics import Metrics
        from catmaps.server.service import Service, served_run

        run, model, fingerprint = served_run(self.run_, self.name)
        workers = self.workers or (min(4, os.cpu_count() or 1) if run.device.type == "cpu" else 1)
        limits = Limits(
            tokens=self.max_tokens, steps=self.max_steps, rows=self.queue, seconds=self.timeout, batch=self.batch
        )
        metrics = Metrics()
        batcher = Batcher(run, workers=workers, rows=self.batch, observe=metrics.batch)
        hosts = frozenset({"localhost", "127.0.0.1", "::1", self.host.lower()}) if local else None
        key = self.api_key or os.environ.get(KEY) or None
        return Service(run, model, fingerprint, limits, batcher, metrics, key, hosts)


def read(name: str, args: list[str]) -> Serve:
    return parse(Serve, args, f"catmaps {name}")
