"""Every operator of the native Plan against PyTorch: random shapes, odd channel counts, batches,
dense and packed storage, every instruction set of this CPU; concurrent runs; specs and arrays that
do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actzip._native import _engine
from crowd import at_once

RNG = np.random.default_rng(5)
ISAS = _engine.isas()
LAYOUTS = ("map", "packed")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _engine.force_isa(request.param)
    yield request.param
    _engine.force_isa("")


def sparse(*shape: int, density: float = 0.5) -> np.ndarray:
    x = RNG.standard_normal(shape).astype(np.float32)
    return np.where(RNG.random(shape) < density, x, np.float32(0))


class Plan:
    """One operator between layout changes. Shapes are those of a batch of one; dimension 0 is the batch."""

    def __init__(self) -> None:
        self.b = _engine.PlanBuilder()
        self.count = 0

    def value(self, shape: tuple[int, ...], layout: str = "plain", **kw: Any) -> int:
        self.count += 1
        dims = [1, *shape[1:]]
        return int(self.b.value(f"v{self.count}", dims, [True] + [False] * (len(dims) - 1), layout, **kw))

    def input(self, shape: tuple[int, ...], layout: str = "plain", **kw: Any) -> int:
        v = self.value(shape)
        self.b.input(v)
        if layout == "plain":
            return v
        m = self.value(shape, "map")
        self.b.node("copy", "in", [v], m)
        if layout == "map":
            return m
        p = self.value(shape, "packed", **{"density": 0.5, **kw})
        self.b.node("copy", "pack", [m], p)
        return p

    def output(self, v: int, shape: tuple[int, ...], layout: str = "plain") -> None:
        if layout == "packed":
            m = self.value(shape, "map")
            self.b.node("copy", "unpack", [v], m)
            v, layout = m, "map"
        if layout == "map":
            o = self.value(shape)
            self.b.node("copy", "out", [v], o)
            v = o
        self.b.output(v)

    def build(self) -> Any:
        return self.b.build()


def run(
    op: str,
    xs: list[np.ndarray],
    out: tuple[int, ...],
    *,
    ins: str = "plain",
    outs: str = "plain",
    threads: int = 2,
    extra: str | None = None,
    **spec: Any,
) -> np.ndarray:
    """``op`` on ``xs`` (inputs after the first in layout ``extra``) with output of shape ``out``."""
    p = Plan()
    inputs = [p.input(x.shape, ins if i == 0 or extra is None else extra) for i, x in enumerate(xs)]
    y = p.value(out, outs, **({"density": 0.5} if outs == "packed" else {}))
    p.b.node(op, op, inputs, y, **spec)
    p.output(y, out, outs)
    result = np.full(out, 7, np.float32)
    p.build().run(xs[0].shape[0], xs, [result], threads)
    return result


def close(got: np.ndarray, want: torch.Tensor, tolerance: float = 2e-5) -> None:
    w = want.numpy()
    assert got.shape == w.shape
    scale = max(1.0, float(np.abs(w[np.isfinite(w)]).max(initial=0.0)))
    np.testing.assert_allclose(got, w, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


# ------------------------------------------------------------------------------------------------ convolution


@pytest.mark.parametrize("ins", LAYOUTS)
@pytest.mark.parametrize("outs", LAYOUTS)
def test_conv(isa: str, ins: str, outs: str) -> None:
    for _ in range(6):
        groups = int(RNG.choice([1, 1, 2, 3]))
        ic, oc = (int(RNG.integers(1, 45)) * groups for _ in range(2))
        k = [int(v) for v in RNG.integers(1, 5, 2)]
        s = [int(v) for v in RNG.integers(1, 4, 2)]
        d = [int(v) for v in RNG.integers(1, 3, 2)]
        pad = [int(v) for v in RNG.integers(0, 3, 4)]
        h, w = (int(RNG.integers(9, 20)) for _ in range(2))
        n = int(RNG.integers(1, 4))
        x = sparse(n, ic, h, w, density=float(RNG.choice([0.0, 0.1, 0.5, 1.0])))
        weight = RNG.standard_normal((oc, ic // groups, *k)).astype(np.float32)
        bias = RNG.standard_normal(oc).astype(np.float32)
        t, left, b, r = pad
        want = F.conv2d(
            F.pad(torch.from_numpy(x), (left, r, t, b)),
            torch.from_numpy(weight),
            torch.from_numpy(bias),
            s,
            0,
            d,
            groups,
        )
        act = str(RNG.choice(["", "relu", "clip", "threshold"]))
        arrays = {"weight": weight, "bias": bias}
        strings, floats = {}, {}
        xs = [x]
        if RNG.random() < 0.5:
            xs.append(sparse(*want.shape))
            want = want + torch.from_numpy(xs[1])
        if act:
            strings["act"] = act
        if act == "relu":
            want = want.relu()
        elif act == "clip":
            want, floats = want.clamp(0, 2), {"act_lo": [0.0], "act_hi": [2.0]}
        elif act == "threshold":
            theta = np.abs(RNG.standard_normal(oc)).astype(np.float32)
            arrays["act_param"] = theta
            # what lies at the threshold within rounding may fall on either side
            near = (want - torch.from_numpy(theta)[:, None, None]).abs() < 1e-4
            want = torch.where(want > torch.from_numpy(theta)[:, None, None], want, torch.zeros(()))
        got = run(
            "conv",
            xs,
            tuple(want.shape),
            ins=ins,
            outs=outs,
            extra=outs,
            arrays=arrays,
            strings=strings,
            floats=floats,
            ints={"kernel": k, "stride": s, "padding": pad, "dilation": d, "groups": [groups]},
        )
        if act == "threshold":
            got = np.where(near.numpy(), want.numpy(), got)
        close(got, want)


def test_conv_into_concat(isa: str) -> None:
    """Two convolutions write their channels of one packed map; a third reads all of them, a fourth
    one part."""
    n, h, w, parts = 2, 7, 9, (70, 33)
    x = sparse(n, 20, h, w)
    ws = [RNG.standard_normal((c, 20, 3, 3)).astype(np.float32) * 0.1 for c in parts]
    last = [
        RNG.standard_normal((40, sum(parts), 1, 1)).astype(np.float32),
        RNG.standard_normal((8, 33, 1, 1)).astype(np.float32),
    ]
    for layout in LAYOUTS:
        p = Plan()
        v = p.input(x.shape, layout)
        kw: dict[str, Any] = {"parts": list(parts), "density": 0.4} if layout == "packed" else {}
        cat = p.value((n, sum(parts), h, w), layout, **kw)
        at, views = 0, []
        conv = {"stride": [1, 1], "dilation": [1, 1]}
        for c, weight in zip(parts, ws, strict=True):
            part = p.value((n, c, h, w), layout, parent=cat, offset=at)
            views.append(part)
            at += c
            p.b.node(
                "conv",
                "c",
                [v],
                part,
                {**conv, "kernel": [3, 3], "padding": [1] * 4},
                {},
                {"weight": weight},
                {"act": "relu"},
            )
        shapes = [(n, 40, h, w), (n, 8, h, w)]
        for source, weight, shape in zip((cat, views[1]), last, shapes, strict=True):
            y = p.value(shape, "map")
            p.b.node(
                "conv",
                "d",
                [source],
                y,
                {**conv, "kernel": [1, 1], "padding": [0] * 4},
                {},
                {"weight": weight},
            )
            p.output(y, shape, "map")
        outs = [np.empty(s, np.float32) for s in shapes]
        p.build().run(n, [x], outs, 2)
        mid = [F.conv2d(torch.from_numpy(x), torch.from_numpy(a), padding=1).relu() for a in ws]
        close(outs[0], F.conv2d(torch.cat(mid, 1), torch.from_numpy(last[0])))
        close(outs[1], F.conv2d(mid[1], torch.from_numpy(last[1])))


def test_linear(isa: str) -> None:
    for shape in ((3, 65), (2, 17, 40), (2, 3, 5, 24)):
        x = sparse(*shape)
        weight, bias = (
            RNG.standard_normal((19, shape[-1])).astype(np.float32),
            RNG.standard_normal(19).astype(np.float32),
        )
        want = F.gelu(F.linear(torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias)))
        got = run(
            "linear", [x], tuple(want.shape), arrays={"weight": weight, "bias": bias}, strings={"act": "gelu"}
        )
        close(got, want)


# ------------------------------------------------------------------------------------------------------ pools


def pool(x: np.ndarray, kind: str, want: torch.Tensor, ins: str, outs: str, **kw: Any) -> None:
    k, s, pad, d = kw["kernel"], kw["stride"], kw["padding"], kw.get("dilation", (1, 1))
    ints = {
        "kernel": list(k),
        "stride": list(s),
        "padding": [pad[0], pad[1], pad[0], pad[1]],
        "dilation": list(d),
        "count_include_pad": [int(kw.get("include", True))],
        "divisor": [kw.get("divisor", 0)],
    }
    close(
        run("pool", [x], tuple(want.shape), ins=ins, outs=outs, ints=ints, strings={"kind": kind}), want, 1e-5
    )


@pytest.mark.parametrize("ins", LAYOUTS)
@pytest.mark.parametrize("outs", LAYOUTS)
def test_pools(isa: str, ins: str, outs: str) -> None:
    for _ in range(8):
        n, c = int(RNG.integers(1, 4)), int(RNG.choice([1, 5, 16, 63, 64, 65, 100, 130]))
        h, w = (int(RNG.integers(6, 22)) for _ in range(2))
        k = tuple(int(v) for v in RNG.integers(1, 5, 2))
        s = tuple(int(v) for v in RNG.integers(1, 4, 2))
        pad = tuple(int(RNG.integers(0, v // 2 + 1)) for v in k)
        ceil = bool(RNG.integers(2))
        x = sparse(n, c, h, w, density=float(RNG.choice([0.0, 0.3, 1.0])))
        t = torch.from_numpy(x)
        include, divisor = bool(RNG.integers(2)), int(RNG.choice([0, 0, 3]))
        want = F.avg_pool2d(t, k, s, pad, ceil, include, divisor or None)
        pool(x, "avg", want, ins, outs, kernel=k, stride=s, padding=pad, include=include, divisor=divisor)
        d = tuple(int(v) for v in RNG.integers(1, 3, 2))
        if all(e * (m - 1) + 1 <= z + 2 * q for e, m, z, q in zip(d, k, (h, w), pad, strict=True)):
            pool(
                x,
                "max",
                F.max_pool2d(t, k, s, pad, d, ceil),
                ins,
                outs,
                kernel=k,
                stride=s,
                padding=pad,
                dilation=d,
            )


@pytest.mark.parametrize("ins", LAYOUTS)
def test_max_pool_not_finite(isa: str, ins: str) -> None:
    x = sparse(2, 70, 9, 9)
    x[0, 3, 4, 4], x[0, 69, 0, 0], x[1, 5, 8, 8], x[1, 6, 2, 2] = np.nan, np.nan, np.inf, -np.inf
    x[1, 20] = -np.inf
    want = F.max_pool2d(torch.from_numpy(x), 3, 2, 1)
    assert want.isnan().any() and want.isinf().any()
    pool(x, "max", want, ins, "map", kernel=(3, 3), stride=(2, 2), padding=(1, 1))


def test_avg_pool_epilogue(isa: str) -> None:
    for outs in LAYOUTS:
        x, bias = sparse(2, 77, 11, 9), RNG.standard_normal(77).astype(np.float32)
        want = (F.avg_pool2d(torch.from_numpy(x), 3, 1, 1) + torch.from_numpy(bias)[:, None, None]).relu()
        ints = {"kernel": [3, 3], "stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1]}
        got = run(
            "pool",
            [x],
            tuple(want.shape),
            ins="map",
            outs=outs,
            ints=ints,
            arrays={"bias": bias},
            strings={"kind": "avg", "act": "relu"},
        )
        close(got, want)


@pytest.mark.parametrize("ins", LAYOUTS)
def test_adaptive_pools(isa: str, ins: str) -> None:
    for c, h, w, size in ((5, 7, 7, 1), (130, 8, 8, 1), (64, 13, 9, 4), (70, 3, 5, 7), (3, 12, 12, 6)):
        x = sparse(2, c, h, w)
        for kind, f in (("avg", F.adaptive_avg_pool2d), ("max", F.adaptive_max_pool2d)):
            want = f(torch.from_numpy(x), size)
            close(
                run("adaptive_pool", [x], tuple(want.shape), ins=ins, outs="map", strings={"kind": kind}),
                want,
            )


# ---------------------------------------- elementwise, moves---

ACTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, list[float]]]] = {
    "relu": (F.relu, {}),
    "clip": (F.relu6, {"act_lo": [0.0], "act_hi": [6.0]}),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), {"act_alpha": [0.1]}),
    "elu": (lambda x: F.elu(x, 0.7), {"act_alpha": [0.7]}),
    "selu": (F.selu, {}),
    "celu": (lambda x: F.celu(x, 1.3), {"act_alpha": [1.3]}),
    "softplus": (F.softplus, {"act_beta": [1.0], "act_limit": [20.0]}),
    "softsign": (F.softsign, {}),
    "sigmoid": (torch.sigmoid, {}),
    "logsigmoid": (F.logsigmoid, {}),
    "hardsigmoid": (F.hardsigmoid, {"act_alpha": [1 / 6], "act_beta": [0.5]}),
    "tanh": (torch.tanh, {}),
    "silu": (F.silu, {}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), {}),
    "hardswish": (F.hardswish, {}),
    "mish": (F.mish, {}),
    "exp": (torch.exp, {}),
    "square": (torch.square, {}),
    "neg": (torch.neg, {}),
    "abs": (torch.abs, {}),
    "sign": (torch.sign, {}),
    "floor": (torch.floor, {}),
    "ceil": (torch.ceil, {}),
    "round": (torch.round, {}),
    "quantize": (
        lambda x: (x / np.float32(0.11)).clamp(-4, 9).round() * np.float32(0.11),
        {"act_alpha": [0.11], "act_lo": [-4.0], "act_hi": [9.0]},
    ),
    "erf": (torch.erf, {}),
    "sin": (torch.sin, {}),
    "cos": (torch.cos, {}),
    "tan": (torch.tan, {}),
    "atan": (torch.atan, {}),
    "asin": (torch.asin, {}),
    "acos": (torch.acos, {}),
    "sinh": (torch.sinh, {}),
    "cosh": (torch.cosh, {}),
    "asinh": (torch.asinh, {}),
    "acosh": (torch.acosh, {}),
    "atanh": (torch.atanh, {}),
}
POSITIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
}


def test_hardswish_leaves_numbers_above_three_as_they_are(isa: str) -> None:
    x = RNG.uniform(3, 100, (2, 50)).astype(np.float32)
    for kind, floats in (("hardswish", {}), ("scaled_hardswish", {"act_alpha": [1.0], "act_beta": [0.0]})):
        got = run("activation", [x], x.shape, floats=floats, strings={"act": kind})
        assert np.array_equal(got, x), kind


@pytest.mark.parametrize("kind", ACTS)
def test_activations(isa: str, kind: str) -> None:
    f, floats = ACTS[kind]
    x = (RNG.standard_normal((2, 7, 5, 9)) * 4).astype(np.float32)
    x.flat[:8] = [0.0, -0.0, 30.0, -30.0, 88.0, -100.0, np.nan, 1e-6]
    if kind not in (
        "sin",
        "cos",
        "tan",
        "gelu",
        "gelu_tanh",
    ):  # PyTorch's own vectors and scalars differ there
        x.flat[8:10] = [np.inf, -np.inf]
    want = f(torch.from_numpy(x))
    for layout in ("plain", "map"):
        got = run("activation", [x], x.shape, ins=layout, outs=layout, floats=floats, strings={"act": kind})
        np.testing.assert_allclose(got, want.numpy(), rtol=3e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("kind", POSITIVE)
def test_activations_of_positive_numbers(isa: str, kind: str) -> None:
    x = np.abs(RNG.standard_normal((3, 40))).astype(np.float32) + np.float32(1e-3)
    got = run("activation", [x], x.shape, strings={"act": kind})
    np.testing.assert_allclose(got, POSITIVE[kind](torch.from_numpy(x)).numpy(), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ("plain", "map", "packed"))
def test_activations_per_channel(isa: str, layout: str) -> None:
    x = sparse(2, 70, 5, 6)
    x[0, 0, 0, 0] = np.nan
    slope, theta = RNG.standard_normal((2, 70)).astype(np.float32)
    theta = np.abs(theta)
    t = torch.from_numpy(x)
    got = run(
        "activation",
        [x],
        x.shape,
        ins=layout,
        outs=layout,
        arrays={"act_param": slope},
        strings={"act": "prelu"},
    )
    close(got, F.prelu(t, torch.from_numpy(slope)))
    got = run(
        "activation",
        [x],
        x.shape,
        ins=layout,
        outs=layout,
        arrays={"act_param": theta},
        strings={"act": "threshold"},
    )
    th = torch.from_numpy(theta)[:, None, None]
    close(got, torch.where(t <= th, torch.zeros(()), t))


@pytest.mark.parametrize("kind", ("add", "sub", "mul", "div", "max", "min", "pow"))
def test_binary(isa: str, kind: str) -> None:
    f = {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "div": torch.div,
        "max": torch.maximum,
        "min": torch.minimum,
        "pow": torch.pow,
    }[kind]
    shapes = [
        ((2, 5, 6, 7), (2, 5, 6, 7)),
        ((2, 5, 6, 7), (2, 5, 1, 1)),
        ((2, 1, 6, 7), (2, 5, 1, 7)),
        ((2, 70, 3, 3), (2, 70, 1, 1)),
    ]
    for sa, sb in shapes:
        a, b = (np.abs(RNG.standard_normal(s)).astype(np.float32) + np.float32(0.1) for s in (sa, sb))
        want = f(torch.from_numpy(a), torch.from_numpy(b))
        for layout in ("plain", "map"):
            for extra in ("plain", "map"):
                got = run(
                    "binary",
                    [a, b],
                    tuple(want.shape),
                    ins=layout,
                    outs=layout,
                    extra=extra,
                    strings={"kind": kind},
                )
                close(got, want)


def test_batch_norm(isa: str) -> None:
    x = sparse(2, 70, 5, 6)
    scale, shift = RNG.standard_normal((2, 70)).astype(np.float32)
    want = (
        torch.from_numpy(x) * torch.from_numpy(scale)[:, None, None] + torch.from_numpy(shift)[:, None, None]
    ).relu()
    for ins in LAYOUTS:
        for outs in LAYOUTS:
            got = run(
                "batch_norm",
                [x],
                x.shape,
                ins=ins,
                outs=outs,
                arrays={"scale": scale, "shift": shift},
                strings={"act": "relu"},
            )
            close(got, want)


def test_moves(isa: str) -> None:
    x = RNG.standard_normal((2, 6, 5, 7)).astype(np.float32)
    t = torch.from_numpy(x)
    for layout in ("plain", "map"):
        for perm in ([0, 2, 3, 1], [0, 1, 3, 2], [0, 3, 2, 1]):
            want = t.permute(perm)
            assert (
                run("transpose", [x], tuple(want.shape), ins=layout, ints={"perm": perm}) == want.numpy()
            ).all()
        want = t[:, 1:6:2, :, 2:5]
        ints = {"starts": [0, 1, 0, 2], "steps": [1, 2, 1, 1]}
        assert (
            run("slice", [x], tuple(want.shape), ins=layout, outs=layout, ints=ints) == want.numpy()
        ).all()
        for mode, torch_mode in (("constant", "constant"), ("reflect", "reflect"), ("edge", "replicate")):
            want = F.pad(t, (2, 1, 3, 0), mode=torch_mode, **({"value": 0.5} if mode == "constant" else {}))
            got = run(
                "pad",
                [x],
                tuple(want.shape),
                ins=layout,
                outs=layout,
                ints={"before": [0, 0, 3, 2]},
                floats={"value": [0.5]},
                strings={"mode": mode},
            )
            assert (got == want.numpy()).all()
        y = RNG.standard_normal((2, 3, 5, 7)).astype(np.float32)
        want = torch.cat([t, torch.from_numpy(y)], 1)
        assert (
            run("concat", [x, y], tuple(want.shape), ins=layout, outs=layout, ints={"axis": [1]})
            == want.numpy()
        ).all()
    small = x[:, :, :1, :1].copy()
    assert (run("expand", [small], x.shape) == np.broadcast_to(small, x.shape)).all()
    spread = run(
        "dilate", [x], (2, 6, 9, 13), ins="map", outs="map", ints={"starts": [0] * 4, "steps": [1, 1, 2, 2]}
    )
    assert (
        (spread[:, :, ::2, ::2] == x).all()
        and (spread[:, :, 1::2] == 0).all()
        and (spread[..., 1::2] == 0).all()
    )


# ---------------------------------------- matrices, lines, resizing---


def test_matmul(isa: str) -> None:
    for sa, sb in (
        ((2, 3, 5, 7), (2, 3, 7, 11)),
        ((2, 1, 49, 32), (2, 4, 32, 49)),
        ((3, 70, 65), (3, 65, 130)),
        ((2, 4, 1, 9), (2, 4, 9, 1)),
    ):
        a, b = (RNG.standard_normal(s).astype(np.float32) for s in (sa, sb))
        want = torch.from_numpy(a) @ torch.from_numpy(b)
        for threads in (1, 2, 3):
            close(run("matmul", [a, b], tuple(want.shape), threads=threads), want)


def test_softmax_and_norms(isa: str) -> None:
    x = (RNG.standard_normal((3, 10, 6, 5)) * 5).astype(np.float32)
    t = torch.from_numpy(x)
    for axis in (1, 2, 3):
        for log, f in ((0, torch.softmax), (1, torch.log_softmax)):
            for layout in ("plain", "map"):
                close(
                    run(
                        "softmax", [x], x.shape, ins=layout, outs=layout, ints={"axis": [axis], "log": [log]}
                    ),
                    f(t, axis),
                )
    for shape, axis in (((2, 2, 9, 23), 1), ((1, 128, 5, 13), 1), ((3, 129, 4, 5), 1), ((2, 70, 3), 2)):
        rows = (RNG.standard_normal(shape) * 9).astype(np.float32)
        rows.reshape(-1)[:3] = (np.nan, np.inf, -np.inf)
        for log, f in ((0, torch.softmax), (1, torch.log_softmax)):
            for layout in ("plain", "map") if len(shape) == 4 else ("plain",):
                how = {"ins": layout, "outs": layout, "ints": {"axis": [axis], "log": [log]}}
                got = [run("softmax", [rows], shape, threads=k, **how) for k in (1, 2)]
                np.testing.assert_array_equal(got[0], got[1])
                np.testing.assert_array_equal(got[0][:1], run("softmax", [rows[:1]], (1, *shape[1:]), **how))
                want = f(torch.from_numpy(rows), axis).numpy()
                np.testing.assert_allclose(got[0], want, rtol=2e-6, atol=4e-6 if log else 1e-7)
    weight, bias = RNG.standard_normal((2, 30)).astype(np.float32)
    want = F.layer_norm(
        t, (6, 5), torch.from_numpy(weight).reshape(6, 5), torch.from_numpy(bias).reshape(6, 5), 1e-6
    )
    close(
        run(
            "layer_norm",
            [x],
            x.shape,
            ints={"tail": [2]},
            floats={"eps": [1e-6]},
            arrays={"weight": weight, "bias": bias},
        ),
        want,
    )
    want = F.layer_norm(t.permute(0, 2, 3, 1), (10,)).permute(0, 3, 1, 2)
    close(run("layer_norm", [x], x.shape, ins="map", outs="map", ints={"channels": [1]}), want)
    w, b = RNG.standard_normal((2, 10)).astype(np.float32)
    want = F.group_norm(t, 5, torch.from_numpy(w), torch.from_numpy(b))
    for layout in ("plain", "map"):
        close(
            run(
                "group_norm",
                [x],
                x.shape,
                ins=layout,
                outs=layout,
                ints={"groups": [5]},
                arrays={"weight": w, "bias": b},
            ),
            want,
        )
    ints, floats = {"size": [5]}, {"alpha": [1e-2], "beta": [0.6], "k": [2.0]}
    close(
        run("lrn", [x], x.shape, ins="map", outs="map", ints=ints, floats=floats),
        F.local_response_norm(t, 5, 1e-2, 0.6, 2.0),
    )


def test_reduce(isa: str) -> None:
    x = RNG.standard_normal((3, 7, 6, 5)).astype(np.float32)
    t = torch.from_numpy(x)
    kinds: dict[str, Callable[[torch.Tensor, list[int]], torch.Tensor]] = {
        "mean": lambda v, d: v.mean(d), "sum": lambda v, d: v.sum(d), "max": torch.amax, "min": torch.amin,
        "l1": lambda v, d: v.abs().sum(d), "l2": lambda v, d: v.square().sum(d).sqrt(),
        "sum_square": lambda v, d: v.square().sum(d), "log_sum_exp": torch.logsumexp,
    }  # fmt: skip
    for kind, f in kinds.items():
        for axes in ([1], [2, 3], [1, 3], [3]):
            want = f(t, axes)
            for layout in ("plain", "map"):
                close(
                    run(
                        "reduce",
                        [x],
                        tuple(want.shape),
                        ins=layout,
                        ints={"axes": axes},
                        strings={"kind": kind},
                    ),
                    want,
                )


# ------------------------------------------------------------------------------------- runs, contexts, memory


def small_network(density: float = 0.5) -> tuple[Any, torch.nn.Module]:
    """conv 3x3 -> packed -> max pool -> packed -> conv, and the same in PyTorch."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 70, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(70, 20, 3),
    ).eval()
    p = Plan()
    x = p.input((1, 3, 16, 18), "map")
    a = p.value((1, 70, 16, 18), "packed", density=density)
    m = p.value((1, 70, 8, 9), "packed", density=density)
    y = p.value((1, 20, 6, 7), "map")
    conv = {"stride": [1, 1], "dilation": [1, 1], "kernel": [3, 3]}

    def arrays(layer: torch.nn.Conv2d) -> dict[str, np.ndarray]:
        assert layer.bias is not None
        return {"weight": layer.weight.detach().numpy(), "bias": layer.bias.detach().numpy()}

    p.b.node("conv", "a", [x], a, {**conv, "padding": [1] * 4}, {}, arrays(net[0]), {"act": "relu"})
    p.b.node("pool", "m", [a], m, {**conv, "stride": [2, 2], "padding": [1] * 4}, {}, {}, {"kind": "max"})
    p.b.node("conv", "y", [m], y, {**conv, "padding": [0] * 4}, {}, arrays(net[3]), {})
    p.output(y, (1, 20, 6, 7), "map")
    return p.build(), net


