"""The way of a text from noise, as the page shows it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from catmaps.server.pieces import Draft, Settings


def calls_after(step: int, settings: Settings) -> int:
    """Network calls that the first `step` steps made."""
    each = 2 if settings.sampler == "heun" else 1
    return min(each * step, settings.config.calls)


def as_json(
    drafts: Sequence[Draft], known: Bool[np.ndarray, "l"], settings: Settings, strings: Sequence[str]
) -> dict[str, Any]:
    """Every step's likeliest tokens, best first, with their probabilities; `given` marks what was not written.

    Args:
        drafts: One a step, of a window that begins with the L positions shown.
        known: Where text is given.
        settings: How it was drawn.
        strings: What stands for each id.
    """
    length = len(known)
    used = sorted({int(i) for draft in drafts for i in np.unique(draft.ids[:length])})
    return {
        "sampler": settings.sampler,
        "strings": {i: strings[i] for i in used},
        "given": known.astype(int).tolist(),
        "steps": [
            {
                "t": round(draft.t, 6),
                "calls": calls_after(i, settings),
                "ids": draft.ids[:length].tolist(),
                "p": [[round(p, 4) for p in row] for row in draft.probabilities[:length].tolist()],
            }
            for i, draft in enumerate(drafts, 1)
        ],
    }
