"""Bytes and speed of every codec on real activation maps, against zstd, lz4, blosc2 and memcpy, in one run.

    python benchmarks/codec/bench.py                 # Inception-V3 on 20 photographs, CIFAR ResNet-20
    python benchmarks/codec/bench.py mobilenet_v1=sparse.safetensors       # with these weights
    python benchmarks/codec/bench.py inception_v3 --bits 8 --only rans --no-slow --out look.json
    python benchmarks/codec/bench.py --only-scaling  # two threads against one, added to the results

A map is the output of one ReLU for all images together (N, C, H, W), quantized to 8 and 16 bits
with one scale. Each is encoded and decoded `--repeats` times (zstd -19 encodes once) into reused
memory; the table sums the fastest time of each map. GB/s are bytes of the q-bit tensor. One thread
on one CPU; seconds are CPU time of that thread, so that other processes count only through the
caches and the memory that they use. Two threads against one are timed by the clock, memcpy beside
the codecs: what the memory gains bounds what they can. Rivals are given the same q-bit tensor
(blosc2: bit shuffle, zstd level 5, element size told). Every map must come back as it was.

The results of each network and width replace its entry of `benchmarks/results/codec/bench.json`;
the figures that the project promises follow each table, with what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent

Array = np.ndarray[Any, Any]

# Columns of the table of two threads against one: of a codec, and of memcpy.
TWO_THREADS = (
    ("encode", "copy"),
    ("decode", "copy"),
    ("encode_new", "copy_new"),
    ("decode_new", "copy_new"),
    ("encode_many", "copy_many"),
    ("decode_many", "copy_many"),
)


class Network(NamedTuple):
    """A model of actzip.models, its given weights, whose images it takes (photographs.py), how many."""

    model: str
    weights: str
    images_of: str
    images: int


NETWORKS = {
    "inception_v3": Network("inception_v3_5class", "inception_v3_5class.safetensors", "inception_v3", 20),
    "cifar10_resnet20": Network("cifar_resnet20", "cifar10_resnet20.safetensors", "cifar10_resnet20", 200),
    "mobilenet_v1": Network("mobilenet_v1", "cifar10_mobilenet_v1.safetensors", "cifar10_mobilenet_v1", 100),
}


def maps_of(network: str, weights: str | None, count: int | None) -> dict[str, Array]:
    """Every ReLU output (N, C, H, W) of the network on its images, float32, by the name of its site."""
    import torch
    from photographs import photographs

    from actzip.activations import ActivationTap
    from actzip.models import load_weights, resolve

    row = NETWORKS[network]
    net = resolve(row.model)
    load_weights(net, weights or row.weights)
    net.eval()
    parts: dict[str, list[Array]] = {}

    def keep(site: Any, y: Any) -> None:
        if site.sparse and y.dim() == 4:
            parts.setdefault(site.name, []).append(y.detach().contiguous().numpy().copy())

    with torch.no_grad():
        for part in photographs(row.images_of, count or row.images).split(4):
            with ActivationTap(net, keep):
                net(part)
    return {k: np.concatenate(v) for k, v in parts.items()}


Pair = tuple[Callable[[Array], Any], Callable[[Any, Array], None]]


def contenders(bits: int, slow: bool) -> dict[str, Pair]:
    """name -> (encode(array) -> blob, decode(blob, out))."""
    import blosc2
    import lz4.frame
    import zstandard

    from actzip import codec as actzip
    from actzip._native import _codec

    buffer = [bytearray(0)]

    def reused(a: Array) -> bytearray:
        if len(buffer[0]) < 4 * a.nbytes + 4096:
            buffer[0] = bytearray(4 * a.nbytes + 4096)
        return buffer[0]

    def decode(blob: Any, out: Array) -> None:
        _codec.decode(blob, _codec.parse_header(blob), out, True, 1)

    def own(name: str, **options: int) -> Pair:
        return lambda a: actzip.encode(a, name, bits, threads=1, options=options, out=reused(a)), decode

    spare: dict[str, Array] = {}

    def copy(a: Array) -> Array:
        if spare.get("to") is None or spare["to"].nbytes < a.nbytes:
            spare["to"] = np.zeros(a.nbytes, np.uint8)
        to = spare["to"][: a.nbytes].view(a.dtype).reshape(a.shape)
        np.copyto(to, a)
        return to

    def zstd(level: int) -> Pair:
        c, d = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

        def expand(blob: bytes, out: Array) -> None:
            d.stream_reader(blob).readinto(memoryview(out).cast("B"))

        return lambda a: c.compress(memoryview(a).cast("B")), expand

    def blosc(a: Array) -> Any:
        return blosc2.compress2(
            a,
            typesize=a.itemsize,
            clevel=5,
            codec=blosc2.Codec.ZSTD,
            filters=[blosc2.Filter.BITSHUFFLE],
            nthreads=1,
        )

    def lz4_decode(blob: bytes, out: Array) -> None:
        memoryview(out).cast("B")[:] = lz4.frame.decompress(blob)

    table: dict[str, Pair] = {"memcpy": (copy, lambda b, out: np.copyto(out, b))}
    for name in actzip.codecs():
        table[name] = own(name)
        if name in ("seg", "eg"):
            table[f"{name} per channel"] = own(name, per_channel=1)
    table["auto"] = own("auto")
    table["zstd -1"] = zstd(1)
    table["zstd -3"] = zstd(3)
    if slow:
        table["zstd -19"] = zstd(19)
    table["lz4"] = (lambda a: lz4.frame.compress(memoryview(a).cast("B")), lz4_decode)
    table["blosc2 bitshuffle zstd"] = (blosc, lambda blob, out: blosc2.decompress2(blob, dst=out, nthreads=1))
    return table


def fastest(repeats: int, f: Callable[[], Any]) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.thread_time()
        result = f()
        best = min(best, time.thread_time() - start)
    return best, result


def compare(
    maps: list[Array], bits: int, repeats: int, table: dict[str, Pair], step: Callable[[], None]
) -> dict[str, Any]:
    """Bytes and seconds of every contender over all maps."""
    from actzip.codec import inspect

    rows: dict[str, dict[str, float]] = {k: {"bytes": 0, "encode_s": 0.0, "decode_s": 0.0} for k in table}
    elements = nonzero = total = 0
    beyond_raw = float("-inf")
    for q in maps:
        elements += q.size
        total += q.nbytes
        nonzero += int(np.count_nonzero(q))
        out = np.empty_like(q)
        raw = q.size * bits / 8
        for name, (encode, decode) in table.items():
            times = 1 if name == "zstd -19" else repeats
            seconds, blob = fastest(times, lambda encode=encode, q=q: encode(q))
            size = blob.nbytes if isinstance(blob, (np.ndarray, memoryview)) else len(blob)
            rows[name]["encode_s"] += seconds
            rows[name]["bytes"] += size
            if name == "auto":
                beyond_raw = max(beyond_raw, (size - inspect(blob).header_bytes) / raw)
            out[...] = 1
            seconds, _ = fastest(repeats, lambda decode=decode, blob=blob, out=out: decode(blob, out))
            rows[name]["decode_s"] += seconds
            if not np.array_equal(out, q):
                raise SystemExit(f"{name} did not give the map back")
        step()
    for r in rows.values():
        r["gain"] = elements * bits / 8 / r["bytes"]
        r["encode_gbps"] = total / 1e9 / r["encode_s"]
        r["decode_gbps"] = total / 1e9 / r["decode_s"]
    result = {"bits": bits, "elements": elements, "density": nonzero / elements, "maps": len(maps)}
    if "auto" in table:
        result["auto_payload_over_raw"] = beyond_raw
    return result | {"codecs": rows}


def scaling(maps: list[Array], bits: int, repeats: int, only: set[str]) -> dict[str, Any]:
    """Speed of two threads over one by the clock, all maps together: of every codec into memory
    that is there already (encode, decode) and into memory that is new in every call (encode_new,
    decode_new), and of memcpy, half of the array a thread, under the same conditions (copy,
    copy_new); of one call for all maps, each by one thread, into memory that is there already
    (encode_many, decode_many), and of memcpy of them all (copy_many); and how many CPUs other
    processes used meanwhile. Calls with one and two threads take turns; a call of less than 5 ms is
    made once more before it is timed, so that the pool's thread is awake."""
    from actzip._native import _codec
    from actzip.codec import codecs, encode, encode_many

    sums: dict[str, dict[str, dict[int, float]]] = {}

    def clock(name: str, way: str, f: Callable[[int], Any]) -> None:
        best = {1: float("inf"), 2: float("inf")}
        begin, rounds = time.perf_counter(), 0
        while rounds < repeats or (time.perf_counter() - begin < 0.01 and rounds < 50):
            rounds += 1
            for t in best:
                for last in (False, True):
                    start = time.perf_counter()
                    f(t)
                    seconds = time.perf_counter() - start
                    if last or seconds > 0.005:
                        best[t] = min(best[t], seconds)
                        break
        total = sums.setdefault(name, {}).setdefault(way, {1: 0.0, 2: 0.0})
        for t in best:
            total[t] += best[t]

    names = [n for n in codecs() if not only or n in only]
    before = busy()
    for q in maps:
        out = np.empty_like(q)
        memory = bytearray(4 * q.nbytes + 4096)
        clock("memcpy", "copy", lambda t, q=q, o=out: _codec.copy(q, o, t))
        clock("memcpy", "copy_new", lambda t, q=q: _codec.copy(q, np.empty_like(q), t))
        for name in names:
            blob = encode(q, name, bits)
            h = _codec.parse_header(blob)
            clock(name, "encode", lambda t, c=name, q=q, m=memory: encode(q, c, bits, threads=t, out=m))
            clock(name, "encode_new", lambda t, c=name, q=q: encode(q, c, bits, threads=t))
            clock(name, "decode", lambda t, b=blob, h=h, o=out: _codec.decode(b, h, o, True, t))
            clock(
                name,
                "decode_new",
                lambda t, b=blob, h=h, q=q: _codec.decode(b, h, np.empty_like(q), True, t),
            )
    every = np.concatenate([q.reshape(-1) for q in maps])
    whole = np.zeros_like(every)
    clock("memcpy", "copy_many", lambda t, a=every, b=whole: _codec.copy(a, b, t))
    del every, whole
    outs = [np.zeros_like(q) for q in maps]
    memories = [bytearray(4 * q.nbytes + 4096) for q in maps]
    for name in names:
        blobs = encode_many(maps, name, bits)
        heads = [_codec.parse_header(b) for b in blobs]
        clock(name, "encode_many", lambda t, c=name: encode_many(maps, c, bits, threads=t, out=memories))
        clock(name, "decode_many", lambda t, b=blobs, h=heads: _codec.decode_many(b, h, outs, True, t))
    after = busy()
    return {
        "two_threads": {n: {w: s[1] / s[2] for w, s in ways.items()} for n, ways in sums.items()},
        "two_threads_others": (after[1] - before[1]) / (after[0] - before[0]) if after[1] else None,
    }


