"""Micro-benchmark of the convolution kernels on real layer shapes.

    PYTHONPATH=src python benchmarks/kernels/bench.py --net inception_v3 --out out/kernels.json

Every layer of `layers.txt` at every density, one thread: each kernel of the table that can compute
it (or the best few), packed input to packed output with bias and ReLU, against oneDNN through
PyTorch (the faster of NCHW, channels_last and prepacked weights) in the same run. `GFLOP/s` counts
non-zero MACs (two operations each, borders and strides exact); `% of peak` is against a loop of
FMAs in registers measured in the same run on the same instruction set. One thread, its own CPU
time, best of many. Masks: `real` are as smooth as those of trained networks (at density 0.46 about
0.80 of the channels of a 6x6 tile and 0.73 of those of a 4x4 tile are not all zero, as in
Inception-V3), `smooth` are half-way, `random` are independent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F

from actzip._native import _engine
from actzip.files import write_text

kernels = _engine.kernels
HERE = Path(__file__).parent
FIELDS = ["net", "count", "ic", "oc", "kh", "kw", "sh", "sw", "ph", "pw", "dilation", "groups", "h", "w"]


def layers(path: Path, nets: list[str]) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        parts = line.split()
        row = {k: (v if k == "net" else int(v)) for k, v in zip(FIELDS, parts, strict=True)}
        if not nets or row["net"] in nets:
            rows.append(row)
    return rows


def activations(rng: np.random.Generator, row: dict, density: float, masks: str) -> np.ndarray:
    """(1, H, W, C) float32 with the given fraction of non-zeros, densities varying from channel to
    channel."""
    h, w, c = row["h"], row["w"], row["ic"]
    if masks == "real":
        return sparse(patches(rng, h, w, c), density)
    noise = rng.standard_normal((h + 2, w + 2, c)).astype(np.float32)
    if masks == "smooth":
        k = np.array([0.25, 0.5, 0.25], np.float32)
        noise = sum(k[i] * noise[i : i + h] for i in range(3))
        noise = sum(k[i] * noise[:, i : i + w] for i in range(3))
        noise /= noise.std() + 1e-9
        noise = noise + 0.7 * rng.standard_normal((1, 1, c)).astype(np.float32)
    else:
        noise = noise[:h, :w]
    return sparse(noise, density)


def patches(rng: np.random.Generator, h: int, w: int, c: int) -> np.ndarray:
    """(H, W, C): patches of about seven pixels, some noise, channels of unlike mean."""
    step = 7
    x = rng.standard_normal((h // step + 2, w // step + 2, c)).astype(np.float32)
    for axis, size in enumerate((h, w)):
        at = np.arange(size, dtype=np.float32) / step
        low = at.astype(int)
        part = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        x = np.take(x, low, axis) * (1 - part) + np.take(x, low + 1, axis) * part
    fine = rng.standard_normal((h, w, c)).astype(np.float32)
    return x + np.float32(0.3) * fine + np.float32(0.7) * rng.standard_normal((1, 1, c)).astype(np.float32)


def sparse(noise: np.ndarray, density: float) -> np.ndarray:
    if density >= 1:
        return (np.abs(noise)[None] + 0.01).astype(np.float32)
    cut = np.quantile(noise, 1 - density)
    return np.where(noise > cut, noise - cut, 0)[None].astype(np.float32)


def tile_density(x: np.ndarray, m: int, row: dict) -> float:
    """Share of (tile, channel) pairs of F(m x m, 3x3) that are not all zero."""
    _, h, w, _ = x.shape
    high, across = -(-(h + 2 * row["ph"] - 2) // m), -(-(w + 2 * row["pw"] - 2) // m)
    after = ((row["ph"], high * m + 2 - h - row["ph"]), (row["pw"], across * m + 2 - w - row["pw"]))
    some = np.pad(x[0] != 0, (*[(a, max(b, 0)) for a, b in after], (0, 0)))
    tiles = np.lib.stride_tricks.sliding_window_view(some, (m + 2, m + 2), (0, 1))[::m, ::m]
    return float(tiles[:high, :across].any((-1, -2)).mean())


def effective_macs(x: np.ndarray, row: dict) -> int:
    """Multiply-accumulates whose activation operand is not zero."""
    nonzero = torch.from_numpy((x != 0).sum(-1).astype(np.float64))[None]
    ones = torch.ones((1, 1, row["kh"], row["kw"]), dtype=torch.float64)
    reach = F.conv2d(nonzero, ones, None, (row["sh"], row["sw"]), (row["ph"], row["pw"]), row["dilation"])
    return int(reach.sum().item()) * row["oc"] // row["groups"]


def winograd_part(times: dict[str, float], tiles: dict[str, float]) -> str:
    """How the best direct kernel stands beside Winograd's, and the tile densities."""
    direct = [t for k, t in times.items() if not k.startswith("winograd")]
    theirs = [t for k, t in times.items() if k.startswith("winograd")]
    if not direct or not theirs:
        return ""
    shares = ", ".join(f"{k} {v:.2f}" for k, v in tiles.items())
    return f"  direct {min(direct) * 1e6:8.0f} us {min(direct) / min(theirs):5.2f}x  tiles {shares}"


