"""A map that a concatenation keeps dense is read packed by the convolutions behind it, where that
is quicker."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.copies import add_copies, drop_copies
from actzip.runtime.storage import choose_storage


class Skip(nn.Module):
    """A skip connection, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 128, 3, padding=1)
        self.c, self.d = nn.Conv2d(128, 64, 3, padding=1), nn.Conv2d(192, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        z = F.interpolate(F.max_pool2d(self.c(y), 2), scale_factor=2.0)
        return self.d(torch.cat([z, y], 1))


def copies(graph: g.Graph) -> dict[str, ops.Copy]:
    """Reader -> the copy that it reads."""
    found = {n.output: n for n in graph.nodes if isinstance(n, ops.Copy)}
    return {n.name: found[v] for n in graph.nodes for v in n.inputs if v in found}


def test_a_skip_connection_is_read_packed() -> None:
    model, x = Skip().eval(), torch.rand(2, 3, 16, 16)
    fast = actzip.compile(model, x, tune=False, winograd=False)
    copy = copies(fast.graph)["c"]
    assert fast.graph.values[copy.output].storage == "packed"
    assert fast.graph.values[copy.inputs[0]].storage == "dense"
    assert {r.name: r for r in fast.explain(runs=1).rows}["c"].kernel.startswith(
        ("sparse", "pair", "row", "taps")
    )
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)


def test_copies_that_stay_dense_go() -> None:
    model, x = Skip().eval(), torch.rand(1, 3, 16, 16)
    graph = actzip.compile(model, x, tune=False).graph
    plain = drop_copies(choose_storage(graph, set(graph.values)))
    with_copies = add_copies(plain, set())
    assert set(copies(with_copies)) == {"c", "d"}
    stored = choose_storage(with_copies, set(with_copies.values))
    assert str(drop_copies(stored)) == str(choose_storage(plain, set(plain.values)))


def test_maps_that_weights_of_infinity_read_are_not_copied() -> None:
    model, x = Skip().eval(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        model.c.weight[0, 0, 0, 0] = float("inf")
    fast = actzip.compile(model, x, tune=False)
    assert "c" not in copies(fast.graph)
    got, want = fast(x).numpy(), model(x).detach().numpy()
    assert np.array_equal(np.isnan(got), np.isnan(want))


def test_channels_last_of_an_input_are_a_map_as_they_lie():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.d(self.c(x.permute(0, 3, 1, 2)).relu()).permute(0, 2, 3, 1)

    torch.manual_seed(0)
    model, x = Last().eval(), torch.randn(2, 9, 11, 3)
    fast = actzip.compile(model, x, tune=False, cache=False)
    for shape in [(2, 9, 11, 3), (1, 16, 5, 3)]:
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x).detach(), atol=1e-5, rtol=1e-4)
    assert [r.op for r in fast.explain().rows].count("copy") == 0