def test_batches_and_threads() -> None:
    plan, net = small_network()
    for n in (1, 2, 7, 1, 3):
        x = RNG.standard_normal((n, 3, 16, 18)).astype(np.float32)
        with torch.no_grad():
            want = net(torch.from_numpy(x))
        results = []
        for threads in (1, 5, 2, 1):
            out = np.empty((n, 20, 6, 7), np.float32)
            plan.run(n, [x], [out], threads)
            close(out, want)
            results.append(out)
        assert all((r == results[0]).all() for r in results)  # threads change no bit
        singles = np.concatenate([_single(plan, x[i : i + 1]) for i in range(n)])
        assert (singles == results[0]).all()  # nor does the batch


def _single(plan: Any, x: np.ndarray) -> np.ndarray:
    out = np.empty((1, 20, 6, 7), np.float32)
    plan.run(1, [x], [out], 1)
    return out


def test_a_map_denser_than_calibrated_spills() -> None:
    torch.manual_seed(3)
    sparse_plan, net = small_network(density=0.01)
    x = RNG.standard_normal((2, 3, 16, 18)).astype(np.float32)
    out = np.empty((2, 20, 6, 7), np.float32)
    assert sparse_plan.spilled_bytes() == 0
    for _ in range(3):
        sparse_plan.run(2, [x], [out], 2)
    with torch.no_grad():
        close(out, net(torch.from_numpy(x)))
    assert sparse_plan.spilled_bytes() > 0
    full, _ = small_network(density=1.0)
    full.run(2, [x], [out], 2)
    assert full.spilled_bytes() == 0
    assert sparse_plan.arena_bytes(2) < full.arena_bytes(2)


