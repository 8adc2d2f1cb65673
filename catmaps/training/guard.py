"""Which steps are not taken: those whose gradient is not finite, or far larger than it has lately been."""

from collections.abc import Mapping

import torch
from torch import Tensor

from catmaps.errors import UserError

WINDOW = 128
UNKNOWN = -1.0  # where the window has no norm yet
LEAST = 32  # norms to know before a large one is told


class Guard:
    """Judges steps by the norm of the gradient over all processes, hence alike on each of them.

    Args:
        deviations: A norm above mean + this x standard deviation of the last 128 taken steps is a spike; 0: none is.
        patience: Steps refused in a row after which training has failed.
    """

    def __init__(self, deviations: float, patience: int) -> None:
        self.deviations, self.patience = deviations, patience
        self.norms = torch.full((WINDOW,), UNKNOWN, dtype=torch.float64)
        self.refused = 0

    def refuses(self, norm: float, step: int) -> bool:
        """Whether the step must not be taken.

        Raises:
            UserError: Too many were refused in a row.
        """
        why = self._odd(norm)
        if why is None:
            self.norms = torch.cat([self.norms[1:], torch.tensor([norm], dtype=torch.float64)])
            self.refused = 0
            return False
        self.refused += 1
        if self.refused >= self.patience:
            row = "" if self.patience == 1 else f", after {self.refused - 1} more that were skipped"
            raise UserError(f"{why} at step {step}{row}: start again with smaller learning rates")
        return True

    def _odd(self, norm: float) -> str | None:
        if not torch.tensor(norm).isfinite():
            return "the gradient is not finite"
        known = self.norms[self.norms != UNKNOWN]
        if self.deviations == 0 or len(known) < LEAST:
            return None
        limit = (known.mean() + self.deviations * known.std()).item()
        return f"the gradient's norm {norm:.4g} exceeds {limit:.4g}" if norm > limit else None

    def state_dict(self) -> dict[str, Tensor]:
        return {"norms": self.norms, "refused": torch.tensor(self.refused)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.norms, self.refused = state["norms"].clone(), int(state["refused"])
