"""``encode``, ``decode`` and ``inspect``: one array to one self-describing blob and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload

import numpy as np

from actzip import _codec
from actzip.codec import arrays, quantizer, registry
from actzip.errors import CodecError, InputError

__all__ = ["Chunk", "Info", "chunks", "decode", "decode_many", "encode", "encode_many", "inspect"]


_UINT32 = np.dtype(np.uint32)


@overload
def encode(
    tensor: Any,
    codec: str = ...,
    bits: int | None = ...,
    *,
    scale: float | None = ...,
    signed: bool | None = ...,
    options: Mapping[str, int] | None = ...,
    min_speed: float = ...,
    chunk_elements: int = ...,
    threads: int = ...,
    out: None = ...,
) -> bytes: ...


@overload
def encode(
    tensor: Any,
    codec: str = ...,
    bits: int | None = ...,
    *,
    scale: float | None = ...,
    signed: bool | None = ...,
    options: Mapping[str, int] | None = ...,
    min_speed: float = ...,
    chunk_elements: int = ...,
    threads: int = ...,
    out: Any,
) -> memoryview: ...


def encode(
    tensor: Any,
    codec: str = "auto",
    bits: int | None = None,
    *,
    scale: float | None = None,
    signed: bool | None = None,
    options: Mapping[str, int] | None = None,
    min_speed: float = 0.0,
    chunk_elements: int = 65536,
    threads: int = 0,
    out: Any = None,
) -> bytes | memoryview:
    """The blob of ``tensor``: every element comes back from :func:`decode` exactly, unless ``bits`` quantizes.

    ``tensor`` is a numpy array or torch tensor of any shape up to 16 dimensions; the last two are rows and
    columns, the one before the channels. Integers (bool, 8 to 64 bits wide, values of at most 16 bits) are
    coded as they are; ``bits`` then only says how many they have (default: as few as the dtype or the values
    need). Floating point with ``bits`` is quantized linearly to that many (see :mod:`actzip.codec.quantizer`)
    and decodes to floating point again; without ``bits`` it is coded losslessly, which the codecs ``raw``,
    ``zvc`` and ``rans`` can.

    Args:
        codec: one of :func:`actzip.codec.available`. ``auto`` takes the smallest result.
        bits: 1 to 16.
        scale: the quantizer's step. Default: the greatest magnitude maps to the greatest integer. With
            integers it is only recorded.
        signed: whether quantized values are signed. Default: whether there is a negative one.
        options: the codec's own options, see ``codecs()[name].options``.
        min_speed: with ``auto``: only codecs whose nominal encoding and decoding speeds, in GB/s of the q-bit
            tensor on one core, are at least this.
        chunk_elements: how many elements to code independently (at most 2**20): fewer for finer slices, more
            for less overhead.
        threads: 0 for all. The bytes do not depend on it.
        out: a writable buffer (bytearray, uint8 array) to write the blob to; the result is then a view of
            the part used. With about three times the size of the q-bit tensor, nothing is copied or allocated.

    Returns:
        ``bytes``, or a ``memoryview`` of ``out``.

    Raises:
        InputError: a dtype or shape that cannot be coded, values that do not fit, an unknown codec or option.

    >>> import numpy as np
    >>> blob = encode(np.array([[0, 0, 3], [1, 0, 0]], np.uint8), codec="seg", bits=2)
    >>> decode(blob)
    array([[0, 0, 3],
           [1, 0, 0]], dtype=uint8)
    """
    if codec != "auto":
        registry.get(codec)
    p = _prepare(tensor, bits, scale, signed, chunk_elements, threads)

    def run(name: str, opts: Mapping[str, int], to: Any = None) -> Any:
        return _codec.encode(
            array=p.array,
            codec=name,
            dtype=p.dtype,
            bits=p.bits,
            signed=p.signed,
            scale=p.scale,
            zero=0,
            channels_last=p.channels_last,
            from_torch=p.torch,
            options={k: int(x) for k, x in opts.items()},
            chunk_elements=chunk_elements,
            threads=threads,
            out=to,
        )

    if codec != "auto":
        _check_takes(codec, p.kind)
        view = _writable(out)
        if view is not None:
            return view[: int(run(codec, options or {}, view))]
        blob: bytes = run(codec, options or {})
        return blob
    best: bytes | None = None
    for name in _candidates(p, options, min_speed):
        one: bytes = run(name, {})
        if best is None or len(one) < len(best):
            best = one
    assert best is not None
    target = _writable(out)
    return best if target is None else _put(best, target)


def encode_many(
    tensors: Iterable[Any],
    codec: str = "auto",
    bits: int | None = None,
    *,
    scale: float | Sequence[float | None] | None = None,
    signed: bool | None = None,
    options: Mapping[str, int] | None = None,
    min_speed: float = 0.0,
    chunk_elements: int = 65536,
    threads: int = 0,
    out: Sequence[Any] | None = None,
) -> list[Any]:
    """The blobs of many tensors, as :func:`encode` makes them, each map by one thread: threads need not agree on anything.

    That is what scales where one map is too small to be shared among threads (below a megabyte). Maps that are too large
    for the work to be shared out by maps are encoded by all threads together. The bytes are those of :func:`encode`.

    Args:
        tensors: as for :func:`encode`; shapes and dtypes may differ.
        scale: one for all, or one a tensor (None: by its greatest magnitude).
        threads: 0 for all. Floating point is quantized by one thread.
        out: a writable buffer a tensor; the result is then views of the parts used.
        codec, bits, signed, options, min_speed, chunk_elements: see :func:`encode`. ``auto`` chooses for each tensor.

    Returns:
        A list of ``bytes``, or of ``memoryview``.

    Raises:
        InputError: as :func:`encode`, with the number of the tensor; another number of scales or buffers than of tensors.

    >>> import numpy as np
    >>> maps = [np.array([0, 3, 0], np.uint8), np.array([[1], [0]], np.uint8)]
    >>> decode_many(encode_many(maps, codec="seg", bits=2))
    [array([0, 3, 0], dtype=uint8), array([[1],
           [0]], dtype=uint8)]
    """
    if codec != "auto":
        registry.get(codec)
    given = _listed(tensors, "tensors")
    some: Any = scale
    scales = [some] * len(given) if some is None or np.ndim(some) == 0 else list(some)
    if len(scales) != len(given):
        raise InputError(f"scale: {len(scales)} for {len(given)} tensors; give one a tensor, or one for all")
    targets = None if out is None else [_writable(o) for o in out]
    if targets is not None and len(targets) != len(given):
        raise InputError(f"out: {len(targets)} buffers for {len(given)} tensors; one a tensor is needed")
    items: list[_Prepared] = []
    for i, (tensor, s) in enumerate(zip(given, scales)):
        try:
            items.append(_prepare(tensor, bits, s, signed, chunk_elements, threads))
            if codec != "auto":
                _check_takes(codec, items[-1].kind)
        except InputError as e:
            raise InputError(f"tensor {i}: {e}") from None

    def run(name: str, some: list[_Prepared], to: list[Any] | None = None) -> list[Any]:
        return list(
            _codec.encode_many(
                [(p.array, p.dtype, p.bits, p.signed, p.scale, p.channels_last, p.torch) for p in some],
                name,
                {k: int(x) for k, x in (options or {}).items()},
                chunk_elements,
                threads,
                to,
            )
        )

    if not items:
        return []
    if codec != "auto":
        sizes = run(codec, items, targets)
        return sizes if targets is None else [t[:n] for t, n in zip(targets, sizes) if t is not None]
    best: list[bytes | None] = [None] * len(items)
    tried = [_candidates(p, options, min_speed) for p in items]
    for name in registry.codecs():
        able = [i for i, names in enumerate(tried) if name in names]
        for i, blob in zip(able, run(name, [items[i] for i in able])):
            old = best[i]
            if old is None or len(blob) < len(old):
                best[i] = blob
    blobs = [b for b in best if b is not None]
    return blobs if targets is None else [_put(b, t) for b, t in zip(blobs, targets) if t is not None]


@dataclass
class _Prepared:
    """What the native codec is given of one tensor; ``kind`` is ``integers`` or the floating-point dtype."""

    array: np.ndarray[Any, Any]
    dtype: str
    bits: int
    signed: bool
    scale: float | None
    channels_last: bool
    torch: bool
    kind: str


def _prepare(
    tensor: Any,
    bits: int | None,
    scale: float | None,
    signed: bool | None,
    chunk_elements: int,
    threads: int,
) -> _Prepared:
    v = arrays.view(tensor)
    if bits is not None and (not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 16):
        raise InputError(f"bits={bits!r}: an integer from 1 to 16 is needed")
    if not 1 <= chunk_elements <= 2**20:
        raise InputError(f"chunk_elements={chunk_elements}: 1 to {2**20} are possible")
    a = v.array
    quantized = False
    if v.floating and bits is not None:
        if v.dtype == "bfloat16":
            a = _bfloat16_to_float32(a)
        a, scale, is_signed = quantizer.quantize(a, int(bits), scale=scale, signed=signed)
        quantized = True
    elif v.floating:
        if scale is not None or signed is not None:
            raise InputError("scale and signed are for quantized values: give bits as well")
        if v.dtype == "float64":
            raise InputError("float64 is not coded losslessly: convert to float32, or give bits")
        bits, is_signed = 8 * a.itemsize, False
    else:
        if signed is not None:
            raise InputError("signed is for floating-point input; integers say themselves whether they are")
        a, bits, is_signed = _integers(a, bits, threads)
    if scale is not None and not quantized and not 0 < scale < float("inf"):
        raise InputError(f"scale={scale}: a positive finite number is needed")
    kind = v.dtype if v.floating and not quantized else "integers"
    return _Prepared(
        _stored(a, bits, is_signed), v.dtype, int(bits), is_signed, scale, v.channels_last, v.torch, kind
    )


def _check_takes(codec: str, kind: str) -> None:
    if not _takes(registry.get(codec), kind):
        able = [c.name for c in registry.codecs().values() if _takes(c, kind)]
        raise InputError(
            f"codec {codec!r} does not take {kind}; {', '.join(able)} do"
            + ("" if kind == "integers" else ", or give bits=1..16 to quantize")
        )


def _candidates(p: _Prepared, options: Mapping[str, int] | None, min_speed: float) -> list[str]:
    """The codecs that ``auto`` tries: those that take ``p`` and are fast enough."""
    if options:
        raise InputError("options belong to one codec: name it instead of 'auto'")
    wide = p.bits > 8
    names = [
        c.name
        for c in registry.codecs().values()
        if _takes(c, p.kind) and min(c.encode_gbps[wide], c.decode_gbps[wide]) >= min_speed
    ]
    if not names:
        raise InputError(f"no codec has a nominal speed of {min_speed} GB/s: ask for less")
    return names


def _put(blob: bytes, target: memoryview) -> memoryview:
    if len(blob) > len(target):
        raise InputError(f"the blob has {len(blob)} bytes, the memory given for it {len(target)}")
    target[: len(blob)] = blob
    return target[: len(blob)]


def _writable(out: Any) -> memoryview | None:
    """A view of the caller's buffer as bytes, or None."""
    if out is None:
        return None
    try:
        view = memoryview(out).cast("B")
    except TypeError as e:
        raise InputError(f"out must be a contiguous writable buffer: {e}") from None
    if view.readonly:
        raise InputError("out must be writable")
    return view


