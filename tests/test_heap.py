"""What lies free in the heap is given back, where memory counts more than time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actzip import heap

HOLES = """
import sys
import torch
from pathlib import Path
from actzip import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

heap.settle(heap.LARGE, 0)  # nothing is free yet
maps, pins = [], []
torch.empty(heap.LARGE - 4096, dtype=torch.uint8)  # from here on blocks of this size are the heap's
for i in range(40):
    maps.append(torch.ones(4 << 20, dtype=torch.uint8))
    pins.append(torch.ones(1 << 16, dtype=torch.uint8))
before = resident()
maps.clear()
held = before - resident()
told, largest = eval(sys.argv[1])
for _ in range(20):
    heap.settle(told, largest)
print(held >> 20, before - resident() >> 20, sum(int(p.sum()) for p in pins))
"""


@pytest.mark.skipif(heap._beyond() is None, reason="another C library")
@pytest.mark.parametrize(
    ("told", "largest", "goes"),
    [
        (32 << 20, 0, True),  # a large map comes
        (4 << 20, 32 << 20, True),  # several small ones, where large ones are around
        (4 << 20, 1 << 30, False),  # less lies free than the largest takes
        (4 << 20, 8 << 20, True),  # all are small, and much lies free
        (1 << 20, 8 << 20, False),  # little has passed since
    ],
)
def test_what_is_free_goes_back_before_it_makes_the_peak(told, largest, goes):
    command = [sys.executable, "-c", HOLES, f"({told}, {largest})"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held, given, pins = map(int, out.split())
    assert pins == 40 << 16
    if held > 40:
        pytest.skip("this heap has no holes")
    assert given > 100 if goes else given <= held + 8


def test_large_maps_drop_the_buffers_of_small_ones():
    from actzip.training.buffers import Buffers

    made = Buffers()
    held = made.empty(1 << 20, torch.uint8)
    made.empty(3 << 20, torch.uint8)
    made.empty(heap.LARGE, torch.uint8)
    assert [b.nbytes for b in made._held] in ([1 << 20], [])
    del held


def test_a_system_that_does_not_tell_is_left_alone(monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError("no /proc")))
    heap.settle(heap.LARGE, 0)
