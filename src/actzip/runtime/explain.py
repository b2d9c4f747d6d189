"""What a compiled network does, layer by layer: kernels, reasons, densities, work done and time taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from actzip import cpu
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.lower import Lowered, lower
from actzip.runtime.machine import peak_gflops
from actzip.runtime.ops.recurrent import Recurrent
from actzip.runtime.winograd import (
    fits,
    is_winograd,
    long_products,
    products,
    tile_density,
    tile_size,
    transforms,
)

__all__ = ["Explanation", "LayerRow", "elsewhere_row", "explain", "together"]


@dataclass
class LayerRow:
    """One node. ``density``: of its (first) input; ``effective_macs``: multiply-accumulates whose
    activation operands are not zero (of a recurrent layer: the states that its steps begin with),
    borders and strides counted exactly, of the run explained (all images); ``products``: what the
    kernel multiplies, which is less for Winograd's (those of the transformed tiles that are not
    skipped); ``tile_density``: those as a share of the transformed tiles' products, of tiles
    of 4x4 where another kernel computes what they could; ``peak_share``: 2 *
    products / time over the measured peak of the threads used. A node that runs by turns with the one
    before it has no time of its own: that one's ``milliseconds`` and ``peak_share`` are of both."""

    name: str
    op: str
    kernel: str
    kind: str
    why: str
    input_storage: str
    output_storage: str
    density: float | None
    output_density: float | None
    macs: int
    effective_macs: int
    milliseconds: float
    peak_share: float | None
    source: str
    products: int = 0
    tile_density: float | None = None


@dataclass
class Explanation:
    """Rows in execution order and totals. ``print`` it, or ``to_dict()`` for JSON."""

    rows: list[LayerRow]
    batch: int
    threads: int
    milliseconds: float
    macs: int
    effective_macs: int
    peak_gflops: float
    arena_bytes: int
    dense_arena_bytes: int
    weight_bytes: int
    spilled_bytes: int
    advice: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    note: str = ""

    @property
    def theoretical_speedup(self) -> float:
        """MACs over effective MACs: a count, not a time."""
        return self.macs / self.effective_macs if self.effective_macs else float("inf")

    @property
    def peak_share(self) -> float:
        """Products of the layers that multiply as a share of the peak, over their time."""
        ms = sum(r.milliseconds for r in self.rows if r.macs)
        return (
            2e-6 * sum(r.products for r in self.rows) / (ms * self.peak_gflops * self.threads) if ms else 0.0
        )

    def _size(self) -> str:
        shown = ", ".join(f"{v} {'x'.join(map(str, s))}" for v, s in self.inputs.items())
        return shown or f"batch {self.batch}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        d = asdict(self)
        d["theoretical_speedup"] = self.theoretical_speedup
        d["peak_share"] = self.peak_share
        return d

    def table(self) -> str:
        """The rows and totals as text."""
        head = (
            "layer",
            "op",
            "kernel",
            "in",
            "out",
            "density",
            "tiles",
            "MMACs",
            "eff. MMACs",
            "Mproducts",
            "ms",
            "% time",
            "% peak",
            "why",
        )
        body = []
        for r in self.rows:
            share = 100 * r.milliseconds / self.milliseconds if self.milliseconds else 0.0
            body.append(
                (
                    r.name,
                    r.op,
                    r.kernel or "-",
                    r.input_storage,
                    r.output_storage,
                    "-" if r.density is None else f"{r.density:.2f}",
                    "-" if r.tile_density is None else f"{r.tile_density:.2f}",
                    *(f"{k / 1e6:.1f}" if r.macs else "-" for k in (r.macs, r.effective_macs, r.products)),
                    f"{r.milliseconds:.3f}",
                    f"{share:.1f}",
                    "-" if r.peak_share is None else f"{100 * r.peak_share:.0f}",
                    r.why,
                )
            )
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        left = {0, 1, 2, 3, 4, len(head) - 1}
        lines = []
        for row in (head, *body):
            cells = [
                c.ljust(w) if i in left else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "-" * len(lines[0]))
        isa = self.machine.get("isa", "")
        lines += [
            "",
            f"{self.milliseconds:.2f} ms, {self._size()}, {self.threads} thread(s), "
            f"{self.machine.get('cpu', '')} ({isa}), peak {self.peak_gflops:.0f} GFLOP/s a core",
            f"{self.macs / 1e6:.0f} MMACs, {self.effective_macs / 1e6:.0f} effective (theoretical speed-up "
            f"{self.theoretical_speedup:.2f}); what multiplies runs at "
            f"{100 * self.peak_share:.0f} % of the peak",
            f"activations and scratch {self.arena_bytes / 1e6:.2f} MB ({self.dense_arena_bytes / 1e6:.2f} MB "
            f"if all were dense), weights {self.weight_bytes / 1e6:.1f} MB",
        ]
        if self.note:
            lines.append(self.note)
        if self.advice:
            lines.append(self.advice)
        return "\n".join(lines)

    __str__ = table


