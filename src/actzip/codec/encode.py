"""Arrays to self-describing blobs: :func:`encode`, and :func:`encode_many` for many at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from actzip._native import _codec
from actzip.checks import flag, number, shown, whole
from actzip.codec import arrays, quantizer, registry
from actzip.errors import InputError

__all__ = ["encode", "encode_many"]


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
    """The blob of ``tensor``: every element comes back from :func:`decode` exactly, unless ``bits``
    quantizes.

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
            the part used. With about three times the size of the q-bit tensor, nothing is copied or
            allocated.

    Returns:
        ``bytes``, or a ``memoryview`` of ``out``.

    Raises:
        InputError: a dtype or shape that cannot be coded, values that do not fit, an unknown codec or option.

    >>> import numpy as np
    >>> from actzip.codec import decode
    >>> blob = encode(np.array([[0, 0, 3], [1, 0, 0]], np.uint8), codec="seg", bits=2)
    >>> decode(blob)
    array([[0, 0, 3],
           [1, 0, 0]], dtype=uint8)
    """
    given = _settings(codec, bits, signed, options, min_speed, chunk_elements, threads)
    p = _prepare(tensor, bits, scale, signed, threads)

    def run(name: str, opts: dict[str, int], to: Any = None) -> Any:
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
            options=opts,
            chunk_elements=chunk_elements,
            threads=threads,
            out=to,
        )

    if codec != "auto":
        _check_takes(codec, p.kind)
        view = _writable(out)
        if view is not None:
            return view[: int(run(codec, given, view))]
        blob: bytes = run(codec, given)
        return blob
    best: bytes | None = None
    for name in _candidates(p, given, min_speed):
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
    """The blobs of many tensors, as :func:`encode` makes them, each map by one thread: threads need
    not agree on anything.

    That is what scales where one map is too small to be shared among threads (below a megabyte).
    Maps that are too large for the work to be shared out by maps are encoded by all threads
    together. The bytes are those of :func:`encode`.

    Args:
        tensors: as for :func:`encode`; shapes and dtypes may differ.
        scale: one for all, or one a tensor (None: by its greatest magnitude).
        threads: 0 for all. Floating point is quantized by one thread.
        out: a writable buffer a tensor; the result is then views of the parts used.
        codec, bits, signed, options, min_speed, chunk_elements: see :func:`encode`. ``auto``
            chooses for each tensor.

    Returns:
        A list of ``bytes``, or of ``memoryview``.

    Raises:
        InputError: as :func:`encode`, with the number of the tensor; another number of scales or
            buffers than of tensors.

    >>> import numpy as np
    >>> from actzip.codec import decode_many
    >>> maps = [np.array([0, 3, 0], np.uint8), np.array([[1], [0]], np.uint8)]
    >>> decode_many(encode_many(maps, codec="seg", bits=2))
    [array([0, 3, 0], dtype=uint8), array([[1],
           [0]], dtype=uint8)]
    """
    opts = _settings(codec, bits, signed, options, min_speed, chunk_elements, threads)
    given = arrays.listed(tensors, "tensors")
    some: Any = scale
    several = isinstance(some, (list, tuple)) or (isinstance(some, np.ndarray) and some.ndim > 0)
    scales = list(some) if several else [some] * len(given)
    if len(scales) != len(given):
        raise InputError(f"scale: {len(scales)} for {len(given)} tensors; give one a tensor, or one for all")
    targets = None if out is None else [_writable(o) for o in arrays.listed(out, "out")]
    if targets is not None and len(targets) != len(given):
        raise InputError(f"out: {len(targets)} buffers for {len(given)} tensors; one a tensor is needed")
    items: list[_Prepared] = []
    for i, (tensor, s) in enumerate(zip(given, scales)):
        try:
            items.append(_prepare(tensor, bits, s, signed, threads))
            if codec != "auto":
                _check_takes(codec, items[-1].kind)
        except InputError as e:
            raise InputError(f"tensor {i}: {e}") from None

    def run(name: str, some: list[_Prepared], to: list[Any] | None = None) -> list[Any]:
        return list(
            _codec.encode_many(
                [(p.array, p.dtype, p.bits, p.signed, p.scale, p.channels_last, p.torch) for p in some],
                name,
                opts,
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
    tried = [_candidates(p, opts, min_speed) for p in items]
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
    threads: int,
) -> _Prepared:
    v = arrays.view(tensor)
    if scale is not None:
        quantizer.as_step(number(scale, "scale", 0, above=True))
    a = v.array
    quantized = False
    if v.floating and bits is not None:
        if v.dtype == "bfloat16":
            a = arrays.bfloat16_to_float32(a)
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
    kind = v.dtype if v.floating and not quantized else "integers"
    return _Prepared(
        _stored(a, bits, is_signed), v.dtype, int(bits), is_signed, scale, v.channels_last, v.torch, kind
    )


def _settings(
    codec: str,
    bits: int | None,
    signed: bool | None,
    options: Mapping[str, int] | None,
    min_speed: float,
    chunk_elements: int,
    threads: int,
) -> dict[str, int]:
    """The options, after checking all that does not depend on the tensor."""
    if not isinstance(codec, str) or codec != "auto":
        registry.get(codec)
    if bits is not None:
        whole(bits, "bits", 1, 16)
    if signed is not None:
        flag(signed, "signed")
    number(min_speed, "min_speed", 0, finite=False)
    whole(chunk_elements, "chunk_elements", 1, 2**20)
    whole(threads, "threads", 0, 2**31 - 1)
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(k, str) for k in options):
        raise InputError(f"options must be a mapping from names to whole numbers, not {shown(options)}")
    return {k: whole(x, f"option {k!r}", -(2**31), 2**31 - 1) for k, x in options.items()}


def _check_takes(codec: str, kind: str) -> None:
    if not registry.get(codec).takes(kind):
        able = [c.name for c in registry.codecs().values() if c.takes(kind)]
        raise InputError(
            f"codec {codec!r} does not take {kind}; {', '.join(able)} do"
            + ("" if kind == "integers" else ", or give bits=1..16 to quantize")
        )


def _candidates(p: _Prepared, options: Mapping[str, int], min_speed: float) -> list[str]:
    """The codecs that ``auto`` tries: those that take ``p`` and are fast enough."""
    if options:
        raise InputError("options belong to one codec: name it instead of 'auto'")
    wide = p.bits > 8
    names = [
        c.name
        for c in registry.codecs().values()
        if c.takes(p.kind) and min(c.encode_gbps[wide], c.decode_gbps[wide]) >= min_speed
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
    except (TypeError, ValueError) as e:
        raise InputError(f"out must be a contiguous writable buffer: {e}") from None
    if view.readonly:
        raise InputError("out must be writable")
    return view


def _integers(
    a: np.ndarray[Any, Any], bits: int | None, threads: int
) -> tuple[np.ndarray[Any, Any], int, bool]:
    """The array, how many bits its values have and whether they are signed."""
    if a.dtype == np.bool_:
        return _canonical(a), 1 if bits is None else min(int(bits), 1), False
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


def _canonical(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Truth values as 0 and 1: foreign memory may hold any byte that is not 0 for True."""
    raw = a.view(np.uint8)
    return raw if int(raw.max()) <= 1 else (raw != 0).view(np.uint8)


def _stored(a: np.ndarray[Any, Any], bits: int, is_signed: bool) -> np.ndarray[Any, Any]:
    """The elements in the width that the native codec expects for ``bits``; shared where that is
    theirs already."""
    want = quantizer.storage(bits, is_signed)
    if a.dtype == want:
        return a
    return a.view(want) if a.dtype.itemsize == want.itemsize else a.astype(want)
