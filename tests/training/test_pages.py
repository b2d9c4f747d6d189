"""Memory of packed maps, and what lies free in the heap beside it."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actzip.training import heap, packed_activations, pages
from actzip.training.pages import kept
from crowd import at_once

if sys.platform != "linux":
    pytest.skip("mappings are Linux's", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_pieces_are_apart_and_aligned(dtype):
    sizes = [0, 1, 4096, 5001, 100_000, pages._SLAB // 4 + 3, pages._SLAB + 1]
    pieces = [kept(n, dtype).fill_(i) for i, n in enumerate(sizes * 3)]
    assert all(p.dtype == dtype and p.shape == (n,) for p, n in zip(pieces, sizes * 3, strict=True))
    assert all((p == i).all() and p.data_ptr() % 64 == 0 for i, p in enumerate(pieces) if p.numel() > 1)


def test_pages_go_back_with_the_last_piece_in_them():
    before = pages.mapped()
    pieces = [kept(pages._SLAB // 4, torch.uint8) for _ in range(4)]
    large = kept(3 * pages._SLAB, torch.uint8)
    assert pages.mapped() - before >= 4 * pages._SLAB
    del large
    pieces[:3] = []
    assert pages.mapped() - before >= pages._SLAB
    view = pieces[0][5:9]
    pieces.clear()
    assert pages.mapped() - before >= pages._SLAB
    del view
    assert pages.mapped() == before


def test_without_mappings_the_heap_serves(monkeypatch):
    def none_left(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", none_left)
    assert kept(2 * pages._SLAB, torch.uint8).fill_(7).sum() == 14 * pages._SLAB


def test_threads_never_share_a_piece():
    faults = []

    def run(value):
        for _ in range(50):
            x = [kept(10_000, torch.int32).fill_(value) for _ in range(4)]
            if any((part != value).any() for part in x):
                faults.append(value)

    at_once(run, 4)
    assert not faults


def test_no_pages_are_left_after_backward():
    before = pages.mapped()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 3))
    for bits in (None, 8, 4):
        with packed_activations(model, bits):
            loss = model(torch.randn(4, 3, 40, 40)).sum()
        assert pages.mapped() > before
        loss.backward()
        assert pages.mapped() == before


HOLES = """
import sys
import torch
from pathlib import Path
from actzip.training import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

heap.settle(heap.LARGE)  # nothing is free yet
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
        (4 << 20, 8 << 20, False),  # all are small: the heap has room for them
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
    heap.settle(heap.LARGE)
