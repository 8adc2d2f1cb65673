"""The page on which one watches texts form: one HTML file, nothing loaded from elsewhere."""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from catmaps.generation import default_sampling
from catmaps.model import Run
from catmaps.server.limits import Limits


def _asset(name: str) -> str:
    return files("catmaps.server").joinpath("assets", name).read_text(encoding="utf-8")


def page(setup: dict[str, Any]) -> str:
    """The page; `setup` is what its script is told."""
    # Inside a script element only "<" could end it.
    data = json.dumps(setup, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    parts = {"style": _asset("page.css"), "script": _asset("page.js"), "setup": data}
    text = _asset("page.html")
    for name, part in parts.items():
        text = text.replace(f"/*{name}*/", part, 1)
    return text


def policy() -> str:
    """A Content-Security-Policy under which nothing runs but the page's own style and script."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = {
        "default-src": "'none'",
        "style-src": source(_asset("page.css")),
        "script-src": source(_asset("page.js")),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def about(run: Run, model: str) -> dict[str, Any]:
    """What the page says of a run."""
    return {
        "model": model,
        "kind": run.kind,
        "window": run.config.data.length,
        "vocabulary": run.tokenizer.vocab_size,
        "tokenizer": run.tokenizer.name,
        "sampler": default_sampling(run).sampler,
    }


def live_page(run: Run, model: str, limits: Limits) -> tuple[str, str]:
    """The page that asks the server, and its policy."""
    return page({"about": about(run, model), "live": True, "maxSteps": limits.steps}), policy()
