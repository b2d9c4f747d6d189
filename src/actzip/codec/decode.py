"""Blobs to arrays, whole or in part: :func:`decode`, and :func:`decode_many` for many at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from actzip._native import _codec
from actzip.checks import flag, one_of, shown, whole
from actzip.codec import arrays, quantizer
from actzip.codec.info import Info, info_of, read_header
from actzip.errors import CodecError, InputError

__all__ = ["decode", "decode_many"]


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
    _check_flags(dequantize, verify, threads)
    h = read_header(blob)
    info = info_of(h)
    framework = _framework(framework, info)
    try:
        if chunks is not None:
            if channels is not None or rows is not None:
                raise InputError("give chunks, or channels and rows, not both")
            ids = [_index(i, len(info.chunk_bytes), "chunk") for i in arrays.listed(chunks, "chunks")]
            parts = _read(h, info, blob, ids, verify, threads)
            return [_finish(p, info, dequantize, framework) for p in parts]
        if channels is not None or rows is not None:
            a = _region(h, info, blob, channels, rows, verify, threads)
        else:
            a = arrays.empty(info.shape, quantizer.storage(info.bits, info.signed), info.channels_last)
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
    """The arrays in many blobs, as :func:`decode` gives them, each blob by one thread; see
    :func:`encode_many`.

    Raises:
        CodecError: a blob is damaged; the message names the blob and the byte, chunk or bit.
        InputError: something that is no buffer, with its number; an unknown ``framework``.
    """
    _check_flags(dequantize, verify, threads)
    data = arrays.listed(blobs, "blobs")
    headers, infos, outs = [], [], []
    for i, blob in enumerate(data):
        try:
            headers.append(read_header(blob))
            infos.append(info_of(headers[-1]))
            outs.append(
                arrays.empty(
                    infos[-1].shape,
                    quantizer.storage(infos[-1].bits, infos[-1].signed),
                    infos[-1].channels_last,
                )
            )
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


def _framework(framework: str | None, info: Info) -> str:
    if framework is None:
        return "torch" if info.from_torch and arrays.has_torch() else "numpy"
    return one_of(framework, "framework", ("numpy", "torch"))


def _check_flags(dequantize: bool, verify: bool, threads: int) -> None:
    flag(dequantize, "dequantize")
    flag(verify, "verify")
    whole(threads, "threads", 0, 2**31 - 1)


def _index(i: Any, n: int, what: str) -> int:
    if not isinstance(i, (int, np.integer)) or isinstance(i, bool):
        raise InputError(f"{what} must be a whole number, not {shown(i)}")
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
    outs = [np.empty(int(np.prod(s)), quantizer.storage(info.bits, info.signed)) for s in shapes]
    _codec.decode_chunks(h, ids, payloads, outs, verify, threads)
    return [o.reshape(s) for o, s in zip(outs, shapes)]


def _range(which: slice | int | None, n: int, axis: str) -> tuple[int, int]:
    if which is None:
        return 0, n
    if isinstance(which, slice):
        try:
            start, stop, step = which.indices(n)
        except (TypeError, ValueError) as e:
            raise InputError(f"{axis}: {which} is no slice of whole numbers: {e}") from None
        if step != 1:
            raise InputError(f"{axis}: a slice with step 1 is needed")
        return start, max(start, stop)
    if not isinstance(which, (int, np.integer)):
        raise InputError(f"{axis} must be a whole number or a slice, not {shown(which)}")
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
    out = np.empty((images, c1 - c0, r1 - r0, n_cols), quantizer.storage(info.bits, info.signed))
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
                a = arrays.float32_to_bfloat16(x) if name == "bfloat16" else x.astype(name, copy=False)
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
