"""The IR: shape inference, validation messages, printing, copying."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.interpret import interpret

N = g.Sym()


def conv(name="conv", o=8, i=3, k=3, **kw):
    return ops.Conv2d(
        name, ("x",), name + "_out", weight=np.zeros((o, i // kw.get("groups", 1), k, k), np.float32), **kw
    )


def base(shape=(N, 3, 9, 11)):
    graph = g.Graph("t")
    graph.add_input("x", shape)
    return graph


@pytest.mark.parametrize(
    ("kw", "want"),
    [
        ({}, (N, 8, 7, 9)),
        ({"stride": (2, 3), "padding": (1, 1, 1, 1)}, (N, 8, 5, 4)),
        ({"dilation": (2, 1), "padding": (0, 1, 2, 3)}, (N, 8, 7, 13)),
    ],
)
def test_conv_shape_is_torchs(kw, want):
    graph = base()
    graph.add(conv(**kw))
    assert graph.shape("conv_out") == want
    t, left, b, r = kw.get("padding", (0, 0, 0, 0))
    x = torch.nn.functional.pad(torch.zeros(2, 3, 9, 11), (left, r, t, b))
    y = torch.nn.functional.conv2d(
        x, torch.zeros(8, 3, 3, 3), stride=kw.get("stride", 1), dilation=kw.get("dilation", 1)
    )
    assert tuple(y.shape) == g.concrete(want, 2)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("h", [5, 6, 7, 8, 9])
@pytest.mark.parametrize(("k", "s", "p"), [(2, 2, 0), (3, 2, 1), (3, 3, 1), (2, 3, 0), (3, 1, 1)])
def test_pooling_is_torchs(ceil, h, k, s, p):
    x = torch.randn(2, 3, h, h + 1)
    for kind in ("max", "avg"):
        for include in (True, False):
            graph = base((N, 3, h, h + 1))
            graph.add(
                ops.Pool(
                    "p",
                    ("x",),
                    "y",
                    kind=kind,
                    kernel_size=(k, k),
                    stride=(s, s),
                    padding=(p,) * 4,
                    ceil_mode=ceil,
                    count_include_pad=include,
                )
            )
            graph.outputs = ["y"]
            (y,), _ = interpret(graph, {"x": x})
            if kind == "max":
                want = torch.nn.functional.max_pool2d(x, k, s, p, ceil_mode=ceil)
            else:
                want = torch.nn.functional.avg_pool2d(x, k, s, p, ceil_mode=ceil, count_include_pad=include)
            torch.testing.assert_close(y, want)


def test_errors_name_the_node_and_its_source():
    graph = base()
    node = conv("stem", i=4)
    node.source = "features.0: aten.convolution (net.py:7)"
    with pytest.raises(InputError, match=r"stem.*features\.0.*net\.py:7.*does not fit 3 channels"):
        graph.add(node)
    with pytest.raises(InputError, match="does not exist"):
        graph.add(ops.Activation("a", ("nowhere",), "y", act=Act.of("relu")))
    with pytest.raises(InputError, match="2 inputs"):
        graph.add(ops.Softmax("s", ("x", "x"), "y"))
    with pytest.raises(UnsupportedError, match="swoosh"):
        Act.of("swoosh")
    with pytest.raises(InputError, match="does not take alpha"):
        Act.of("relu", alpha=1.0)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (ops.Concat("c", ("x", "y4"), "z", axis=1), "do not join"),
        (ops.Reshape("r", ("x",), "z", shape=(N, 5)), "cannot become"),
        (ops.Slice("s", ("x",), "z", axis=0, start=0, stop=1), "batch"),
        (ops.Slice("s", ("x",), "z", axis=1, start=0, stop=9), "slice 0:9"),
        (ops.Reduce("m", ("x",), "z", kind="mean", axes=(0,)), "batch"),
        (ops.Transpose("t", ("x",), "z", perm=(0, 1, 1, 2)), "permutation"),
        (ops.Pad("p", ("x",), "z", before=(0, 0, 9, 0), after=(0, 0, 0, 0), mode="reflect"), "padding"),
        (ops.Pool("p", ("x",), "z", kind="max", kernel_size=(20, 20)), "does not fit"),
        (ops.Linear("l", ("x",), "z", weight=np.zeros((4, 5), np.float32)), "does not fit"),
        (ops.Binary("b", ("x", "y4"), "z", kind="add"), "broadcast"),
        (ops.Activation("a", ("x",), "z", act=Act.of("prelu", param=np.zeros(7, np.float32))), "7 numbers"),
    ],
)
def test_impossible_nodes_are_refused(node, message):
    graph = base()
    graph.add_input("y4", (N, 3, 4, 4))
    with pytest.raises((InputError, UnsupportedError), match=message):
        graph.add(node)


def test_validate_finds_what_a_pass_broke():
    graph = base()
    graph.add(conv())
    graph.add(ops.Activation("a", ("conv_out",), "y", act=Act.of("relu")))
    graph.outputs = ["y"]
    graph.validate()
    swapped = graph.copy()
    swapped.nodes.reverse()
    with pytest.raises(InputError, match="before it is written"):
        swapped.validate()
    lied = graph.copy()
    lied.values["y"].shape = (N, 8, 7, 8)
    with pytest.raises(InputError, match="declared"):
        lied.validate()
    lost = graph.copy()
    lost.outputs = []
    with pytest.raises(InputError, match="no output"):
        lost.validate()
    placed = graph.copy()
    placed.values["y"].place = ("conv_out", 4)
    with pytest.raises(InputError, match="outside"):
        placed.validate()


def test_copy_is_independent_and_shares_parameters():
    graph = base()
    graph.add(conv())
    graph.outputs = ["conv_out"]
    other = graph.copy()
    other.nodes[0].stride = (2, 2)
    other.values["conv_out"].storage = "packed"
    assert graph.nodes[0].stride == (1, 1)
    assert graph.values["conv_out"].storage == "dense"
    assert other.nodes[0].weight is graph.nodes[0].weight


def test_printing_shows_shapes_and_parameters():
    graph = base()
    graph.add(conv(act=Act.of("clip", lo=0.0, hi=6.0)))
    graph.outputs = ["conv_out"]
    text = str(graph)
    assert "x: float32[N, 3, 9, 11]" in text
    assert "conv_out = conv2d(x, weight=float32[8, 3, 3, 3], act=clip(lo=0, hi=6))" in text


def test_macs():
    graph = base()
    graph.add(conv(groups=1))
    assert graph.macs() == {"conv": 8 * 3 * 9 * 7 * 9}
