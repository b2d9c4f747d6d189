"""Transposed convolutions become convolutions whose channels become pixels: nothing is filled with zeros,
and what is zero is skipped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.ops.depth_to_space import DepthToSpace

__all__ = ["split_transposed"]


def split_transposed(graph: g.Graph) -> g.Graph:
    """A ConvTranspose2d becomes convolutions and a DepthToSpace.

    Where its stride is its kernel's size, without padding, one 1x1 convolution to the channels of
    all pixels of a window. Where windows overlap, pixels of one remainder by the stride (a phase)
    are a convolution by every ``stride``-th tap; phases that read the same pixels are one
    convolution, or all phases, where few channels leave vectors empty otherwise.
    """
    graph = graph.copy()
    nodes: list[g.Node] = []
    for n in graph.nodes:
        if isinstance(n, ops.ConvTranspose2d) and _apart(n):
            nodes += _split(graph, n)
        elif isinstance(n, ops.ConvTranspose2d) and n.groups == 1 and n.dilation == (1, 1):
            nodes += _in_phases(graph, n)
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


@dataclass
class _Axis:
    """One axis of a transposed convolution.

    ``taps``: of each phase, distance of a pixel that it reads -> tap. ``inputs``: its pixels.
    ``size``: those of each phase.
    """

    taps: list[dict[int, int]]
    inputs: int
    size: int

    @classmethod
    def of(cls, kernel: int, stride: int, before: int, inputs: int, outputs: int) -> _Axis:
        taps = []
        for phase in range(stride):
            ahead, first = divmod(phase + before, stride)
            taps.append({ahead - j: t for j, t in enumerate(range(first, kernel, stride))})
        size = -(-outputs // stride)
        return cls(taps, inputs, size)

    def window(self, phases: range) -> tuple[int, int]:
        """The first and last distance that these phases read, or more, that no padding is negative."""
        read = [d for p in phases for d in self.taps[p]]
        return min([0, *read]), max([0, self.inputs - self.size, *read])

    def runs(self) -> list[range]:
        """Neighbouring phases that read the same pixels."""
        found: list[range] = []
        for p in range(len(self.taps)):
            if found and self.window(found[-1]) == self.window(range(p, p + 1)):
                found[-1] = range(found[-1].start, p + 1)
            else:
                found.append(range(p, p + 1))
        return found


#: Channels that a kernel computes at once, about.
_VECTOR = 16


def _in_phases(graph: g.Graph, n: ops.ConvTranspose2d) -> list[g.Node]:
    shape = graph.shape(n.output)
    batch, _, *inputs = graph.shape(n.inputs[0])
    axes = [
        _Axis.of(n.weight.shape[i + 2], n.stride[i], n.padding[i], *(g.static(d, "a size") for d in sizes))
        for i, sizes in enumerate(zip(inputs, shape[2:], strict=True))
    ]
    high, wide = n.stride
    each = len(n.weight[0])

    def value(what: str, *dims: g.Dim) -> str:
        v = graph.fresh(n.output + what)
        graph.values[v] = g.Value(v, (batch, *dims))
        return v

    blocks = _blocks(axes, each)
    size = [a.size for a in axes]
    v = n.output if n.stride == (1, 1) else value("_wide", each * high * wide, *size)
    made: list[g.Node] = []
    for k, (rows, columns) in enumerate(blocks):
        alone = len(blocks) == 1
        part = v if alone else value("_phases", each * len(rows) * len(columns), *size)
        made.append(_phase_conv(n, axes, rows, columns, n.name if alone else f"{n.name}:{k}", part))
    if len(blocks) > 1:
        made.append(ops.Concat(n.name, tuple(c.output for c in made), v, axis=1, source=n.source))
    if n.stride == (1, 1):
        return made
    pixels = [high * size[0], wide * size[1]]
    over = [a for a in (0, 1) if pixels[a] != shape[2 + a]]
    u = value("_pixels", each, *pixels) if over else n.output
    made.append(DepthToSpace(n.name + ":pixels", (v,), u, block=n.stride, source=n.source))
    for a in over:
        pixels[a] = g.static(shape[2 + a], "a size")
        cut = n.output if a == over[-1] else value("_cut", each, *pixels)
        made.append(
            ops.Slice(f"{n.name}:cut{a}", (u,), cut, axis=2 + a, start=0, stop=pixels[a], source=n.source)
        )
        u = cut
    return made


def _phase_conv(
    n: ops.ConvTranspose2d, axes: list[_Axis], rows: range, columns: range, name: str, output: str
) -> ops.Conv2d:
    (top, bottom), (left, right) = axes[0].window(rows), axes[1].window(columns)
    c, o = n.weight.shape[:2]
    weight = np.zeros((len(rows), len(columns), o, c, bottom - top + 1, right - left + 1), np.float32)
    for y in rows:
        for dy, ty in axes[0].taps[y].items():
            for x in columns:
                for dx, tx in axes[1].taps[x].items():
                    at = weight[y - rows.start, x - columns.start, :, :, dy - top, dx - left]
                    at[:] = n.weight[:, :, ty, tx].T
    times = len(rows) * len(columns)
    return ops.Conv2d(
        name,
        n.inputs,
        output,
        weight=weight.reshape(times * o, *weight.shape[3:]),
        bias=None if n.bias is None else np.tile(n.bias, times),
        padding=(-top, -left, bottom - axes[0].inputs + axes[0].size, right - axes[1].inputs + axes[1].size),
        act=_tiled(n.act, times),
        source=n.source,
    )


def _blocks(axes: list[_Axis], outputs: int) -> list[tuple[range, range]]:
    """Phases of rows and columns that one convolution each computes, in the order of channels."""
    every = [range(len(a.taps)) for a in axes]
    rows, columns = (a.runs() for a in axes)
    if len(columns) > 1:
        rows = [range(p, p + 1) for p in every[0]]
    apart = [(r, c) for r in rows for c in columns]

    def cost(r: range, c: range) -> int:
        taps = [hi - lo + 1 for lo, hi in (axes[0].window(r), axes[1].window(c))]
        return -(-len(r) * len(c) * outputs // _VECTOR) * taps[0] * taps[1]

    joined = cost(every[0], every[1]) <= sum(cost(r, c) for r, c in apart)
    return [(every[0], every[1])] if joined else apart