def dense_arena_bytes(graph: g.Graph, batch: int, threads: int = 1) -> int:
    """Bytes of the arena at this batch size, scratch included, were every map of ``graph`` stored
    dense."""
    plain = graph.copy()
    for value in plain.values.values():
        value.storage = "dense"
        value.quant = None
    return int(lower(plain).plan.arena_bytes(batch, threads))


def _uses(
    size: int, out: int, kernel: int, stride: int, before: int, dilation: int, turned: bool = False
) -> g.Array:
    """For each input position, how many (output, tap) pairs read it. ``turned``: for each output
    position, how many (input, tap) pairs there are; a transposed convolution's input has that place."""
    n = np.zeros(out if turned else size, np.int64)
    for k in range(kernel):
        at = np.arange(out) * stride - before + k * dilation
        inside = (at >= 0) & (at < size)
        np.add.at(n, np.arange(out)[inside] if turned else at[inside], 1)
    return n


def _counted(n: g.Node) -> tuple[str, ...]:
    """The values that say how much a node multiplies; none where it multiplies nothing."""
    if isinstance(n, (ops.Conv2d, ops.ConvTranspose2d, ops.Linear)):
        return n.inputs[:1]
    if isinstance(n, ops.MatMul):
        return n.inputs
    return (n.output,) if isinstance(n, Recurrent) else ()


def _work(n: g.Node, arrays: Sequence[Any], out: g.Shape) -> tuple[int, int]:
    """MACs inside the borders, and those of them of which no activation is zero, for the
    :func:`_counted` values (all images)."""
    x = arrays[0]
    if isinstance(n, ops.Conv2d):
        uy = _uses(x.shape[2], int(out[2]), n.weight.shape[2], n.stride[0], n.padding[0], n.dilation[0])  # type: ignore[arg-type]
        ux = _uses(x.shape[3], int(out[3]), n.weight.shape[3], n.stride[1], n.padding[1], n.dilation[1])  # type: ignore[arg-type]
        each = n.weight.shape[0] // n.groups
        total = int(uy.sum()) * int(ux.sum()) * x.shape[0] * x.shape[1] * each
        where = (x != 0).sum((0, 1), dtype=np.int64)
        return total, int((where * uy[:, None] * ux[None, :]).sum()) * each
    if isinstance(n, ops.ConvTranspose2d):
        kernel, sizes = n.weight.shape[2:], (int(out[2]), int(out[3]))  # type: ignore[arg-type]
        uy, ux = (
            _uses(sizes[i], x.shape[2 + i], kernel[i], n.stride[i], n.padding[i], n.dilation[i], turned=True)
            for i in (0, 1)
        )
        total = int(uy.sum()) * int(ux.sum()) * x.shape[0] * x.shape[1] * n.weight.shape[1]
        where = (x != 0).sum((0, 1), dtype=np.int64)
        return total, int((where * uy[:, None] * ux[None, :]).sum()) * n.weight.shape[1]
    if isinstance(n, ops.MatMul):
        a, b = x != 0, arrays[1] != 0
        rows, columns = a.sum(-2, dtype=np.int64), b.sum(-1, dtype=np.int64)
        images = np.broadcast_shapes(rows.shape, columns.shape)
        return math.prod(images) * a.shape[-2] * b.shape[-1], int((rows * columns).sum())
    if isinstance(n, Recurrent):  # the states that steps begin with; the first one's are zeros
        ways, wide, size = n.weight.shape
        states = x.reshape(*x.shape[:2], ways, size)
        used = [states[1:, :, k] if k == 1 or n.reverse else states[:-1, :, k] for k in range(ways)]
        total = x.shape[0] * x.shape[1] * int(n.weight.size)
        return total, sum(int(np.count_nonzero(s)) for s in used) * int(wide)
    return int(x.size) * n.weight.shape[0], int(np.count_nonzero(x)) * n.weight.shape[0]  # type: ignore[attr-defined]


def _copy_row(graph: g.Graph, value: str, seconds: float) -> LayerRow:
    storage = graph.values[value].storage if value in graph.values else "dense"
    return LayerRow(
        value,
        "copy",
        "",
        "dense",
        "another layout",
        storage,
        "dense",
        None,
        None,
        0,
        0,
        seconds * 1e3,
        None,
        "",
    )


def elsewhere_row(name: str, engine: str, why: str, milliseconds: float, source: str = "") -> LayerRow:
    """What another engine runs, as one row: it multiplies nothing that is counted here."""
    row = (name, engine, engine, "", why, "dense", "dense", None, None, 0, 0, milliseconds, None, source)
    return LayerRow(*row)