def totals(layers: list[dict], peak: float) -> list[dict]:
    """Of each network and density: seconds of all layers, each as often as it occurs, non-zero MACs
    as a share of the peak, and both again by the best direct kernel of each layer."""
    rows = []
    for net, density in dict.fromkeys((r["net"], r["density"]) for r in layers):
        these = [r for r in layers if (r["net"], r["density"]) == (net, density)]
        flops = sum(2e-9 * r["count"] * r["effective_macs"] for r in these)
        seconds = sum(r["count"] * r["seconds"] for r in these)
        row = {"net": net, "density": density, "seconds": seconds, "peak_share": flops / seconds / peak}
        direct = [[t for k, t in r["kernels"].items() if not k.startswith("winograd")] for r in these]
        if all(direct):
            seconds = sum(r["count"] * min(t) for r, t in zip(these, direct, strict=True))
            row |= {"direct_seconds": seconds, "direct_peak_share": flops / seconds / peak}
        if all(r["onednn_seconds"] for r in these):
            row["onednn_seconds"] = sum(r["count"] * min(r["onednn_seconds"].values()) for r in these)
        rows.append(row)
    return rows


class OneDnn:
    """The fastest of PyTorch's ways to call oneDNN on this layer."""

    def __init__(self, row: dict, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> None:
        nchw = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
        nhwc = nchw.contiguous(memory_format=torch.channels_last)
        w, b = torch.from_numpy(weight), torch.from_numpy(bias)
        wl = w.contiguous(memory_format=torch.channels_last)
        stride, pad, dil, groups = (
            (row["sh"], row["sw"]),
            (row["ph"], row["pw"]),
            (row["dilation"],) * 2,
            row["groups"],
        )
        self.ways = {
            "nchw": lambda: F.relu_(F.conv2d(nchw, w, b, stride, pad, dil, groups)),
            "channels_last": lambda: F.relu_(F.conv2d(nhwc, wl, b, stride, pad, dil, groups)),
        }
        if row["h"] == row["w"] == 1:
            v, m = nchw.flatten(1), w.flatten(1)
            self.ways = {"linear": lambda: F.relu_(F.linear(v, m, b))}
        else:
            try:
                packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                    w.to_mkldnn(), pad, stride, dil, groups, list(nchw.shape)
                )
                op = torch.ops.mkldnn._convolution_pointwise
                self.ways["prepacked"] = lambda: op(nhwc, packed, b, pad, stride, dil, groups, "relu", [], "")
                self.ways["prepacked"]()
            except (RuntimeError, AttributeError):
                self.ways.pop("prepacked", None)
        self.best = {k: float("inf") for k in self.ways}

    def measure(self, seconds: float) -> None:
        for name, way in self.ways.items():
            end = time.perf_counter() + seconds
            while True:
                t = time.thread_time()
                way()
                self.best[name] = min(self.best[name], time.thread_time() - t)
                if time.perf_counter() > end:
                    break


def problem(row: dict, density: float, packed_in: bool, packed_out: bool):
    p = kernels.Problem()
    for k in ("ic", "oc", "kh", "kw", "sh", "sw", "groups"):
        setattr(p, k, row[k])
    p.dh = p.dw = row["dilation"]
    p.pad_top = p.pad_bottom = row["ph"]
    p.pad_left = p.pad_right = row["pw"]
    p.in_packed, p.out_packed, p.act = packed_in, packed_out, 1
    p.hint_h, p.hint_w, p.hint_density = row["h"], row["w"], density
    return p


def best_seconds(p, name: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, seconds: float) -> float:
    """The least time of a run of this kernel within ``seconds``."""
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        repeat = 5 if best == float("inf") else max(1, min(200, int(seconds / 4 / best)))
        best = min(best, *kernels.conv(p, name, x, weight, bias, repeat=repeat)[1])
        if time.perf_counter() > end:
            return best


def parameters(rng: np.random.Generator, row: dict) -> tuple[np.ndarray, np.ndarray]:
    """Weights that keep the scale of what they read, and biases."""
    shape = row["oc"], row["ic"] // row["groups"], row["kh"], row["kw"]
    weight = rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5
    bias = rng.standard_normal(row["oc"]).astype(np.float32) * np.float32(0.1)
    return weight.astype(np.float32), bias