def test_many_threads_share_a_plan() -> None:
    plan, _ = small_network()
    xs = [RNG.standard_normal((1 + i % 3, 3, 16, 18)).astype(np.float32) for i in range(6)]
    want = [np.concatenate([_single(plan, x[i : i + 1]) for i in range(len(x))]) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for r in range(20):
            out = np.empty((len(xs[i]), 20, 6, 7), np.float32)
            plan.run(len(xs[i]), [xs[i]], [out], 1 + (i + r) % 3)
            if not (out == want[i]).all():
                wrong.append(i)

    at_once(work, len(xs))
    assert not wrong


def test_profile_and_densities() -> None:
    plan, net = small_network()
    x = RNG.standard_normal((2, 3, 16, 18)).astype(np.float32)
    out = np.empty((2, 20, 6, 7), np.float32)
    rows = plan.profile(2, [x], [out], 1)
    assert [r[0] for r in rows] == ["copy", "conv", "pool", "conv", "copy"]
    assert all(r[4] >= 0 for r in rows) and rows[1][2] and rows[1][3] in ("sparse", "dense")
    d = plan.densities(2, [x], [out], 2)
    with torch.no_grad():
        a = net[:2](torch.from_numpy(x))
        m = net[:3](torch.from_numpy(x))
    assert d[2] == pytest.approx(float((a != 0).float().mean()), abs=2e-4)
    assert d[3] == pytest.approx(float((m != 0).float().mean()), abs=2e-4)
    assert d[0] == -1  # the caller's input


# ---------------------------------------- what is refused---


def test_wrong_arrays() -> None:
    plan, _ = small_network()
    x, out = np.zeros((2, 3, 16, 18), np.float32), np.zeros((2, 20, 6, 7), np.float32)
    plan.run(2, [x], [out])
    for bad_x, bad_out, batch in (
        (x[:1], out, 2),
        (x, out[:1], 2),
        (x, out, 3),
        (x.reshape(2, 3, 18, 16), out, 2),
        (x, out.reshape(2, 20, 42), 2),
        (x, out, 0),
        (x, out, -1),
    ):
        with pytest.raises(ValueError, match="plan"):
            plan.run(batch, [bad_x], [bad_out])
    with pytest.raises(ValueError, match="plan"):
        plan.run(2, [], [out])
    for wrong in (x.astype(np.float64), np.asfortranarray(np.ones((2, 3, 16, 18), np.float32))):
        with pytest.raises(TypeError):
            plan.run(2, [wrong], [out])
    with pytest.raises(TypeError):
        plan.run(2, ["x"], [out])


@pytest.mark.parametrize(
    ("op", "spec", "what"),
    [
        ("nothing", {}, "nothing"),
        ("conv", {}, "stride"),
        (
            "conv",
            {"ints": {"kernel": [1, 1], "stride": [0, 1], "padding": [0] * 4, "dilation": [1, 1]}},
            "stride",
        ),
        (
            "conv",
            {"ints": {"kernel": [1, 1], "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1]}},
            "weight",
        ),
        ("pool", {"strings": {"kind": "median"}}, "kind"),
        ("pool", {"strings": {"kind": "max"}}, "kernel"),
        ("activation", {"strings": {"act": "wobble"}}, "wobble"),
        ("activation", {"strings": {"act": "prelu"}}, "parameters"),
        (
            "batch_norm",
            {"arrays": {"scale": np.ones(3, np.float32), "shift": np.ones(3, np.float32)}},
            "scale",
        ),
        ("group_norm", {"ints": {"groups": [3]}}, "groups"),
        ("binary", {"strings": {"kind": "add"}}, "inputs"),
        ("transpose", {"ints": {"perm": [0, 1, 1, 3]}}, "perm"),
        ("slice", {"ints": {"starts": [0, 2, 0, 0], "steps": [1] * 4}}, "outside"),
        ("pad", {"ints": {"before": [0, 9, 0, 0]}, "strings": {"mode": "reflect"}}, "padding"),
        ("reduce", {"ints": {"axes": [9]}, "strings": {"kind": "sum"}}, "axes"),
        ("softmax", {"ints": {"axis": [0]}}, "axis"),
        ("resize", {}, "y_low"),
    ],
)
def test_wrong_nodes(op: str, spec: dict[str, Any], what: str) -> None:
    """Every refusal names the node and what is wrong."""
    x = np.zeros((1, 4, 5, 5), np.float32)
    with pytest.raises(ValueError, match=what):
        run(op, [x], (1, 4, 5, 5), ins="map", outs="map", **spec)


def test_wrong_graphs() -> None:
    b = _engine.PlanBuilder()
    x = b.value("x", [1, 4], [True, False])
    b.input(x)
    y = b.value("y", [1, 4], [True, False])
    b.node("copy", "c", [y], x)
    with pytest.raises(ValueError, match="before it is written"):
        b.build()
    for bad in (
        {"dims": [1, -4], "batch": [True, False]},
        {"dims": [1] * 9, "batch": [True] * 9},
        {"dims": [1], "batch": []},
    ):
        b = _engine.PlanBuilder()
        b.input(b.value("x", **bad))
        with pytest.raises(ValueError, match="'x'"):
            b.build()
    b = _engine.PlanBuilder()
    with pytest.raises(ValueError, match="layout"):
        b.value("x", [1], [True], "sideways")
    for parent in (5, 0):
        b = _engine.PlanBuilder()
        b.input(b.value("x", [1, 4], [True, False], parent=parent))
        with pytest.raises(ValueError):
            b.build()


def test_an_unknown_operator_is_refused_by_name() -> None:
    b = _engine.PlanBuilder()
    x = b.value("x", [1, 4], [True, False])
    b.input(x)
    b.node("frobnicate", "here", [x], b.value("y", [1, 4], [True, False]))
    with pytest.raises(ValueError, match="frobnicate 'here': is not known"):
        b.build()


def test_the_page_lists_every_operator_and_activation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    nodes, activations = page.split("### Nodes")[1].split("### A run")[0].split("\nActivation: ")
    rows = [line.split("|")[1] for line in nodes.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == _engine.operators()
    listed = activations.split("(", 1)[1].split(")")[0]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(_engine.activations())


def test_a_convolution_that_no_kernel_computes_is_refused() -> None:
    """One of planes, whose taps and channels together are no short row: a crash before."""
    p = Plan()
    x, y = p.input((1, 24, 10, 14)), p.value((1, 24, 8, 12), "map")
    ints = {"kernel": [3, 3], "stride": [1, 1], "dilation": [1, 1], "padding": [0] * 4, "groups": [1]}
    p.b.node("conv", "c", [x], y, ints, {}, {"weight": sparse(24, 24, 3, 3)}, {})
    p.output(y, (1, 24, 8, 12), "map")
    with pytest.raises(ValueError, match=r"'c'.*no kernel"):
        p.build()
