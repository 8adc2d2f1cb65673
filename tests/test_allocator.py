"""Memory of a process that multiplies matrices of ever new shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import catmaps
from catmaps.allocator import KERNELS, STORES

GROWTH = """
import ctypes
from pathlib import Path
import torch
from catmaps.allocator import hand_back_freed_memory, keep_few_kernels

keep_few_kernels()
torch.set_num_threads(1)
weight = torch.zeros(64, 64, dtype=torch.bfloat16)

def resident(shapes):
    for rows in shapes:
        torch.nn.functional.linear(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)
    hand_back_freed_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

first = resident(range(512, 512 + {shapes}))
print(resident(range(512 + {shapes}, 512 + 3 * {shapes})) - first)
"""


def growth(**surroundings: str) -> int:
    """Bytes that products of twice as many new shapes add, once as many as are kept have been made."""
    environment = {name: value for name, value in os.environ.items() if name not in STORES} | surroundings
    environment["PYTHONPATH"] = str(Path(catmaps.__file__).parents[1])
    command = [sys.executable, "-c", GROWTH.format(shapes=KERNELS)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
def test_products_of_new_shapes_take_no_more_memory() -> None:
    kept = growth(**dict.fromkeys(STORES, "1024"))
    if kept < 10e6:
        pytest.skip("products in bf16 are not compiled here")
    assert growth() < 0.2 * kept
