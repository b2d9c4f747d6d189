"""Maps of a cut to frames and back: :class:`MapCoder` frame by frame, :class:`Sender` and
:class:`Receiver` as a stream in which a frame may be predicted from the one before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actzip.checks import one_of, shown, whole
from actzip.codec import available, decode, encode, inspect
from actzip.errors import CodecError, DataError, InputError, StreamError
from actzip.split.frames import Frame, pack, unpack
from actzip.split.quantizer import Floats, MapQuantizer

__all__ = ["MapCoder", "Receiver", "Sender"]

_FORMAT = 1
_SAMPLE = 7  # every seventh element says whether a difference is cheaper


class MapCoder:
    """Codes the maps that cross a cut, and decodes them; both sides have the same one.

    Args:
        quantizers: one a map. codec: a name of :func:`actzip.codec.available`, of those for
            integers, or ``auto``.
        most: inputs a frame may hold at most, which bounds the memory that decoding takes.
    """

    def __init__(self, quantizers: Sequence[MapQuantizer], codec: str = "rans", *, most: int = 256) -> None:
        self.quantizers = list(quantizers)
        self.codec = one_of(codec, "codec", available())
        self.most = whole(most, "most", 1, 2**20)
        text = json.dumps([q.to_dict() for q in self.quantizers], sort_keys=True)
        self.mark = hashlib.sha256(f"{_FORMAT}{text}".encode()).digest()[:8]

    def encode(self, maps: Any) -> bytes:
        """The frame of a cut's maps (one tensor or array (N, C, ...), or several), by itself.

        Raises:
            InputError: other maps than the cut's, values that are not finite.
        """
        coded = [(False, self._blob(q, q.bits)) for q in self._integers(maps)]
        return pack(Frame(self.mark, 0, True, tuple((p, b) for p, b in coded)))

    def decode(self, data: bytes | bytearray | memoryview) -> list[Floats]:
        """The maps of a frame that stands by itself.

        Raises:
            CodecError: damaged, cut off, of another version, of another split. StreamError: it
                needs the frame before.
        """
        frame = self.open(data)
        if not frame.key:
            raise StreamError(f"frame {frame.sequence} needs the one before it: decode it with a Receiver")
        return self.values(self.read(frame, None))

    # -- parts, for streams

    def _integers(self, maps: Any) -> list[_Coded]:
        given = list(maps) if isinstance(maps, (tuple, list)) else [maps]
        if len(given) != len(self.quantizers):
            raise InputError(f"{len(given)} maps given; {len(self.quantizers)} cross this cut")
        found = [_Coded(q.integers(m), q.bits) for q, m in zip(self.quantizers, given, strict=True)]
        batches = {len(c.array) for c in found}
        if len(batches) != 1 or not 1 <= min(batches) <= self.most:
            raise InputError(f"maps of {shown(sorted(batches))} inputs; a frame holds 1 to {self.most}")
        return found

    def _blob(self, coded: _Coded, bits: int) -> bytes:
        return bytes(encode(coded.array, self.codec, bits, threads=1))

    def open(self, data: bytes | bytearray | memoryview) -> Frame:
        """A frame of this split, its checksum compared."""
        frame = unpack(data)
        if frame.mark != self.mark:
            raise CodecError(
                f"the frame is of another split ({frame.mark.hex()}; this tail takes {self.mark.hex()}): "
                "head and tail must come from one `actzip split`"
            )
        if len(frame.maps) != len(self.quantizers):
            raise CodecError(f"the frame has {len(frame.maps)} maps; {len(self.quantizers)} cross this cut")
        return frame

    def read(self, frame: Frame, before: list[NDArray[Any]] | None) -> list[NDArray[Any]]:
        """The integers of a frame's maps."""
        found: list[NDArray[Any]] = []
        for i, (quantizer, (predicted, blob)) in enumerate(zip(self.quantizers, frame.maps, strict=True)):
            if predicted and (before is None or frame.key):
                raise StreamError(f"map {quantizer.name!r} is predicted from a frame that is not there")
            found.append(self._decoded(quantizer, blob, before[i] if predicted and before else None))
        if len({len(q) for q in found}) != 1:
            raise CodecError("the frame's maps are of unlike numbers of inputs")
        return found

    def _decoded(
        self, quantizer: MapQuantizer, blob: bytes | memoryview, before: NDArray[Any] | None
    ) -> NDArray[Any]:
        info = inspect(blob)
        shape = tuple(info.shape)
        want = np.dtype(np.int8) if before is not None else quantizer.dtype
        if shape[1:] != quantizer.shape or not shape or not 1 <= shape[0] <= self.most:
            raise CodecError(
                f"map {quantizer.name!r} has shape {shape}, not (N, {', '.join(map(str, quantizer.shape))}) "
                f"with N from 1 to {self.most}"
            )
        if str(info.dtype) != str(want) or info.bits > quantizer.bits:
            raise CodecError(f"map {quantizer.name!r} is {info.dtype} of {info.bits} bits, not {want}")
        q: NDArray[Any] = decode(blob, threads=1)
        if before is None:
            return q
        if before.shape != q.shape:
            raise StreamError(f"map {quantizer.name!r} is the difference to one of another batch")
        return _wrapped(before.astype(np.int16) + q, quantizer)

    def values(self, integers: Sequence[NDArray[Any]]) -> list[Floats]:
        """float32 maps of integers."""
        return [q.values(a) for q, a in zip(self.quantizers, integers, strict=True)]

    def sender(self, *, key_every: int = 60) -> Sender:
        """A stream's sending end; a frame in ``key_every`` stands by itself."""
        return Sender(self, key_every)

    def receiver(self) -> Receiver:
        """A stream's receiving end."""
        return Receiver(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_dict` gives the coder back."""
        return {
            "format": _FORMAT,
            "codec": self.codec,
            "most": self.most,
            "maps": [q.to_dict() for q in self.quantizers],
        }

    @classmethod
    def from_dict(cls, data: Any) -> MapCoder:
        """
        Raises:
            DataError: not what :meth:`to_dict` gives, or of a newer version.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("format"), int):
            raise DataError("the description of a split network is damaged")
        if data["format"] > _FORMAT:
            raise DataError(
                f"the split is of format {data['format']}, of a newer actzip; this one reads up to {_FORMAT}"
            )
        try:
            maps = [MapQuantizer.from_dict(m) for m in data["maps"]]
            return cls(maps, str(data["codec"]), most=int(data["most"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the description of a split network is damaged: {error}") from error


class _Coded:
    """Integers and how many bits they have."""

    def __init__(self, array: NDArray[Any], bits: int) -> None:
        self.array, self.bits = array, bits


def _wrapped(q: NDArray[Any], quantizer: MapQuantizer) -> NDArray[Any]:
    """Integers modulo 2 to the bits, in the quantizer's range."""
    size = 1 << quantizer.bits
    q = q & (size - 1)
    if quantizer.signed:
        q = q - size * (q >= size // 2)
    wrapped: NDArray[Any] = q.astype(quantizer.dtype)
    return wrapped


def _difference(q: NDArray[Any], before: NDArray[Any], bits: int) -> NDArray[Any]:
    """The difference modulo 2 to the bits, as signed integers of so many."""
    size = 1 << bits
    d: NDArray[np.int16] = (q.astype(np.int16) - before) & (size - 1)
    return np.asarray(d - size * (d >= size // 2), np.int8)


def _entropy(q: NDArray[Any]) -> float:
    """Bits an element, of a sample."""
    counts = np.bincount(q.reshape(-1)[::_SAMPLE].view(np.uint8))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


class Sender:
    """One client's stream: each map as it is, or as the difference to the frame before where that
    is cheaper. The first frame, one in ``key_every``, and the one after :meth:`key` stand alone."""

    def __init__(self, coder: MapCoder, key_every: int) -> None:
        self.coder = coder
        self.key_every = whole(key_every, "key_every", 1, 2**31)
        self.sequence = 0
        self._since = 0
        self._before: list[NDArray[Any]] | None = None

    def key(self) -> None:
        """The next frame stands by itself: the receiver asked for one, or lost some."""
        self._before = None

    def encode(self, maps: Any) -> bytes:
        """The next frame.

        Raises:
            InputError: as :meth:`MapCoder.encode`.
        """
        coded = self.coder._integers(maps)
        same = self._before is not None and len(self._before[0]) == len(coded[0].array)
        key = not same or self._since >= self.key_every
        rows = []
        for i, c in enumerate(coded):
            row = (False, c.array)
            if not key and self._before is not None and c.bits > 1:
                d = _difference(c.array, self._before[i], c.bits)
                row = (True, d) if _entropy(d) < _entropy(c.array) else row
            rows.append((row[0], self.coder._blob(_Coded(row[1], c.bits), c.bits)))
        frame = pack(Frame(self.coder.mark, self.sequence, key, tuple(rows)))
        self.sequence = (self.sequence + 1) % 2**32
        self._since = 1 if key else self._since + 1
        self._before = [c.array for c in coded]
        return frame


class Receiver:
    """The other end of a :class:`Sender`: frames in order, none left out."""

    def __init__(self, coder: MapCoder) -> None:
        self.coder = coder
        self.expected: int | None = None
        self._before: list[NDArray[Any]] | None = None

    def decode(self, data: bytes | bytearray | memoryview) -> list[Floats]:
        """The maps of the next frame. A key frame may follow on any; after an error a stream goes
        on with one.

        Raises:
            StreamError: a frame was lost, came twice or out of order. CodecError: a damaged frame
                (the stream is as it was before), one of another split.
        """
        frame = self.coder.open(data)
        if not frame.key and frame.sequence != self.expected:
            raise StreamError(self._lost(frame.sequence))
        if frame.key and self.expected is not None and self._old(frame.sequence):
            raise StreamError(f"frame {frame.sequence} came late: frame {self.expected} was expected")
        integers = self.coder.read(frame, self._before)
        self._before, self.expected = integers, (frame.sequence + 1) % 2**32
        return self.coder.values(integers)

    def snapshot(self) -> bytes:
        """A key frame that :meth:`restore` brings another receiver with to where this one is.

        Raises:
            StreamError: no frame has come yet.
        """
        if self._before is None or self.expected is None:
            raise StreamError("the stream has no frame yet")
        pairs = zip(self._before, self.coder.quantizers, strict=True)
        blobs = tuple((False, bytes(encode(a, "zvc", q.bits, threads=1))) for a, q in pairs)
        return pack(Frame(self.coder.mark, (self.expected - 1) % 2**32, True, blobs))

    def restore(self, snapshot: bytes | bytearray | memoryview) -> None:
        """Goes on where the receiver was whose :meth:`snapshot` this is.

        Raises:
            CodecError: it is damaged, or of another split.
        """
        frame = self.coder.open(snapshot)
        self._before, self.expected = self.coder.read(frame, None), (frame.sequence + 1) % 2**32

    def _old(self, sequence: int) -> bool:
        """Whether it is one of those just before what is expected."""
        return self.expected is not None and 0 < (self.expected - sequence) % 2**32 <= 64 and sequence > 0

    def _lost(self, sequence: int) -> str:
        if self.expected is None:
            return (
                f"the stream begins with frame {sequence}, which needs the one before: a key frame is needed"
            )
        if self._old(sequence):
            return f"frame {sequence} came twice or late: frame {self.expected} was expected"
        lost = (sequence - self.expected) % 2**32
        return f"frame {self.expected} was expected, {sequence} came: {lost} lost; ask for a key frame"
