"""A run that is served: what is loaded once, and how many texts it takes on."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from catmaps.errors import UserError
from catmaps.model import CONFIG, MODEL, Run, load_run
from catmaps.server.batching import Batcher
from catmaps.server.limits import ApiError, Limits
from catmaps.server.metrics import Metrics


@dataclass
class Service:
    """Everything that requests share."""

    run: Run
    model: str
    """Its name for clients; the folder is not theirs to know."""
    fingerprint: str
    limits: Limits
    batcher: Batcher
    metrics: Metrics
    api_key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None
    """Names that it may be called by; None: any."""
    active: int = 0
    """Texts that are being written or wait."""
    closing: bool = False

    @cached_property
    def strings(self) -> list[str]:
        """What stands for each token."""
        return self.run.tokenizer.token_strings()

    @contextmanager
    def admitted(self, rows: int) -> Iterator[None]:
        """Room for so many texts.

        Raises:
            ApiError: There is none: 429; or the server is going down: 503.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.active + rows > self.limits.rows:
            raise ApiError(429, f"{self.active} texts are being written already; try again", code="queue_full")
        self.active += rows
        try:
            yield
        finally:
            self.active -= rows


def served_run(path: Path, name: str | None = None) -> tuple[Run, str, str]:
    """A run with its name for clients and a fingerprint of its weights.

    Raises:
        UserError: Not a run, a baseline, or a name that is none.
    """
    run = load_run(path)
    if run.baseline is not None:
        raise UserError(f"run {path} is a {run.kind}; serve and show are for flows, family flow")
    model = path.resolve().name if name is None else name
    if not re.fullmatch(r"[\w.:-]{1,80}", model):
        raise UserError(f"{model!r} is no name for a model: give --name of letters, digits, - _ . :")
    digest = hashlib.blake2b((run.path / CONFIG).read_bytes(), digest_size=8)
    with (run.path / MODEL).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return replace(run, path=Path(model)), model, f"fp_{digest.hexdigest()}"
