"""`catmaps` in a process that may be killed: CATMAPS_TEST_KILL=RANK:STEP, in the first life only."""

import os
import signal
import sys
from typing import Any
from unittest.mock import patch


def main() -> int:
    from catmaps import cli
    from catmaps.training.module import FlowTrainModule

    rank, step = os.environ["CATMAPS_TEST_KILL"].split(":")
    train_batch = FlowTrainModule.train_batch

    def dying(module: FlowTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank
        if first and not dry_run and module.trainer.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        train_batch(module, batch, dry_run)

    with patch.object(FlowTrainModule, "train_batch", dying):
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
