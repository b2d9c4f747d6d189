"""Differential fuzzing: the native decoder against the plain Python one of tests/codec/reference.py.

    python tests/fuzz/differential.py --cases 20000 --seed 7

Each case encodes a random small map and compares both decoders on it; then it changes the
parameters, a payload or the header, makes the sizes and checksums right again, and compares what
both say: the same values, or an error from both (the native one a CodecError that names a place). A
case is made from (seed, number) alone.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "codec"))
import reference

from actzip import cpu
from actzip.codec import codecs, decode, encode
from actzip.errors import CodecError, InputError

FLOATS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}


def native(blob: bytes) -> np.ndarray[Any, Any]:
    """What the native decoder makes of ``blob``: integers, or floating-point patterns as unsigned
    integers."""
    try:
        import torch
    except ImportError:
        a = decode(blob, dequantize=False, framework="numpy", threads=1)
        return np.ascontiguousarray(a).view(FLOATS[a.dtype.name]) if a.dtype.kind == "f" else a
    t = decode(blob, dequantize=False, framework="torch", threads=1)
    if t.dtype in (torch.float16, torch.bfloat16):
        return t.contiguous().view(torch.int16).numpy().view(np.uint16)
    if t.dtype == torch.float32:
        return t.contiguous().view(torch.int32).numpy().view(np.uint32)
    return t.numpy()


def random_map(rng: np.random.Generator, most: int = 400) -> tuple[Any, str, int | None, dict[str, int], int]:
    """A map, a codec that takes it, bits, options, chunk_elements."""
    import torch

    known = [c for c in codecs().values() if c.id in reference.CODECS]
    codec = known[rng.integers(len(known))]
    left, shape = int(rng.integers(1, most)), []
    for _ in range(int(rng.integers(0, 5))):
        d = int(rng.integers(1, min(left, 40) + 1))
        shape.append(d)
        left = max(left // d, 1)
    shape = shape[::-1]
    density = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    on = rng.random(shape) < density
    options = {}
    for name in codec.options:
        if rng.random() < 0.3:
            options[name] = int(rng.choice([0, 1, 2, 4, 8, 16]))
    chunk = int(rng.choice([65536, 65536, rng.integers(1, most)]))
    if codec.floats and rng.random() < 0.35:
        kind = str(rng.choice(codec.floats))
        a = np.abs(rng.normal(0, 2.0 ** rng.integers(-8, 8), shape)) * on
        if rng.random() < 0.4:
            a = np.where(rng.random(shape) < 0.5, -a, a)
        if kind == "bfloat16":
            return torch.tensor(a, dtype=torch.bfloat16), codec.name, None, options, chunk
        with np.errstate(over="ignore"):
            a = np.asarray(a, kind)
        wild = rng.random(shape) < rng.choice([0.0, 0.05, 1.0])
        patterns = a.view(FLOATS[kind])
        noise = rng.integers(0, np.iinfo(FLOATS[kind]).max, shape, FLOATS[kind], endpoint=True)
        return (
            np.where(wild, noise, patterns).astype(FLOATS[kind]).view(kind),
            codec.name,
            None,
            options,
            chunk,
        )
    bits = int(rng.integers(1, 17))
    top = 2**bits - 1
    v = np.minimum(rng.exponential(2.0 ** rng.uniform(-1, bits), shape), top).astype(np.int64) * on
    if bits > 1 and rng.random() < 0.3:
        v = np.clip(np.where(rng.random(shape) < 0.5, -v, v), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return v.astype(np.int16 if bits > 8 else np.int8), codec.name, bits, options, chunk
    return v.astype(np.uint16 if bits > 8 else np.uint8), codec.name, bits, options, chunk


def patterns_of(a: Any) -> list[int]:
    """The values of a map as integers, floating point as its bit patterns."""
    import torch

    if isinstance(a, torch.Tensor):
        return a.contiguous().view(torch.int16).numpy().view(np.uint16).ravel().tolist()
    if a.dtype.kind == "f":
        a = np.ascontiguousarray(a).view(FLOATS[a.dtype.name])
    return a.ravel().tolist()


def change(rng: np.random.Generator, data: bytes) -> bytes:
    """The bytes with some of them changed, cut out or put in."""
    b = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not b:
            break
        at = int(rng.integers(len(b)))
        match int(rng.integers(6)):
            case 0 | 1:
                b[at] ^= 1 << int(rng.integers(8))
            case 2:
                b[at] = int(rng.integers(256))
            case 3:
                b[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 4:
                del b[at : at + int(rng.integers(1, 5))]
            case _:
                b[at:at] = rng.bytes(int(rng.integers(1, 5)))
    return bytes(b)


def varint(v: int) -> bytes:
    out = b""
    while v >= 128:
        out += bytes([v & 127 | 128])
        v >>= 7
    return out + bytes([v])


def mutate(rng: np.random.Generator, blob: bytes) -> bytes:
    """A damaged blob; usually one whose checksums are right."""
    h = reference.header(blob)
    size = int.from_bytes(blob[10:14], "little")
    where = rng.random()
    if where < 0.2:
        b = bytearray(change(rng, blob[: size + 8]) + blob[size + 8 :])
        end = int.from_bytes(b[10:14], "little")
        if rng.random() < 0.8 and 4 <= end <= len(b):
            b[end - 4 : end] = reference.crc32c(bytes(b[: end - 4])).to_bytes(4, "little")
        return bytes(b)
    params = h.params
    payloads = [blob[at : at + n] for _, _, at, n in h.chunks]
    if where < 0.5 and params:
        params = change(rng, params)
    elif payloads:
        i = int(rng.integers(len(payloads)))
        payloads[i] = change(rng, payloads[i])
    fixed = blob[: size - 4 - 8 * len(h.chunks) - len(h.params) - len(varint(len(h.params)))]
    out = bytearray(fixed + varint(len(params)) + params)
    for p in payloads:
        out += len(p).to_bytes(4, "little") + reference.crc32c(p).to_bytes(4, "little")
    out[10:14] = (len(out) + 4).to_bytes(4, "little")
    out += reference.crc32c(bytes(out)).to_bytes(4, "little")
    return bytes(out) + b"".join(payloads)


def compare(blob: bytes) -> str:
    """Runs both decoders; what both came to. AssertionError if they differ."""
    values: list[int] | None
    try:
        h = reference.header(blob)
        if np.prod(h.shape, dtype=object) > 1 << 17:
            return "too large to compare"
        values, shape = reference.decode(blob)
    except reference.Malformed as e:
        values, why = None, str(e)
    try:
        got = native(blob)
    except CodecError as e:
        assert values is None, f"only the native decoder refuses: {e}"
        assert str(e), "an error without a message"
        return "refused"
    assert values is not None, f"only the reference refuses: {why}"
    assert tuple(got.shape) == tuple(shape)
    assert got.ravel().tolist() == values, "other values"
    return "decoded"


def run(seed: int, first: int, count: int) -> Counter[str]:
    """Runs cases ``first`` .. ``first + count - 1`` of ``seed``; how many came to what."""
    tally: Counter[str] = Counter()
    isas = cpu.isas()
    for i in range(first, first + count):
        rng = np.random.default_rng([seed, i])
        a, codec, bits, options, chunk = random_map(rng)
        try:
            with cpu.forced(isas[int(rng.integers(len(isas)))]):
                try:
                    blob = encode(a, codec, bits, options=options, chunk_elements=chunk, threads=1)
                except InputError:
                    assert options
                    tally["option refused"] += 1
                    continue
                assert compare(blob) == "decoded", "a good blob is refused"
                assert reference.decode(blob)[0] == patterns_of(a), "other values than went in"
                for _ in range(3):
                    tally[f"{codec} damaged, {compare(mutate(rng, blob))}"] += 1
                tally[f"{codec} good"] += 1
        except AssertionError as e:
            raise AssertionError(f"seed {seed} case {i}, codec {codec}: {e}") from e
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    a = parser.parse_args()
    tally = run(a.seed, a.first, a.cases)
    print(f"{a.cases} cases, seed {a.seed}: the decoders agree")
    for name, n in sorted(tally.items()):
        print(f"  {name:32} {n}")


if __name__ == "__main__":
    main()
