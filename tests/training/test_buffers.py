"""Memory of restored maps: reused when it is free, and never before."""

import pytest
import torch

from actzip.training import buffers, packed_activations
from actzip.training.buffers import Buffers
from crowd import at_once

if buffers._users is None:
    pytest.skip("this torch does not count the users of a storage", allow_module_level=True)

N = 50_000


def test_memory_comes_back_when_nothing_holds_it():
    made = Buffers()
    x = made.empty(N, torch.float32)
    address = x.data_ptr()
    part = x[10:20]
    del x
    assert made.empty(N, torch.float32).data_ptr() != address  # a view holds it
    del part
    y = made.empty(N // 2 + 1, torch.float64)
    assert y.dtype == torch.float64 and y.shape == (N // 2 + 1,)
    z = made.empty(N, torch.float32)
    assert z.data_ptr() == address


def test_a_graph_holds_its_memory():
    made = Buffers()
    x = made.empty(N, torch.float32).fill_(2.0)
    address = x.data_ptr()
    w = torch.ones(N, requires_grad=True)
    loss = (w * x).sum()
    del x
    assert made.empty(N, torch.float32).fill_(3.0).data_ptr() != address
    loss.backward()
    assert (w.grad == 2.0).all()


def test_what_is_held_stays_below_the_limit(monkeypatch):
    monkeypatch.setattr(buffers, "_LIMIT", 10 * N)
    made = Buffers()
    all_of_them = [made.empty(N, torch.float32) for _ in range(5)]
    assert len({x.data_ptr() for x in all_of_them}) == 5
    assert sum(b.nbytes for b in made._held) <= 10 * N
    all_of_them.clear()
    made.empty(2 * N, torch.float32)  # frees what is too small for it
    assert sum(b.nbytes for b in made._held) <= 10 * N


def test_sizes_of_earlier_layers_are_not_held():
    made = Buffers()
    made.empty(N, torch.float32)
    for _ in range(2 * buffers._AGE):
        made.empty(4 * N, torch.float32)
    made.empty(16 * N, torch.float32)
    assert [b.nbytes for b in made._held] == [16 * N, 64 * N]


def test_threads_never_share_a_buffer():
    made, faults = Buffers(), []

    def run(value):
        for _ in range(300):
            x = made.empty(N, torch.float32)
            x[0] = x[-1] = value
            if x[0] != value or x[-1] != value:
                faults.append(value)

    at_once(run, 4)
    assert not faults


def test_nothing_is_held_after_backward():
    import gc
    import weakref

    seen = []
    before = Buffers.empty

    class Watched(Buffers):
        __slots__ = ("__weakref__",)

        def empty(self, n, dtype):
            seen.append(weakref.ref(self))
            return before(self, n, dtype)

    from actzip.training import packed

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 3))
    original, packed.Buffers = packed.Buffers, Watched
    try:
        with packed_activations(model, 8):
            loss = model(torch.randn(4, 3, 40, 40)).sum()
        loss.backward()
    finally:
        packed.Buffers = original
    del loss
    gc.collect()
    assert seen and all(ref() is None for ref in seen)