def busy() -> tuple[float, float]:
    """The time now, and CPU seconds that other processes have used since the system began (0 where
    it does not say)."""
    own = sum(os.times()[:2])
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return time.time(), 0.0
    return time.time(), (sum(fields) - fields[3] - fields[4] - fields[7]) / os.sysconf("SC_CLK_TCK") - own


def figures(network: str, r: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project promises, with what was measured: {what, least, measured, met}."""
    rows, wide = r["codecs"], r["bits"] > 8
    out: list[dict[str, Any]] = []

    def promise(what: str, measured: float, least: float) -> None:
        out.append({"what": what, "least": least, "measured": measured, "met": measured >= least})

    for way in ("encode", "decode"):
        if "seg" in rows:
            promise(f"seg {way}, GB/s", rows["seg"][f"{way}_gbps"], (0.8, 1.5)[wide])
        if "zvc" in rows and "memcpy" in rows:
            ratio = rows["zvc"][f"{way}_gbps"] / rows["memcpy"]["encode_gbps"]
            promise(f"zvc {way} / memcpy", ratio, (0.3, 0.4)[wide])
    if "rans" in rows:
        promise("rans decode, GB/s", rows["rans"]["decode_gbps"], (0.25, 0.5)[wide])
        if "seg" in rows and network == "inception_v3":
            promise(
                "seg bytes / rans bytes", rows["seg"]["bytes"] / rows["rans"]["bytes"], (1.25, 1.13)[wide]
            )
        if "zstd -19" in rows:
            zstd = rows["zstd -19"]
            promise("zstd -19 bytes / rans bytes", zstd["bytes"] / rows["rans"]["bytes"], 1.0)
            promise("rans encode / zstd -19 encode", zstd["encode_s"] / rows["rans"]["encode_s"], 20.0)
    if "auto_payload_over_raw" in r:
        promise("1.001 * raw bits / auto payload", 1.001 / r["auto_payload_over_raw"], 1.0)
    for name, s in r.get("two_threads", {}).items():
        for way in ("encode", "decode", "encode_many", "decode_many"):
            if way in s:
                promise(f"{name} {way}, two threads / one", s[way], 1.8)
    return out


def show(network: str, what: str, r: dict[str, Any]) -> None:
    """The table and the figures on standard output."""
    copy = r["codecs"]["memcpy"]["encode_gbps"]  # by one thread
    print(f"{what}, {r['bits']} bits, density {r['density']:.3f}, {r['elements'] / 1e6:.1f} M elements")
    print(f"  {'':24} {'bytes':>12} {'gain':>6} {'encode':>7} {'decode':>7} GB/s   x memcpy")
    for name, c in r["codecs"].items():
        e, d = c["encode_gbps"], c["decode_gbps"]
        print(
            f"  {name:24} {int(c['bytes']):12,} {c['gain']:6.3f} {e:7.3f} {d:7.3f}      "
            f"{e / copy:5.2f} {d / copy:5.2f}"
        )
    if "two_threads" in r:
        others = r["two_threads_others"]
        print(
            f"  {'two threads / one':24} {'encode':>7} {'decode':>7}   into new memory   all maps "
            "in one call",
            end="",
        )
        print("" if others is None else f"; other processes used {others:.2f} CPUs")
    for name, s in r.get("two_threads", {}).items():
        e, d, en, dn, em, dm = (s.get(w, s.get(c, float("nan"))) for w, c in TWO_THREADS)
        print(f"  {name:24} {e:6.2f}x {d:6.2f}x   {en:6.2f}x {dn:6.2f}x   {em:6.2f}x {dm:6.2f}x")
    for f in figures(network, r):
        print(f"  {'' if f['met'] else 'NOT '}met: {f['what']} {f['measured']:.3f} (at least {f['least']})")
    print(flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "networks",
        nargs="*",
        default=["inception_v3", "cifar10_resnet20"],
        metavar="NETWORK[=WEIGHTS]",
        help=f"{', '.join(NETWORKS)}; WEIGHTS is a safetensors file with the model's keys",
    )
    p.add_argument("--images", type=int, help="how many images, instead of the network's own number")
    p.add_argument("--bits", type=int, nargs="*", default=[8, 16])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--no-slow", action="store_true", help="without zstd -19")
    p.add_argument("--only", nargs="*", default=[], help="only these codecs, seg and memcpy")
    p.add_argument("--no-scaling", action="store_true", help="without two threads against one")
    p.add_argument(
        "--only-scaling", action="store_true", help="two threads against one, the rest of the results is kept"
    )
    p.add_argument("--label", help="what to call the network with these weights in the results")
    p.add_argument(
        "--maps", type=Path, help="keep the quantized maps in this folder, and take them from there"
    )
    p.add_argument("--out", type=Path, default=HERE.parent / "results" / "codec" / "bench.json")
    args = p.parse_args()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}

    from rich.progress import Progress

    from actzip import cpu
    from actzip.files import write_bytes

    cpus = os.sched_getaffinity(0)
    for spec in args.networks:
        network, _, weights = spec.partition("=")
        if network not in NETWORKS:
            raise SystemExit(f"no network {network!r}: there are {', '.join(NETWORKS)}")
        label = args.label or network + ("" if not weights else f" ({Path(weights).stem})")
        images = args.images or NETWORKS[network].images
        for bits, maps in quantized(network, weights or None, images, args.bits, args.maps):
            what = f"{label}, {images} images, {len(maps)} maps"
            key = f"{label}, {bits} bits"
            if args.only_scaling:
                if key not in results:
                    raise SystemExit(f"{args.out} has no results of {key!r} to which they could be added")
                r = results[key]
            else:
                table = contenders(bits, not args.no_slow)
                if args.only:
                    table = {k: v for k, v in table.items() if k in {*args.only, "memcpy", "seg"}}
                os.sched_setaffinity(0, {max(cpus)})
                with Progress(transient=True, disable=not sys.stderr.isatty()) as bar:
                    task = bar.add_task(what, total=len(maps))
                    r = compare(maps, bits, args.repeats, table, lambda bar=bar, task=task: bar.advance(task))
                os.sched_setaffinity(0, cpus)
            if not args.no_scaling and len(cpus) > 1:
                new = scaling(maps, bits, args.repeats, set(args.only))
                if args.only_scaling:
                    new["two_threads"] = r.get("two_threads", {}) | new["two_threads"]
                r |= new
            entry = {"what": what, "weights": Path(weights).name if weights else None, "machine": cpu.info()}
            show(network, what, r)
            results[key] = entry | r | {"figures": figures(network, r)}
            write_bytes(args.out, json.dumps(results, indent=1).encode() + b"\n")
    print(args.out)


def quantized(network: str, weights: str | None, images: int, widths: list[int], folder: Path | None) -> Any:
    """(bits, maps) for each width; kept in ``folder`` where one is given."""
    from actzip.codec import quantize

    key = f"{network}-{Path(weights).stem if weights else 'given'}-{images}"
    paths = {b: folder / f"{key}-{b}.npz" for b in widths} if folder else {}
    floats: dict[str, Array] = {}
    for bits in widths:
        if folder and paths[bits].exists():
            with np.load(paths[bits]) as file:
                yield bits, [file[k] for k in file.files]
            continue
        floats = floats or maps_of(network, weights, images)
        maps = {k: np.ascontiguousarray(quantize(x, bits)[0]) for k, x in floats.items()}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(paths[bits], **maps)
        yield bits, list(maps.values())


if __name__ == "__main__":
    main()
