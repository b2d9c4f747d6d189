"""Convolutions to try kernels with, beside a float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from actzip._native import _engine

kernels = _engine.kernels
F32, F16, U8, U16 = range(4)
NONE, RELU, CLIP, THRESHOLD, QUANTIZE = range(5)
STEP, LOW, HIGH = 0.11, -4, 9  # of QUANTIZE


@dataclass
class Case:
    n: int = 1
    h: int = 7
    w: int = 9
    ic: int = 70
    oc: int = 33
    k: tuple[int, int] = (3, 3)
    s: tuple[int, int] = (1, 1)
    d: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, left, bottom, right
    groups: int = 1
    pool: int = 1
    density: float = 0.4
    in_packed: bool = True
    out_packed: bool = True
    act: int = RELU
    per_channel: bool = False
    bias: bool = True
    residual: str = ""
    pre: bool = False  # a quantizer before the residual
    parts: list[int] = field(default_factory=list)
    in_type: int = F32
    out_type: int = F32
    capacity: float = 1.0
    threads: int = 1
    front: int = 0
    seed: int = 0

    def problem(self):
        p = kernels.Problem()
        p.ic, p.oc, p.groups = self.ic, self.oc, self.groups
        (p.kh, p.kw), (p.sh, p.sw), (p.dh, p.dw) = self.k, self.s, self.d
        p.pad_top, p.pad_left, p.pad_bottom, p.pad_right = self.pad
        p.pool = self.pool
        p.in_packed, p.out_packed, p.act = self.in_packed, self.out_packed, self.act
        if self.act == CLIP:
            p.lo, p.hi = 0.0, 0.7
        if self.act == THRESHOLD:
            p.lo = 0.2
            if self.per_channel:
                p.thresholds = list(np.linspace(0.0, 0.5, self.oc))
        if self.act == QUANTIZE:
            p.step, p.lo, p.hi = STEP, LOW, HIGH
        if self.pre:
            p.pre_step, p.pre_lo, p.pre_hi = STEP, LOW, HIGH
        if self.parts:
            p.set_in_parts(self.parts)
        p.hint_density = self.density
        return p


def sparse_array(rng, shape, density):
    x = rng.standard_normal(shape).astype(np.float32)
    keep = rng.random(shape) < density if density < 1 else np.ones(shape, bool)
    x[x == 0] = 1.0
    return np.where(keep, x, np.float32(0))


def quantized(y):
    """``y`` rounded to steps; NaN where it may fall either way in float32."""
    q = y / STEP
    near = np.abs(q - np.floor(q) - 0.5) * STEP < 1e-4
    return np.where(near, np.nan, STEP * np.clip(np.rint(q), LOW, HIGH))


def reference(c: Case, x, weight, bias, residual):
    t = torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2)
    t = torch.nn.functional.pad(t, (c.pad[1], c.pad[3], c.pad[0], c.pad[2]))
    b = None if bias is None else torch.from_numpy(bias.astype(np.float64))
    y = torch.nn.functional.conv2d(t, torch.from_numpy(weight.astype(np.float64)), b, c.s, 0, c.d, c.groups)
    if c.pool > 1:
        y = torch.nn.functional.max_pool2d(y, c.pool)
    y = y.permute(0, 2, 3, 1).numpy().copy()
    if c.pre:
        y = quantized(y)
    if residual is not None:
        y += residual
    if c.act == QUANTIZE:
        y = quantized(y)
    elif c.act == RELU:
        y = np.where(y < 0, 0, y)
    elif c.act == CLIP:
        y = np.where(y < 0, 0, np.where(y > 0.7, 0.7, y))
    elif c.act == THRESHOLD:
        t = np.linspace(0.0, 0.5, c.oc, dtype=np.float32) if c.per_channel else np.float32(0.2)
        near = np.abs(y - t) < 1e-4  # may fall either way in float32
        y = np.where(y <= t, 0, y)
        y[near] = np.nan
    return y


def check(c: Case, variant: str):
    rng = np.random.default_rng(c.seed)
    x = sparse_array(rng, (c.n, c.h, c.w, c.ic), c.density)
    fan = c.ic // c.groups * c.k[0] * c.k[1]
    weight = (rng.standard_normal((c.oc, c.ic // c.groups, *c.k)) / np.sqrt(fan)).astype(np.float32)
    bias = rng.standard_normal(c.oc).astype(np.float32) if c.bias else None
    p = c.problem()
    oh = (c.h + c.pad[0] + c.pad[2] - c.d[0] * (c.k[0] - 1) - 1) // c.s[0] + 1
    ow = (c.w + c.pad[1] + c.pad[3] - c.d[1] * (c.k[1] - 1) - 1) // c.s[1] + 1
    residual = sparse_array(rng, (c.n, oh, ow, c.oc), c.density) if c.residual else None
    scale = out_scale = 1.0
    if c.in_type == F16:
        x = x.astype(np.float16).astype(np.float32)
        residual = None if residual is None else residual.astype(np.float16).astype(np.float32)
    elif c.in_type in (U8, U16):
        scale = 1 / 64 if c.in_type == U8 else 1 / 4096
        top = 255 if c.in_type == U8 else 65535
        x = np.rint(np.abs(x) / scale).clip(0, top).astype(np.float32) * np.float32(scale)
        if residual is not None:
            residual = (np.rint(np.abs(residual) / scale).clip(0, 255) * scale).astype(np.float32)
    if c.out_type in (U8, U16):
        out_scale = 1 / 16 if c.out_type == U8 else 1 / 2048
    y, _ = kernels.conv(
        p,
        variant,
        x,
        weight,
        bias,
        residual,
        c.residual == "packed",
        c.in_type,
        scale,
        c.out_type,
        out_scale,
        in_pad=c.seed % 3,
        out_pad=c.seed % 5,
        out_front=c.front,
        capacity=c.capacity,
        threads=c.threads,
    )
    want = reference(c, x, weight, bias, residual)
    share = 4e-5 if variant == "winograd-6x6" else 2e-5
    tolerance = np.float64(share) * max(1.0, np.abs(np.nan_to_num(want)).max(initial=0.0))
    if c.out_packed and c.out_type == F16:
        tolerance = tolerance + np.abs(np.nan_to_num(want)) * 2**-11 + 2**-24
    elif c.out_packed and c.out_type in (U8, U16):
        top = 255 if c.out_type == U8 else 65535
        want = np.where(np.isnan(want), np.nan, np.clip(want, 0, top * out_scale))
        tolerance = tolerance + out_scale * 0.5
    error = np.abs(y - want)
    bad = ~(error <= tolerance) & ~np.isnan(want)
    assert not bad.any(), (
        f"{c} {variant}: {bad.sum()} wrong, first at {np.argwhere(bad)[0]}, worst {error[bad].max()}"
    )
    return y
