"""Transposed convolutions whose windows do not overlap become 1x1 convolutions, which skip zeros."""

from __future__ import annotations

import dataclasses

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.ops.depth_to_space import DepthToSpace

__all__ = ["split_transposed"]


def split_transposed(graph: g.Graph) -> g.Graph:
    """A ConvTranspose2d whose stride is its kernel's size, without padding, becomes a 1x1 convolution to
    the channels of all pixels of a window, and a DepthToSpace."""
    graph = graph.copy()
    nodes: list[g.Node] = []
    for n in graph.nodes:
        if isinstance(n, ops.ConvTranspose2d) and _apart(n):
            nodes += _split(graph, n)
        else:
            nodes.append(n)
    graph.nodes = nodes
    return graph


def _apart(n: ops.ConvTranspose2d) -> bool:
    kernel = tuple(int(k) for k in n.weight.shape[2:])
    plain = n.groups == 1 and n.dilation == (1, 1) and not any(n.padding) and not any(n.output_padding)
    return plain and n.stride == kernel


def _split(graph: g.Graph, n: ops.ConvTranspose2d) -> tuple[g.Node, g.Node]:
    c, o, kh, kw = n.weight.shape
    batch, _, h, w = graph.shape(n.inputs[0])
    wide = graph.fresh(n.output + "_wide")
    graph.values[wide] = g.Value(wide, (batch, kh * kw * o, h, w))
    weight = n.weight.transpose(2, 3, 1, 0).reshape(kh * kw * o, c, 1, 1)
    bias = None if n.bias is None else np.tile(n.bias, kh * kw)
    conv = ops.Conv2d(
        n.name,
        n.inputs,
        wide,
        weight=np.ascontiguousarray(weight),
        bias=bias,
        act=_tiled(n.act, kh * kw),
        source=n.source,
    )
    return conv, DepthToSpace(n.name + ":pixels", (wide,), n.output, block=(kh, kw), source=n.source)


def _tiled(act: Act | None, times: int) -> Act | None:
    if act is None or act.param is None or act.param.size <= 1:
        return act
    return dataclasses.replace(act, param=np.tile(act.param.reshape(-1), times))
