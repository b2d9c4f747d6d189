"""A decoder of actzip blobs in plain Python, written from docs/bitstream.md; slow, and independent
of the native one.

``decode(blob)`` gives the integers (signed where the blob says so), or the floating-point patterns
as unsigned integers, as a list in C order with the shape: the container's quantizer is not applied.
``Malformed`` says what is wrong. A new codec is one function here and one row in ``CODECS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

MAX_CHUNK = 1 << 20


class Malformed(Exception):
    """The blob is not what the format says."""


def need(condition: object, what: str) -> None:
    if not condition:
        raise Malformed(what)


def _crc_table() -> list[int]:
    table = []
    for i in range(256):
        for _ in range(8):
            i = i >> 1 ^ (0x82F63B78 if i & 1 else 0)
        table.append(i)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C of ``data``.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    c = 0xFFFFFFFF
    for b in data:
        c = c >> 8 ^ _CRC[(c ^ b) & 255]
    return c ^ 0xFFFFFFFF


class Bytes:
    """A cursor over bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        need(n <= len(self.data) - self.at, "cut off")
        self.at += n
        return self.data[self.at - n : self.at]

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def varint(self) -> int:
        v = 0
        for k in range(9):
            b = self.take(1)[0]
            v |= (b & 127) << 7 * k
            if b < 128:
                need(b or not k, "a varint that is not the shortest")
                return v
        raise Malformed("a varint of more than 9 bytes")


class Bits:
    """A cursor over bits: from the lowest of each byte (numbers low bit first), or from the highest
    (``msb``)."""

    def __init__(self, data: bytes, msb: bool = False) -> None:
        self.data, self.at, self.msb = data, 0, msb

    def bit(self) -> int:
        need(self.at < 8 * len(self.data), "bits end too early")
        b, i = divmod(self.at, 8)
        self.at += 1
        return self.data[b] >> (7 - i if self.msb else i) & 1

    def number(self, n: int) -> int:
        bits = [self.bit() for _ in range(n)]
        return sum(b << i for i, b in enumerate(bits[::-1] if self.msb else bits))

    def gamma(self) -> int:
        n = 0
        while not self.bit():
            n += 1
            need(n <= 20, "a gamma code that is too long")
        return 1 << n | self.number(n)

    def finish(self) -> None:
        left = 8 * len(self.data) - self.at
        need(left < 8, "bytes are left over")
        need(self.number(left) == 0, "padding is not zero")


@dataclass
class Map:
    kind: str
    bits: int
    planes: int
    rows: int
    cols: int
    channels: int


@dataclass
class Box:
    first_plane: int
    planes: int
    rows: int
    cols: int
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.planes * self.rows * self.cols


# --------------------------------------------------------------------------------------------------- codecs


def raw(m: Map, params: bytes, payload: bytes, box: Box) -> list[int]:
    need(not params, "raw has no parameters")
    bits = Bits(payload)
    out = [bits.number(m.bits) for _ in range(box.size)]
    bits.finish()
    return out


