"""Runs a function in several local processes, as torchrun would start them."""

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run(function: Callable[..., None], processes: int, *args: Any, seconds: float = 300) -> None:
    """Calls `function(*args)` in `processes` new processes of one gloo world, and waits for them.

    The environment holds what torchrun sets. The function makes the process group (training does); it is taken down
    here. Function and arguments are pickled, so the function must live in a module that can be imported.

    Raises:
        ProcessRaisedException: The function raised in one of them; its traceback is in the message.
        TimeoutError: They were not done after so many seconds; they have been killed.
    """
    started = spawn(_child, (function, processes, _free_port(), args), nprocs=processes, join=False)
    assert started is not None
    end = time.monotonic() + seconds
    while not started.join(timeout=1):
        if time.monotonic() > end:
            for process in started.processes:
                if process is not None:
                    process.kill()
            raise TimeoutError(f"{function.__name__} in {processes} processes took more than {seconds} s")


def _free_port() -> int:
    """Below the ports that systems give to outgoing connections: of those, another test takes one before it is used."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _child(rank: int, function: Callable[..., None], processes: int, port: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK", "FS_LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(processes)
    os.environ |= {"NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        function(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
