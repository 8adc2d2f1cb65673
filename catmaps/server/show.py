"""Trajectories without a server, for a page that is one file."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catmaps.errors import UserError
from catmaps.generation import next_window
from catmaps.infill import Template, encode
from catmaps.model import Run
from catmaps.server.page import about, page
from catmaps.server.pieces import Draft, Piece, Settings, draw_pieces, padded, stream_of
from catmaps.server.trajectory import as_json

ALTERNATIVES = 5


def template_after(prompt: str, tokens: int, run: Run) -> Template:
    """The window that goes on after a prompt, of which it holds the end.

    Raises:
        UserError: Characters outside the alphabet, or more tokens than one window takes.
    """
    ids, longest = encode(prompt, run.tokenizer), run.config.data.length
    context, window = next_window(len(ids), tokens, longest)
    if window - context < tokens:
        raise UserError(f"{tokens} tokens after this prompt need more than a window of {longest}: ask for less")
    text = np.pad(ids[len(ids) - context :], (0, tokens))
    return Template(text, np.arange(window) < context)


def trajectory(run: Run, template: Template, settings: Settings, seed: int, strings: Sequence[str]) -> dict[str, Any]:
    """A panel of the page: one text on its way.

    Raises:
        UserError: The text does not fit the run's window.
    """
    length, window = len(template.tokens), run.config.data.length
    if length > window:
        raise UserError(f"the text has {length} tokens, blanks included; a window holds {window}")
    drafts: list[Draft] = []
    tokens, known = padded(template.tokens, template.known, window)
    piece = Piece(tokens, known, settings, stream_of(seed, 0, 0, 0), ALTERNATIVES, drafts.append)
    began = time.monotonic()
    draw_pieces(run, [piece])
    return {
        "steps": settings.steps,
        "calls": settings.config.calls,
        "seconds": time.monotonic() - began,
        "trajectory": as_json(drafts, template.known, settings, strings),
    }


def write_page(run: Run, model: str, panels: Sequence[dict[str, Any]], file: Path) -> None:
    """The page with these panels, for a browser without network.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        file.write_text(page({"about": about(run, model), "live": False, "panels": list(panels)}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
