"""Bytes and speed of every codec on real activation maps, against zstd, lz4, blosc2 and memcpy, in one run.

    taskset -c 0 python benchmarks/codec/bench.py                       # Inception-V3, 20 photographs
    taskset -c 0 python benchmarks/codec/bench.py --network cifar10_resnet20 --images 200
    taskset -c 0 python benchmarks/codec/bench.py --images 2 --slow     # with zstd -19
    python benchmarks/codec/bench.py --scaling                          # one thread against two

A map is the output of one ReLU for all images together (N, C, H, W), quantized to 8 and 16 bits with one scale. Each map is encoded and decoded
`--repeats` times into reused memory; the table sums the fastest time of each map. GB/s are bytes of the q-bit
tensor. One thread each; seconds are CPU time of that thread (so that other processes of the machine count only through the caches
and the memory that they use), for --scaling by the clock. What a rival is given is the same q-bit tensor (blosc2: bit shuffle, zstd level 5, element size told).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "engine"))


def maps_of(network: str, images: int, thresholds: str | None) -> dict[str, np.ndarray]:
    """Every ReLU output of the network on its images, float32."""
    import models
    import torch

    from actzip.activations import ActivationTap

    values = json.loads(Path(thresholds).read_text()) if thresholds else None
    net = models.build(network, values)
    x = models.photographs(network, images)
    parts: dict[str, list[np.ndarray]] = {}

    def keep(site: Any, y: Any) -> None:
        if site.sparse and y.dim() == 4:
            parts.setdefault(site.name, []).append(y.detach().contiguous().numpy().copy())

    with torch.no_grad():
        for part in x.split(4):
            with ActivationTap(net, keep):
                net(part)
    return {k: np.concatenate(v) for k, v in parts.items()}


Pair = tuple[Callable[[np.ndarray], Any], Callable[[Any, np.ndarray], None]]


def contenders(bits: int, slow: bool) -> dict[str, Pair]:
    """name -> (encode(array) -> blob, decode(blob, out))."""
    import blosc2
    import lz4.frame
    import zstandard

    from actzip import _codec
    from actzip import codec as actzip

    def own(name: str, **options: int) -> Pair:
        def decode(blob: bytes, out: np.ndarray) -> None:
            _codec.decode(blob, _codec.parse_header(blob), out, True, 1)

        return lambda a: actzip.encode(a, name, bits, threads=1, options=options, out=reused(a)), decode

    buffer = [bytearray(0)]

    def reused(a: np.ndarray) -> bytearray:
        if len(buffer[0]) < 4 * a.nbytes + 4096:
            buffer[0] = bytearray(4 * a.nbytes + 4096)
        return buffer[0]

    spare: dict[str, np.ndarray] = {}

    def copy(a: np.ndarray) -> np.ndarray:
        if spare.get("to") is None or spare["to"].nbytes < a.nbytes:
            spare["to"] = np.empty(a.nbytes, np.uint8)
        to = spare["to"][: a.nbytes].view(a.dtype).reshape(a.shape)
        np.copyto(to, a)
        return to

    def zstd(level: int) -> Pair:
        c, d = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

        def decode(blob: bytes, out: np.ndarray) -> None:
            d.stream_reader(blob).readinto(memoryview(out).cast("B"))

        return lambda a: c.compress(memoryview(a).cast("B")), decode

    def blosc(a: np.ndarray) -> bytes:
        return blosc2.compress2(
            a,
            typesize=a.itemsize,
            clevel=5,
            codec=blosc2.Codec.ZSTD,
            filters=[blosc2.Filter.BITSHUFFLE],
            nthreads=1,
        )

    def lz4_decode(blob: bytes, out: np.ndarray) -> None:
        memoryview(out).cast("B")[:] = lz4.frame.decompress(blob)

    table: dict[str, Pair] = {"memcpy": (copy, lambda b, out: np.copyto(out, b))}
    for name in actzip.codecs():
        table[name] = own(name)
        if name in ("seg", "eg"):
            table[f"{name} per channel"] = own(name, per_channel=1)
    table["auto"] = (
        lambda a: actzip.encode(a, "auto", bits, threads=1, out=reused(a)),
        lambda blob, out: _codec.decode(blob, _codec.parse_header(blob), out, True, 1),
    )
    table["zstd -1"] = zstd(1)
    table["zstd -3"] = zstd(3)
    if slow:
        table["zstd -19"] = zstd(19)
    table["lz4"] = (lambda a: lz4.frame.compress(memoryview(a).cast("B")), lz4_decode)
    table["blosc2 bitshuffle zstd"] = (
        blosc,
        lambda blob, out: blosc2.decompress2(blob, dst=out, nthreads=1),
    )
    return table


def fastest(repeats: int, f: Callable[[], Any]) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.thread_time()
        result = f()
        best = min(best, time.thread_time() - start)
    return best, result


def run(maps: dict[str, np.ndarray], bits: int, repeats: int, slow: bool, only: set[str]) -> dict[str, Any]:
    from actzip.codec import quantize

    table = {k: v for k, v in contenders(bits, slow).items() if not only or k in only | {"memcpy", "seg"}}
    rows: dict[str, dict[str, float]] = {k: {"bytes": 0, "encode_s": 0.0, "decode_s": 0.0} for k in table}
    elements = nonzero = total = 0
    for x in maps.values():
        q, _, _ = quantize(x, bits)
        q = np.ascontiguousarray(q)
        elements += q.size
        total += q.nbytes
        nonzero += int(np.count_nonzero(q))
        out = np.empty_like(q)
        for name, (encode, decode) in table.items():
            times = 1 if name == "zstd -19" else repeats
            seconds, blob = fastest(times, lambda encode=encode, q=q: encode(q))
            rows[name]["encode_s"] += seconds
            rows[name]["bytes"] += blob.nbytes if isinstance(blob, np.ndarray) else len(blob)
            out[...] = 1
            seconds, _ = fastest(repeats, lambda decode=decode, blob=blob, out=out: decode(blob, out))
            rows[name]["decode_s"] += seconds
            if not np.array_equal(out, q):
                raise SystemExit(f"{name} did not give the map back")
    for r in rows.values():
        r["gain"] = elements * bits / 8 / r["bytes"]
        r["encode_gbps"] = total / 1e9 / r["encode_s"]
        r["decode_gbps"] = total / 1e9 / r["decode_s"]
    return {
        "bits": bits,
        "elements": elements,
        "density": nonzero / elements,
        "maps": len(maps),
        "codecs": rows,
    }


def scaling(maps: dict[str, np.ndarray], bits: int, repeats: int) -> dict[str, Any]:
    """Speed of two threads over one, codec by codec, all maps together."""
    from actzip import _codec
    from actzip.codec import codecs, encode, quantize

    result = {}
    for name in codecs():
        sums = {(w, t): 0.0 for w in ("encode", "decode") for t in (1, 2)}
        for x in maps.values():
            q = np.ascontiguousarray(quantize(x, bits)[0])
            blob = encode(q, name, bits)
            header, out = _codec.parse_header(blob), np.empty_like(q)
            memory = bytearray(4 * q.nbytes + 4096)
            best = dict.fromkeys(sums, float("inf"))
            for _ in range(repeats):
                for t in (1, 2):
                    start = time.perf_counter()
                    encode(q, name, bits, threads=t, out=memory)
                    middle = time.perf_counter()
                    _codec.decode(blob, header, out, True, t)
                    end = time.perf_counter()
                    best["encode", t] = min(best["encode", t], middle - start)
                    best["decode", t] = min(best["decode", t], end - middle)
            for k in sums:
                sums[k] += best[k]
        result[name] = {w: sums[w, 1] / sums[w, 2] for w in ("encode", "decode")}
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--network", default="inception_v3")
    p.add_argument("--images", type=int, default=20)
    p.add_argument("--thresholds", help="JSON: site -> threshold, to sparsify the network")
    p.add_argument("--bits", type=int, nargs="*", default=[8, 16])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--slow", action="store_true", help="zstd -19 too")
    p.add_argument("--only", nargs="*", default=[], help="only these, seg and memcpy")
    p.add_argument("--scaling", action="store_true", help="two threads against one instead of the table")
    p.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder for the JSON")
    args = p.parse_args()

    from actzip import cpu

    info = cpu.info()
    maps = maps_of(args.network, args.images, args.thresholds)
    what = f"{args.network}{' sparsified' if args.thresholds else ''}, {args.images} images, {len(maps)} maps"
    print(f"{what}\n{info['cpu']}, {info['isa']}, one thread\n")
    result: dict[str, Any] = {"what": what, "arguments": vars(args) | {"out": str(args.out)}, "machine": info}
    tag = f"{args.network}{'-sparse' if args.thresholds else ''}-{args.images}"
    tag += f"-{args.bits[0]}bits" if len(args.bits) == 1 else ""
    if args.scaling:
        for bits in args.bits:
            result[str(bits)] = table = scaling(maps, bits, args.repeats)
            print(f"{bits} bits: two threads over one")
            for name, r in table.items():
                print(f"  {name:10} encode {r['encode']:.2f}x  decode {r['decode']:.2f}x")
        path = args.out / f"codec-scaling-{tag}.json"
    else:
        for bits in args.bits:
            result[str(bits)] = r = run(maps, bits, args.repeats, args.slow, set(args.only))
            copy = r["codecs"]["memcpy"]["encode_gbps"]
            seg = r["codecs"]["seg"]
            print(f"{bits} bits, density {r['density']:.3f}, {r['elements'] / 1e6:.1f} M elements")
            print(
                f"  {'':24} {'bytes':>12} {'gain':>6} {'vs seg':>7} {'encode':>7} {'decode':>7} GB/s   x memcpy"
            )
            for name, c in r["codecs"].items():
                print(
                    f"  {name:24} {int(c['bytes']):12,} {c['gain']:6.3f} {seg['bytes'] / c['bytes']:7.3f} "
                    f"{c['encode_gbps']:7.3f} {c['decode_gbps']:7.3f}      {c['encode_gbps'] / copy:5.2f} {c['decode_gbps'] / copy:5.2f}"
                )
            print()
        path = args.out / f"codec-{tag}{'-slow' if args.slow else ''}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