def _takes(c: registry.CodecInfo, kind: str) -> bool:
    return c.integers if kind == "integers" else kind in c.floats


def _bfloat16_to_float32(patterns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bfloat16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint16 patterns of finite float32 numbers, rounded to nearest even."""
    u = x.view(np.uint32)
    return ((u + (((u >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def _integers(
    a: np.ndarray[Any, Any], bits: int | None, threads: int
) -> tuple[np.ndarray[Any, Any], int, bool]:
    """The array, how many bits its values have and whether they are signed."""
    if a.dtype == np.bool_:
        return a.view(np.uint8), 1 if bits is None else min(int(bits), 1), False
    unsigned = a.dtype.kind == "u"
    if unsigned and a.itemsize <= 2 and (bits is None or bits >= 8 * a.itemsize):
        return a, 8 * a.itemsize, False
    if a.itemsize <= 2:
        low, high = _codec.value_range(a, not unsigned, threads)
    else:
        low, high = min(int(a.min()), 0), max(int(a.max()), 0)
    is_signed = low < 0
    need = max(high.bit_length(), (-low - 1).bit_length()) + 1 if is_signed else max(high.bit_length(), 1)
    if need > 16:
        raise InputError(f"values from {low} to {high} need {need} bits: at most 16 can be coded")
    most = 8 * a.itemsize - (not unsigned and not is_signed)
    if bits is None:
        bits = need if a.itemsize > 2 else most
    if need > bits:
        raise InputError(f"bits={bits}, but values from {low} to {high} need {need}")
    return a, min(int(bits), most), is_signed


def _stored(a: np.ndarray[Any, Any], bits: int, is_signed: bool) -> np.ndarray[Any, Any]:
    """The elements in the width that the native codec expects for ``bits``; shared where that is theirs already."""
    want = _UINT32 if bits > 16 else quantizer.storage(bits, is_signed)
    if a.dtype == want:
        return a
    return a.view(want) if a.dtype.itemsize == want.itemsize else a.astype(want)


@dataclass(frozen=True)
class Info:
    """What a blob's header says.

    ``shape`` is the array's, ``dtype`` what :func:`decode` returns; ``bits``/``signed`` are those of the coded
    integers, ``scale`` the quantizer's step or None. ``chunk_shape`` is (planes, rows, columns).
    """

    version: int
    codec: str
    dtype: str
    bits: int
    signed: bool
    scale: float | None
    zero: int
    shape: tuple[int, ...]
    channels_last: bool
    from_torch: bool
    elements: int
    chunk_shape: tuple[int, int, int]
    chunk_bytes: tuple[int, ...]
    header_bytes: int
    params: bytes = field(repr=False)

    @property
    def total_bytes(self) -> int:
        """Length of the blob."""
        return self.header_bytes + sum(self.chunk_bytes)

    @property
    def bits_per_element(self) -> float:
        """Bits of the blob, header included, per element."""
        return 8 * self.total_bytes / max(self.elements, 1)

    @property
    def gain_float32(self) -> float:
        """Compression gain: bits of the float32 array / bits of the blob, header included."""
        return 32 / self.bits_per_element

    @property
    def gain(self) -> float:
        """Compression gain against the q-bit array."""
        return self.bits / self.bits_per_element

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        d = asdict(self)
        d["params"] = self.params.hex()
        d |= {"total_bytes": self.total_bytes, "bits_per_element": self.bits_per_element}
        d |= {"gain": self.gain, "gain_float32": self.gain_float32}
        return d


def inspect(blob: Any) -> Info:
    """What the header of a blob says; only the header is read and checked.

    Raises:
        CodecError: the header is damaged or of an unknown version.
    """
    return _info(_header(blob))


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in the map (as planes x rows x columns) and in the blob."""

    index: int
    offset: int
    bytes: int
    first_plane: int
    first_row: int
    first_col: int
    planes: int
    rows: int
    cols: int

    @property
    def bits_per_element(self) -> float:
        """Bits of the chunk's payload per element."""
        return 8 * self.bytes / (self.planes * self.rows * self.cols)


def chunks(blob: Any) -> list[Chunk]:
    """The chunks of a blob, in order; see ``decode(blob, chunks=...)``."""
    h = _header(blob)
    sizes, offsets = h.chunk_sizes, h.chunk_offsets
    return [Chunk(i, offsets[i], sizes[i], *h.box(i)) for i in range(len(sizes))]


def _header(blob: Any) -> Any:
    _check_buffer(blob)
    return _codec.parse_header(blob)


def _check_buffer(blob: Any) -> None:
    try:
        memoryview(blob)
    except TypeError:
        raise InputError(f"a blob is bytes or a buffer, not {type(blob).__name__}") from None


def _info(h: Any) -> Info:
    d = h.describe()
    return Info(
        version=d["version"],
        codec=d["codec"],
        dtype=d["dtype"],
        bits=d["bits"],
        signed=d["signed"],
        scale=d["scale"],
        zero=d["zero"],
        shape=tuple(d["shape"]),
        channels_last=d["channels_last"],
        from_torch=d["from_torch"],
        elements=d["elements"],
        chunk_shape=d["chunk_shape"],
        chunk_bytes=tuple(h.chunk_sizes),
        header_bytes=d["header_bytes"],
        params=d["params"],
    )


def decode(
    blob: Any,
    *,
    chunks: Iterable[int] | None = None,
    channels: slice | int | None = None,
    rows: slice | int | None = None,
    dequantize: bool = True,
    framework: str | None = None,
    verify: bool = True,
    threads: int = 0,
) -> Any:
    """The array in ``blob`` (bytes or any buffer), as :func:`encode` was given it.

    Args:
        chunks: decode only these chunks; returns a list of arrays of shape (planes, rows, columns).
        channels: decode only these channels (axis -3), reading only the chunks that hold them. A slice with
            step 1 keeps the axis, a number drops it.
        rows: the same for rows (axis -2).
        dequantize: give quantized maps back as floating point; False gives the integers.
        framework: ``"numpy"``, ``"torch"``, or None for what was encoded (numpy where torch is missing).
        verify: check the checksums of the chunks that are read.
        threads: 0 for all.

    Raises:
        CodecError: the blob is damaged; the message names the byte, chunk or bit.
        InputError: a chunk, channel or row that does not exist.
    """
    h = _header(blob)
    info = _info(h)
    framework = _framework(framework, info)
    try:
        if chunks is not None:
            if channels is not None or rows is not None:
                raise InputError("give chunks, or channels and rows, not both")
            ids = [_index(i, len(info.chunk_bytes), "chunk") for i in chunks]
            parts = _read(h, info, blob, ids, verify, threads)
            return [_finish(p, info, dequantize, framework) for p in parts]
        if channels is not None or rows is not None:
            a = _region(h, info, blob, channels, rows, verify, threads)
        else:
            a = arrays.empty(info.shape, _coded_dtype(info), info.channels_last)
            _codec.decode(blob, h, a, verify, threads)
    except MemoryError:
        raise CodecError(f"the blob claims shape {info.shape}: there is not so much memory") from None
    return _finish(a, info, dequantize, framework)


def decode_many(
    blobs: Iterable[Any],
    *,
    dequantize: bool = True,
    framework: str | None = None,
    verify: bool = True,
    threads: int = 0,
) -> list[Any]:
    """The arrays in many blobs, as :func:`decode` gives them, each blob by one thread; see :func:`encode_many`.

    Raises:
        CodecError: a blob is damaged; the message names the blob and the byte, chunk or bit.
        InputError: something that is no buffer, with its number; an unknown ``framework``.
    """
    data = _listed(blobs, "blobs")
    headers, infos, outs = [], [], []
    for i, blob in enumerate(data):
        try:
            headers.append(_header(blob))
            infos.append(_info(headers[-1]))
            outs.append(arrays.empty(infos[-1].shape, _coded_dtype(infos[-1]), infos[-1].channels_last))
        except MemoryError:
            raise CodecError(
                f"blob {i} claims shape {infos[-1].shape}: there is not so much memory"
            ) from None
        except (CodecError, InputError) as e:
            raise type(e)(f"blob {i}: {e}") from None
    wanted = [_framework(framework, info) for info in infos]
    if data:
        _codec.decode_many(data, headers, outs, verify, threads)
    return [_finish(a, info, dequantize, f) for a, info, f in zip(outs, infos, wanted)]


def _listed(values: Iterable[Any], what: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{what}: several are needed, in a list, not {type(values).__name__}") from None


def _framework(framework: str | None, info: Info) -> str:
    if framework is None:
        return "torch" if info.from_torch and arrays.has_torch() else "numpy"
    if framework not in ("numpy", "torch"):
        raise InputError(f"framework={framework!r}: 'numpy' or 'torch' is possible")
    return framework


def _coded_dtype(info: Info) -> np.dtype[Any]:
    return _UINT32 if info.bits > 16 else quantizer.storage(info.bits, info.signed)


def _index(i: Any, n: int, what: str) -> int:
    number = int(i)
    if not -n <= number < n:
        raise InputError(f"{what} {number}: there are {n}")
    return number % n


def _read(
    h: Any, info: Info, blob: Any, ids: list[int], verify: bool, threads: int
) -> list[np.ndarray[Any, Any]]:
    """The chunks ``ids`` as arrays of (planes, rows, columns)."""
    offsets = h.chunk_offsets
    data = memoryview(blob).cast("B")
    payloads = [data[offsets[i] : offsets[i + 1]] for i in ids]
    shapes = [h.box(i)[3:] for i in ids]
    outs = [np.empty(int(np.prod(s)), _coded_dtype(info)) for s in shapes]
    _codec.decode_chunks(h, ids, payloads, outs, verify, threads)
    return [o.reshape(s) for o, s in zip(outs, shapes)]


def _range(which: slice | int | None, n: int, axis: str) -> tuple[int, int]:
    if which is None:
        return 0, n
    if isinstance(which, slice):
        start, stop, step = which.indices(n)
        if step != 1:
            raise InputError(f"{axis}: a slice with step 1 is needed")
        return start, max(start, stop)
    i = _index(which, n, axis)
    return i, i + 1


def _region(
    h: Any,
    info: Info,
    blob: Any,
    channels: slice | int | None,
    rows: slice | int | None,
    verify: bool,
    threads: int,
) -> np.ndarray[Any, Any]:
    """Channels and rows of the map, from the chunks that hold them and no others."""
    shape = info.shape
    if channels is not None and len(shape) < 3:
        raise InputError(f"channels: the map has shape {shape}, channels need three dimensions")
    if rows is not None and len(shape) < 2:
        raise InputError(f"rows: the map has shape {shape}, rows need two dimensions")
    n_rows, n_cols = (1, 1, *shape)[-2:]
    n_channels = shape[-3] if len(shape) >= 3 else 1
    c0, c1 = _range(channels, n_channels, "channels")
    r0, r1 = _range(rows, n_rows, "rows")
    images = info.elements // (n_channels * n_rows * n_cols)
    out = np.empty((images, c1 - c0, r1 - r0, n_cols), _coded_dtype(info))
    if out.size:
        cp, cr, cc = info.chunk_shape
        per_plane = -(-n_rows // cr) * -(-n_cols // cc)
        wanted: list[int] = []
        for image in range(images):
            first, last = image * n_channels + c0, image * n_channels + c1 - 1
            for group in range(first // cp, last // cp + 1):
                per_row = -(-n_cols // cc)
                begin, end = r0 // cr * per_row, ((r1 - 1) // cr + 1) * per_row
                wanted.extend(range(group * per_plane + begin, group * per_plane + end))
        wanted = sorted(set(wanted))
        for i, part in zip(wanted, _read(h, info, blob, wanted, verify, threads)):
            p0, row, col, planes, height, width = h.box(i)
            top, bottom = max(row, r0), min(row + height, r1)
            for j in range(planes):
                image, c = divmod(p0 + j, n_channels)
                if c0 <= c < c1:
                    out[image, c - c0, top - r0 : bottom - r0, col : col + width] = part[
                        j, top - row : bottom - row
                    ]
    full = list(shape)
    if len(shape) >= 2:
        full[-2] = r1 - r0
    if len(shape) >= 3:
        full[-3] = c1 - c0
    if isinstance(rows, (int, np.integer)):
        del full[-2]
    if isinstance(channels, (int, np.integer)):
        del full[-3 if rows is None or isinstance(rows, slice) else -2]
    return out.reshape(full)


def _finish(a: np.ndarray[Any, Any], info: Info, dequantize: bool, framework: str) -> Any:
    """Symbols as the caller wants them: dequantized, in the dtype of the header, numpy or torch."""
    name = info.dtype
    if info.scale is not None and name in ("float16", "bfloat16", "float32", "float64"):
        if dequantize:
            with np.errstate(over="ignore"):
                x = quantizer.dequantize(a, info.scale, info.zero)
            with np.errstate(over="ignore"):
                a = _float32_to_bfloat16(x) if name == "bfloat16" else x.astype(name, copy=False)
        else:
            name = a.dtype.name
    elif name == "bool":
        a = a.view(np.bool_)
    elif name == "float16":
        a = a.view(np.float16)
    elif name == "float32":
        a = a.view(np.float32)
    elif name != "bfloat16" and a.dtype != np.dtype(name):
        same = a.dtype.itemsize == np.dtype(name).itemsize
        a = a.view(name) if same else a.astype(name)
    if framework == "torch":
        return arrays.to_torch(a, name)
    return a.view(arrays.to_numpy_dtype(name)) if name == "bfloat16" else a
