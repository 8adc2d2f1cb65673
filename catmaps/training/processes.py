"""The processes of a torchrun: how they find each other, again after a restart, and what the loss of one means."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import init_distributed, is_distributed
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from catmaps.errors import UserError


def join_processes(timeout: int) -> None:
    """Joins the process group, if started by torchrun. `timeout`: seconds that a process ever waits for others."""
    if "RANK" not in os.environ:
        return
    os.environ.setdefault("FS_LOCAL_RANK", os.environ["RANK"])
    if not is_distributed():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        wait = timedelta(seconds=timeout)
        init_distributed(backend=backend, timeout=wait, **_own_store(wait))


def _own_store(wait: timedelta) -> dict[str, Any]:
    """A store of this life's own, where torchrun hands the same one to each life of its processes.

    They would find the addresses of the dead in it. On several machines lives are not counted alike; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun give a new store to each.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=wait)
    life = PrefixStore(f"catmaps/life{env['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": life, "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])}


@contextmanager
def losing_peers(folder: Path) -> Iterator[None]:
    """UserError where another process was lost, or kept this one waiting too long."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        reason = next((str(e).splitlines()[0] for e in _chain(error) if _is_loss(e)), None)
        if reason is None:
            raise
        raise UserError(
            f"another process of the run was lost or stood still ({reason}); torchrun --max-restarts starts all of "
            f"them again, or continue with --resume {folder}"
        ) from error


def _is_loss(error: BaseException) -> bool:
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo/transport" in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