def _row(
    graph: g.Graph,
    n: g.Node,
    seconds: float,
    kernel: tuple[str, str],
    why: str,
    kept: dict[str, Any],
    peak: float,
) -> LayerRow:
    """``kernel``: its name and kind; ``kept``: inputs of convolutions and linear layers; ``peak``:
    GFLOP/s of all threads."""
    x, y = graph.values[n.inputs[0]], graph.values[n.output]
    macs, effective, multiplied, density, tiles = 0, 0, 0, x.density, None
    arrays = [kept[v].numpy() for v in _counted(n)]
    if arrays:
        a = arrays[0]
        macs, effective = _work(n, arrays, y.shape)
        multiplied = effective
        if isinstance(n, ops.Conv2d) and is_winograd(kernel[0]):
            m = tile_size(kernel[0])
            tiles, multiplied = tile_density(a, n, m), products(a, n, m)
        elif isinstance(n, ops.Conv2d) and transforms(kernel[0]):
            multiplied = long_products(a.shape[0], n, int(y.shape[2]), int(y.shape[3]))  # type: ignore[arg-type]
        elif isinstance(n, ops.Conv2d) and fits(n):
            tiles = tile_density(a, n, 4)
        if not isinstance(n, Recurrent):
            density = float(np.count_nonzero(a)) / max(a.size, 1)
    share = 2e-9 * multiplied / (seconds * peak) if macs and seconds > 0 else None
    return LayerRow(
        n.name,
        n.op,
        *kernel,
        why,
        x.storage,
        y.storage,
        density,
        y.density,
        macs,
        effective,
        seconds * 1e3,
        share,
        n.source,
        multiplied,
        tiles,
    )


def explain(
    graph: g.Graph,
    low: Lowered,
    why: dict[str, str],
    arrays: list[Any],
    batch: int,
    threads: int,
    runs: int,
    advice: str,
) -> Explanation:
    """Runs the plan ``runs`` times (times: medians) and the reference interpreter once (exact work)."""
    import torch

    from actzip.runtime.interpret import interpret

    outputs = [np.empty(g.concrete(graph.shape(v), batch), np.float32) for v in graph.outputs]
    samples = [low.plan.profile(batch, arrays, outputs, threads) for _ in range(max(1, runs) + 1)][1:]
    seconds = np.median([[row[4] for row in s] for s in samples], axis=0)
    wanted = {v for n in graph.nodes for v in _counted(n)}
    tensors = {v: torch.from_numpy(a) for v, a in zip(graph.inputs, arrays, strict=True)}
    _, kept = interpret(graph, tensors, wanted)
    kept.update({k: v for k, v in tensors.items() if k in wanted})
    peak = peak_gflops()
    nodes = {n.name: n for n in graph.nodes}
    spent: dict[str, float] = {}
    kernels: dict[str, tuple[str, str]] = {}
    for owner, row, t in zip(low.nodes, samples[0], seconds, strict=True):
        spent[owner] = spent.get(owner, 0.0) + float(t)
        if owner not in kernels or row[2]:
            kernels[owner] = (row[2], row[3])
    rows = []
    for owner, t in spent.items():
        if owner not in nodes:
            rows.append(_copy_row(graph, owner, t))
            continue
        row = _row(graph, nodes[owner], t, kernels[owner], why.get(owner, ""), kept, peak * threads)
        note = f"by turns with {owner}, whose time it is in"
        inside = [
            _row(graph, nodes[name], 0.0, ("", ""), note, kept, peak)
            for name, other in low.inside.items()
            if other == owner
        ]
        if inside and t > 0:
            done = row.products + sum(r.products for r in inside)
            row.peak_share = 2e-9 * done / (t * peak * threads)
        rows += [row, *inside]
    return Explanation(
        rows,
        batch,
        threads,
        sum(r.milliseconds for r in rows),
        sum(r.macs for r in rows),
        sum(r.effective_macs for r in rows),
        peak,
        int(low.plan.arena_bytes(batch, threads)),
        dense_arena_bytes(graph, batch, threads),
        int(low.plan.weight_bytes()),
        int(low.plan.spilled_bytes()),
        advice,
        cpu.info(),
        {v: list(a.shape) for v, a in zip(graph.inputs, arrays, strict=True)},
    )


def together(
    reports: Sequence[Explanation],
    rows: list[LayerRow],
    batch: int,
    threads: int,
    inputs: dict[str, list[int]],
    note: str = "",
) -> Explanation:
    """One explanation of parts, from theirs and all their rows."""

    def total(name: str) -> int:
        return sum(int(getattr(r, name)) for r in reports)

    def most(name: str) -> int:
        return max((int(getattr(r, name)) for r in reports), default=0)

    return Explanation(
        rows=rows,
        batch=batch,
        threads=threads,
        milliseconds=sum(r.milliseconds for r in rows),
        macs=total("macs"),
        effective_macs=total("effective_macs"),
        peak_gflops=peak_gflops(),
        arena_bytes=most("arena_bytes"),
        dense_arena_bytes=most("dense_arena_bytes"),
        weight_bytes=total("weight_bytes"),
        spilled_bytes=total("spilled_bytes"),
        advice=reports[0].advice if reports else "",
        machine=cpu.info(),
        inputs=inputs,
        note=note,
    )