def measure(args: argparse.Namespace, rng: np.random.Generator, row: dict, density: float) -> dict | None:
    """A layer at a density: every kernel that can compute it, and oneDNN before and after them."""
    weight, bias = parameters(rng, row)
    x = activations(rng, row, density, args.masks)
    rival = OneDnn(row, x, weight, bias) if args.rival else None
    if rival:
        rival.measure(args.seconds)
    packed = not args.dense
    p = problem(row, density, packed and row["ic"] >= 4, packed)
    only = [k for k in args.kernels.split(",") if k]
    names = [n for n in kernels.variants(p) if not only or any(k in n for k in only)]
    times = {n: best_seconds(p, n, x, weight, bias, args.seconds) for n in names}
    if rival:
        rival.measure(args.seconds)
    if not times:
        return None
    tiles = {}
    if (row["kh"], row["kw"], row["sh"], row["dilation"], row["groups"]) == (3, 3, 1, 1, 1):
        tiles = {f"{m}x{m}": tile_density(x, m, row) for m in (2, 4)}
    macs = effective_macs(x, row)
    name = min(times, key=times.__getitem__)
    return {
        **row,
        "density": density,
        "tile_density": tiles,
        "effective_macs": macs,
        "kernel": name,
        "seconds": times[name],
        "gflops": 2e-9 * macs / times[name],
        "kernels": times,
        "onednn_seconds": rival.best if rival else None,
    }


def label(row: dict) -> str:
    return (
        f"{row['net']} {row['ic']}->{row['oc']} {row['kh']}x{row['kw']}/{row['sh']} "
        f"g{row['groups']} {row['h']}x{row['w']}"
    )


def say(entry: dict, peak: float, verbose: bool) -> None:
    mine, times = entry["seconds"], entry["kernels"]
    rival = min((entry["onednn_seconds"] or {"": float("nan")}).values())
    print(
        f"{label(entry):44s} d{entry['density']:4.2f} {entry['kernel']:14s} {mine * 1e6:8.0f} us "
        f"{entry['gflops']:6.1f} GF/s {100 * entry['peak_share']:5.1f} %  "
        f"oneDNN {rival * 1e6:8.0f} us  {rival / mine:5.2f}x" + winograd_part(times, entry["tile_density"]),
        flush=True,
    )
    for k, v in times.items() if verbose else ():
        share = 2e-9 * entry["effective_macs"] / v / peak
        print(f"    {k:16s} {v * 1e6:8.0f} us {100 * share:5.1f} %")


def say_totals(rows: list[dict]) -> None:
    print("\nAll layers of a network (each as often as it occurs): non-zero MACs as a share of the FMA peak")
    nan = float("nan")
    for t in rows:
        print(
            f"{t['net']:14s} d{t['density']:4.2f} {1e3 * t['seconds']:8.2f} ms"
            f"  {100 * t['peak_share']:5.1f} %  direct {1e3 * t.get('direct_seconds', nan):8.2f} ms"
            f"  {100 * t.get('direct_peak_share', nan):5.1f} %"
            f"  oneDNN {1e3 * t.get('onednn_seconds', nan):8.2f} ms"
        )


def options(argv: list[str] | None) -> argparse.Namespace:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--net", action="append", default=[], help="only this network (repeatable)")
    a.add_argument("--layers", type=Path, default=HERE / "layers.txt")
    a.add_argument("--density", type=float, action="append", default=[])
    a.add_argument("--isa", default="", help="instruction set; default: the best")
    a.add_argument("--kernels", default="", help="only kernels whose name contains one of these (comma list)")
    a.add_argument("--masks", choices=("real", "smooth", "random"), default="real")
    a.add_argument("--seconds", type=float, default=0.05, help="for each kernel and rival of a layer")
    a.add_argument("--match", default="", help="only layers whose line contains this")
    a.add_argument(
        "--dense", action="store_true", help="dense input and output maps (networks without zeros)"
    )
    a.add_argument("--rival", action=argparse.BooleanOptionalAction, default=True)
    a.add_argument("--verbose", action="store_true", help="a line per kernel")
    a.add_argument("--out", type=Path)
    args = a.parse_args(argv)
    args.density = args.density or ([1.0] if args.dense else [1.0, 0.5, 0.34, 0.2])
    return args


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    torch.set_num_threads(1)
    if not _engine.force_isa(args.isa):
        print(f"this CPU cannot run {args.isa}", file=sys.stderr)
        return 2
    rng = np.random.default_rng(0)
    peak = kernels.peak_gflops(0.5)
    info = {
        "cpu": _engine.cpu_model(),
        "isa": _engine.isa(),
        "peak_gflops": peak,
        "threads": 1,
        "masks": args.masks,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "layers": [],
    }
    print(f"{info['cpu']}, {info['isa']}, FMA loop {peak:.1f} GFLOP/s, one thread, {args.masks} masks")
    for row in layers(args.layers, args.net):
        if args.match and args.match not in label(row):
            continue
        for density in args.density if row["ic"] >= 4 else [1.0]:
            entry = measure(args, rng, row, density)
            if entry:
                entry["peak_share"] = entry["gflops"] / peak
                info["layers"].append(entry)
                say(entry, peak, args.verbose)
    info["totals"] = totals(info["layers"], peak)
    say_totals(info["totals"])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, json.dumps(info, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