def zvc(m: Map, params: bytes, payload: bytes, box: Box) -> list[int]:
    need(not params, "zvc has no parameters")
    size = -(-box.size // 8)
    r = Bytes(payload)
    mask, values = Bits(r.take(size)), Bits(r.rest())
    out = [values.number(m.bits) if mask.bit() else None for _ in range(box.size)]
    need(0 not in out, "a zero among the values")
    mask.finish()
    values.finish()
    return [v or 0 for v in out]


def golomb(m: Map, params: bytes, payload: bytes, box: Box, sparse: bool) -> list[int]:
    need(params, "no order")
    if params[0] == 255:
        need(len(params) - 1 == -(-m.channels // 2), "orders of the wrong length")
        nibbles = [x for b in params[1:] for x in (b & 15, b >> 4)]
        need(not any(nibbles[m.channels :]), "padding is not zero")
        orders = nibbles[: m.channels]
    else:
        need(len(params) == 1, "orders of the wrong length")
        orders = [params[0]]
    need(all(k < m.bits for k in orders), "an order that is too great")
    r = Bytes(payload)
    length = r.varint()
    flags = Bits(r.take(-(-box.size // 8))) if sparse else None
    prefixes = Bits(r.take(length))
    suffixes = Bits(r.rest())
    out = []
    for i in range(box.size):
        if flags is not None and flags.bit():
            out.append(0)
            continue
        k = orders[(box.first_plane + i // (box.rows * box.cols)) % len(orders)]
        zeros = 0
        while not prefixes.bit():
            zeros += 1
            need(zeros <= 16, "a prefix that is too long")
        n = k + zeros
        v = (1 << n | suffixes.number(n)) - (1 << k) + sparse
        need(v < 1 << m.bits, "a symbol that is too large")
        out.append(v)
    for s in (flags, prefixes, suffixes):
        if s is not None:
            s.finish()
    return out


def seg(m: Map, params: bytes, payload: bytes, box: Box) -> list[int]:
    return golomb(m, params, payload, box, True)


def eg(m: Map, params: bytes, payload: bytes, box: Box) -> list[int]:
    return golomb(m, params, payload, box, False)


def huffman(m: Map, params: bytes, payload: bytes, box: Box) -> list[int]:
    wide = m.bits > 8
    classes = 16 + 8 * (m.bits - 4) if wide else 1 << m.bits

    def raw_bits(c: int) -> int:
        return (c - 16) // 8 + 1 if wide and c >= 16 else 0

    def base(c: int) -> int:
        return (8 + (c - 16) % 8) << raw_bits(c) if wide and c >= 16 else c

    r = Bytes(params)
    count = r.varint()
    need(count <= classes and len(params) - r.at == -(-count // 2), "code lengths")
    lengths = [x for b in r.rest() for x in (b & 15, b >> 4)]
    need(not any(lengths[count:]), "padding is not zero")
    lengths = lengths[:count]
    need(count and lengths[-1] and max(lengths) <= 12, "code lengths")
    codes, code = {}, 0
    for n in range(1, 13):
        for c in range(count):
            if lengths[c] == n:
                codes[n, code] = c
                code += 1
        code <<= 1
    weight = sum(1 << (12 - n) for n in lengths if n)
    need(weight == 1 << 12 or (len(codes) == 1 and (1, 0) in codes), "the code is not complete")
    r = Bytes(payload)
    sizes = [r.varint() for _ in range(3)]
    streams = [Bits(r.take(n)) for n in sizes] + [Bits(r.rest())]
    quarter, out = -(-box.size // 4), []
    for j, stream in enumerate(streams):
        for _ in range(min(box.size, j * quarter), min(box.size, (j + 1) * quarter)):
            n = code = 0
            while (n, code) not in codes:
                n, code = n + 1, code << 1 | stream.bit()
                need(n <= 12, "bits that are no code")
            c = codes[n, code]
            out.append(base(c) + stream.number(raw_bits(c)))
        stream.finish()
    return out


def ebpc(m: Map, params: bytes, payload: bytes, box: Box) -> list[int]:
    need(len(params) == 1 and params[0] in (8, 16, 32), "block length")
    n, r = params[0], Bytes(payload)
    zeros = Bits(r.take(r.varint()), msb=True)
    values = Bits(r.rest(), msb=True)

    def block() -> Iterator[int]:
        v = values.number(m.bits)
        planes: list[int] = []
        while len(planes) <= m.bits:
            before = planes[-1] if planes else 0
            if values.bit():
                x = values.number(n - 1)
            elif values.bit():
                x = 0
            elif values.bit():
                run = values.number((m.bits - 1).bit_length()) + 2
                need(run <= m.bits + 1 - len(planes), "a run of planes that is too long")
                planes += [before] * run
                continue
            else:
                which = values.number(2)
                if which == 0:
                    x = (1 << (n - 1)) - 1
                elif which == 1:
                    x = before
                else:
                    ones = 4 - which  # 2 or 1
                    i = values.number((n - 1).bit_length())
                    need(i + ones <= n - 1, "a one beyond the last difference")
                    x = ((1 << ones) - 1) << (n - 1 - i - ones)
            planes.append(before ^ x)
        yield v
        for j in range(1, n):
            d = sum((plane >> (n - 1 - j) & 1) << p for p, plane in enumerate(planes))
            v += d - ((d >> m.bits) << (m.bits + 1))
            need(0 <= v < 1 << m.bits, "a symbol out of range")
            yield v

    out: list[int] = []
    pending: list[int] = []
    while len(out) < box.size:
        if not zeros.bit():
            run = zeros.number(4) + 1
            need(run <= box.size - len(out), "a run of zeros that is too long")
            out += [0] * run
            continue
        pending = pending or list(block())
        need(pending[0], "a zero among the values")
        out.append(pending.pop(0))
    need(not any(pending), "a value after the last")
    zeros.finish()
    values.finish()
    return out


@dataclass
class RansModel:
    base: list[int]
    raw: list[int]
    rotate: int
    prec: int
    classes: list[int]
    table_of: list[list[int]]  # [class][context]
    tables: list[list[int]]


def rans_model(m: Map, params: bytes) -> RansModel:
    r = Bytes(params)
    form, more = r.number(1), r.number(1)
    fine, prec, rotate = form & 3, 8 + (form >> 2 & 7), form >> 5 & 1
    keep, classes = more & 15, 1 + (more >> 4)
    need(form < 64 and prec <= 12 and keep <= 12, "impossible form")
    if m.kind == "integer":
        need(fine < m.bits and not rotate, "impossible form")
        count = (m.bits + 1 - fine) << fine
        need(count <= 64, "impossible form")
        exponents = [max((t >> fine) - 1, 0) for t in range(count)]
        base = [t if t < 2 << fine else (1 << fine | t % (1 << fine)) << e for t, e in enumerate(exponents)]
        raws = exponents
    else:
        mantissa, most = {"float16": (10, 32), "bfloat16": (7, 256), "float32": (23, 256)}[m.kind]
        first = r.number(1)
        need(fine <= 2 and first < most, "impossible form")
        width = mantissa - fine + rotate
        count = 2 + (min(62 >> fine, most - first) << fine)
        base = [0, 0, *(((first << fine) + j) << width for j in range(count - 2))]
        raws = [0, m.bits] + [width] * (count - 2)
    bits = Bits(r.rest())
    of = [0] * m.channels if classes == 1 else []
    if classes > 1:
        width = (classes - 1).bit_length()
        need(m.channels * width <= 8 * len(bits.data), "cut off")
        of = [bits.number(width) for _ in range(m.channels)]
        need(all(c < classes for c in of), "a class that does not exist")
    contexts, total, table_of = 2 * (count - 1) + 1, 0, []
    for _ in range(classes):
        n = bits.gamma()
        need(n <= contexts and total + n <= 256, "too many tables")
        starts = [0]
        for _ in range(n - 1):
            starts.append(starts[-1] + bits.gamma())
            need(starts[-1] < contexts, "a context that is too great")
        table_of.append([total + sum(s <= c for s in starts) - 1 for c in range(contexts)])
        total += n
    tables: list[list[int]] = []
    for k in range(total):
        last, free = bits.number(6), bits.number(6)
        need(free <= last < count, "tokens out of range")
        f, previous = [0] * 64, 0
        for t in range(last + 1):
            if t == free:
                continue
            z = bits.gamma() - 1
            n = (tables[-1][t].bit_length() if k else previous) + (-(z + 1) // 2 if z & 1 else z // 2)
            need(0 <= n <= prec, "a frequency out of range")
            previous = n
            if n:
                said = min(n - 1, keep)
                f[t] = ((1 << said) + bits.number(said)) << (n - 1 - said)
            need(sum(f) < 1 << prec, "frequencies that are too great")
        f[free] = (1 << prec) - sum(f)
        tables.append(f)
    bits.finish()
    return RansModel(base, raws, rotate, prec, of, table_of, tables)


def rans(m: Map, params: bytes, payload: bytes, box: Box) -> list[int]:
    model = rans_model(m, params)
    n, plane = box.size, box.rows * box.cols
    lanes = 32 if n >= 32768 else 16 if n >= 8192 else 8 if n >= 1024 else 4
    run, cols = plane, box.cols
    if box.planes < lanes:
        k = lanes // box.planes
        if box.rows > 1:
            run = max(-(-box.rows // k), min(box.rows, 8)) * box.cols
        else:
            run = cols = max(-(-box.cols // k), min(box.cols, 64))
    stripes = [
        (p, p * plane + s, min(run, plane - s)) for p in range(box.planes) for s in range(0, plane, run)
    ]
    while lanes > 4 and len(stripes) <= lanes // 2:
        lanes //= 2
    need(len(payload) >= 4 * lanes and len(payload) % 2 == 0, "states or half a word")
    r = Bytes(payload)
    x = [r.number(4) for _ in range(lanes)]
    need(min(x) >= 1 << 16, "a state that is too small")
    wide = max(model.raw) > 16
    out, tokens = [0] * n, [0] * n

    def renorm(lane: int) -> None:
        if x[lane] < 1 << 16:
            x[lane] = x[lane] << 16 | r.number(2)

    for g in range(0, len(stripes), lanes):
        group = list(enumerate(stripes[g : g + lanes]))
        for i in range(max(length for _, (_, _, length) in group)):
            here = [(lane, p, at + i) for lane, (p, at, length) in group if i < length]
            for lane, p, at in here:
                context = (tokens[at - 1] if i % cols else 0) + (tokens[at - cols] if i >= cols else 0)
                of = model.classes[(box.first_plane + p) % m.channels]
                f = model.tables[model.table_of[of][context]]
                slot, t, first = x[lane] % (1 << model.prec), 0, 0
                while first + f[t] <= slot:
                    first += f[t]
                    t += 1
                tokens[at] = t
                x[lane] = f[t] * (x[lane] >> model.prec) + slot - first
                renorm(lane)
            for lane, _, at in here:
                b = min(model.raw[tokens[at]], 16)
                out[at] = model.base[tokens[at]] + x[lane] % (1 << b)
                x[lane] >>= b
                renorm(lane)
            for lane, _, at in here if wide else []:
                b = max(model.raw[tokens[at]] - 16, 0)
                out[at] += x[lane] % (1 << b) << 16
                x[lane] >>= b
                renorm(lane)
    need(r.at == len(payload), "words are left over")
    need(all(s == 1 << 16 for s in x), "a state that is not 65536 in the end")
    if model.rotate:
        out = [v >> 1 | (v & 1) << (m.bits - 1) for v in out]
    return out


CODECS: dict[int, tuple[str, Callable[[Map, bytes, bytes, Box], list[int]], tuple[str, ...]]] = {
    0: ("raw", raw, ("integer", "float16", "bfloat16", "float32")),
    1: ("seg", seg, ("integer",)),
    2: ("eg", eg, ("integer",)),
    3: ("huffman", huffman, ("integer",)),
    4: ("zvc", zvc, ("integer", "float16", "bfloat16", "float32")),
    5: ("ebpc", ebpc, ("integer",)),
    6: ("rans", rans, ("integer", "float16", "bfloat16", "float32")),
}

# ------------------------------------------------------------------------------------------------- container

#: dtype byte: name and the most bits of its integers, and whether it has a sign
DTYPES = {
    0: ("uint8", 8, False),
    1: ("int8", 8, True),
    2: ("uint16", 16, False),
    3: ("int16", 16, True),
    4: ("uint32", 16, False),
    5: ("int32", 16, True),
    6: ("uint64", 16, False),
    7: ("int64", 16, True),
    8: ("bool", 1, False),
    16: ("float16", 16, True),
    17: ("bfloat16", 16, True),
    18: ("float32", 16, True),
    19: ("float64", 16, True),
}


@dataclass
class Header:
    codec: int
    dtype: str
    bits: int
    signed: bool
    scale: bytes | None
    zero: int
    channels_last: bool
    torch: bool
    shape: tuple[int, ...]
    chunk: tuple[int, int, int]
    params: bytes
    map: Map
    chunks: list[tuple[Box, int, int, int]]  # box, first symbol, offset in the blob, size
    crcs: list[int]


def header(blob: bytes) -> Header:
    need(len(blob) >= 18, "truncated")
    need(blob[:4] == b"ACTZ" and blob[4] == 1, "magic or version")
    size = int.from_bytes(blob[10:14], "little")
    need(18 <= size <= len(blob), "header size")
    need(crc32c(blob[: size - 4]) == int.from_bytes(blob[size - 4 : size], "little"), "header checksum")
    codec, dtype, bits, flags, dims = blob[5:10]
    need(codec in CODECS, "unknown codec")
    need(dtype in DTYPES, "unknown dtype")
    need(flags < 16 and dims <= 16, "flags or dimensions")
    name, limit, has_sign = DTYPES[dtype]
    signed, quantizer, channels_last, torch = (bool(flags >> i & 1) for i in range(4))
    r = Bytes(blob[14 : size - 4])
    shape = tuple(r.varint() for _ in range(dims))
    chunk = (r.varint(), r.varint(), r.varint())
    need(all(1 <= c <= MAX_CHUNK for c in chunk), "chunk shape")
    scale, zero = None, 0
    if quantizer:
        scale = r.take(4)
        bits32 = int.from_bytes(scale, "little")
        need(0 < bits32 < 0x7F800000, "scale")
        zero = int.from_bytes(r.take(4), "little", signed=True)
    length = r.varint()
    need(length <= 1 << 24, "parameters that are too long")
    params = r.take(length)

    kind = "integer"
    if dtype >= 16 and not quantizer:
        need(name != "float64", "float64 without a quantizer")
        kind = name
        need(bits == (32 if name == "float32" else 16) and not signed, "bits or sign of floating point")
    else:
        need(1 <= bits <= limit, "bits")
        need(has_sign or not signed, "a sign in an unsigned type")
        if name in ("int8", "int16"):
            need(signed or bits < limit, "bits of an unsigned value in a signed type")
    need(kind in CODECS[codec][2], "a kind that the codec does not take")
    elements = prod(shape)
    need(elements <= 1 << 60, "too many elements")
    need(not channels_last or dims >= 3, "channels-last needs three dimensions")
    if elements == 0:
        need(chunk == (1, 1, 1), "chunk shape of an empty map")
        need(r.at == len(r.data), "chunk index")
        need(size == len(blob), "bytes after the end")
        m = Map(kind, bits, 0, 0, 0, 0)
        return Header(
            codec, name, bits, signed, scale, zero, channels_last, torch, shape, chunk, params, m, [], []
        )
    cols = shape[-1] if dims >= 1 else 1
    rows = shape[-2] if dims >= 2 else 1
    channels = shape[-3] if dims >= 3 else 1
    m = Map(kind, bits, elements // rows // cols, rows, cols, channels)
    cp, cr, cc = chunk
    need(cp <= m.planes and cr <= rows and cc <= cols, "chunk shape does not fit")
    need((cp == 1 or cr == rows) and (cp == cr == 1 or cc == cols), "chunks are not contiguous")
    need(cp * cr * cc <= MAX_CHUNK, "chunks are too large")
    count = -(-m.planes // cp) * -(-rows // cr) * -(-cols // cc)
    need(len(r.data) - r.at == 8 * count, "chunk index")
    chunks, crcs, at = [], [], size
    for p in range(0, m.planes, cp):
        for y in range(0, rows, cr):
            for c in range(0, cols, cc):
                box = Box(p, min(cp, m.planes - p), min(cr, rows - y), min(cc, cols - c))
                n = r.number(4)
                crcs.append(r.number(4))
                chunks.append((box, (p * rows + y) * cols + c, at, n))
                at += n
    need(at == len(blob), "chunks do not end where the blob does")
    return Header(
        codec, name, bits, signed, scale, zero, channels_last, torch, shape, chunk, params, m, chunks, crcs
    )


def decode(blob: bytes) -> tuple[list[int], tuple[int, ...]]:
    """The values of a blob in C order, and its shape."""
    h = header(blob)
    _, codec, _ = CODECS[h.codec]
    out: list[int] = []
    for (box, first, at, size), crc in zip(h.chunks, h.crcs, strict=True):
        payload = blob[at : at + size]
        need(crc32c(payload) == crc, "chunk checksum")
        symbols = codec(h.map, h.params, payload, box)
        assert len(symbols) == box.size and first == len(out)
        out += symbols
    if h.signed:
        out = [-(v + 1) // 2 if v & 1 else v // 2 for v in out]
    return out, h.shape
