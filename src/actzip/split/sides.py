"""Head and tail as files: compiled networks with the coder of what crosses, ``head.actzip`` and
``tail.actzip``.

    head = actzip.split.load("head.actzip")     # on the client
    frame = head.encode(x)                      # bytes
    tail = actzip.split.load("tail.actzip")     # on the server
    y = tail(frame)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actzip.errors import DataError, InputError
from actzip.runtime import CompiledModel
from actzip.runtime import load as load_compiled
from actzip.split.coder import MapCoder, Receiver, Sender

__all__ = ["Head", "Tail", "load", "mark_part"]


def mark_part(model: CompiledModel, part: str, coder: MapCoder, at: str = "") -> None:
    """In place: ``model`` is the head or the tail of a split, and carries its coder into its file."""
    model.graph.meta["split"] = {"part": part, "at": at, "coder": coder.to_dict()}


class Head:
    """The client's side: an input to the bytes of a frame.

    Attributes:
        model: the compiled head. coder: of the maps. at: the layer behind which the network is cut.
    """

    def __init__(self, model: CompiledModel, coder: MapCoder, at: str = "") -> None:
        self.model, self.coder, self.at = model, coder, at
        mark_part(model, "head", coder, at)

    def maps(self, x: Any) -> list[Any]:
        """What crosses, not yet coded."""
        out = self.model(x)
        return list(out) if isinstance(out, (tuple, list)) else [out]

    def encode(self, x: Any) -> bytes:
        """The frame of an input (N, C, H, W), by itself.

        Raises:
            InputError: another shape or type than the network's.
        """
        return self.coder.encode(self.maps(x))

    def sender(self, *, key_every: int = 60) -> HeadStream:
        """A stream of frames, each predicted from the one before where that is cheaper."""
        return HeadStream(self, self.coder.sender(key_every=key_every))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file that :func:`load` reads."""
        return self.model.save(path)


class Tail:
    """The server's side: a frame to the network's outputs.

    Attributes:
        model: the compiled tail. coder: of the maps. at: the layer behind which the network is cut.
    """

    def __init__(self, model: CompiledModel, coder: MapCoder, at: str = "") -> None:
        self.model, self.coder, self.at = model, coder, at
        mark_part(model, "tail", coder, at)

    def __call__(self, frame: bytes | bytearray | memoryview) -> Any:
        """The network's outputs (numpy) for a frame that stands by itself.

        Raises:
            CodecError: damaged, cut off, of another version or split. StreamError: it needs the
                frame before.
        """
        return self.run(self.coder.decode(frame))

    def run(self, maps: Sequence[Any]) -> Any:
        """The outputs for decoded maps."""
        return self.model(*maps)

    def receiver(self) -> TailStream:
        """One client's stream."""
        return TailStream(self, self.coder.receiver())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file that :func:`load` reads."""
        return self.model.save(path)


class HeadStream:
    """A client's stream of inputs as frames."""

    def __init__(self, head: Head, sender: Sender) -> None:
        self.head, self.sender = head, sender

    def encode(self, x: Any) -> bytes:
        """The next frame; see :meth:`actzip.split.coder.Sender.encode`."""
        return self.sender.encode(self.head.maps(x))

    def key(self) -> None:
        """The next frame stands by itself."""
        self.sender.key()


class TailStream:
    """The outputs for one client's frames, in order."""

    def __init__(self, tail: Tail, receiver: Receiver) -> None:
        self.tail, self.receiver = tail, receiver

    def __call__(self, frame: bytes | bytearray | memoryview) -> Any:
        """The outputs for the next frame; see :meth:`actzip.split.coder.Receiver.decode`."""
        return self.tail.run(self.receiver.decode(frame))


def load(path: str | os.PathLike[str], *, threads: int | None = None, tune: bool = True) -> Head | Tail:
    """The head or tail in a file of ``actzip split --out``.

    Args:
        threads, tune: as of :func:`actzip.runtime.load`.

    Raises:
        DataError: missing, damaged, written by a newer actzip, or no part of a split network.
    """
    model = load_compiled(path, threads=threads, tune=tune)
    said = model.graph.meta.get("split")
    if said is None:
        raise DataError(
            f"{path} is a compiled network, but no part of a split one: write one with `actzip split --out`"
        )
    try:
        part, at, coder = said["part"], str(said["at"]), MapCoder.from_dict(said["coder"])
        kinds: dict[str, type[Head] | type[Tail]] = {"head": Head, "tail": Tail}
        kind = kinds[part]
        _check(model, coder, part)
    except (KeyError, TypeError, InputError, DataError) as error:
        raise DataError(f"{path}: {error}") from error
    return kind(model, coder, at)


def _check(model: CompiledModel, coder: MapCoder, part: str) -> None:
    """The maps' shapes are the network's."""
    values = model.graph.inputs if part == "tail" else model.graph.outputs
    shapes = [tuple(model.graph.shape(v)[1:]) for v in values]
    if shapes != [q.shape for q in coder.quantizers]:
        raise DataError("the quantizers do not fit the network's maps")


def as_arrays(maps: Any) -> list[Any]:
    """Tensors or arrays, one or several, as numpy arrays."""
    given = maps if isinstance(maps, (tuple, list)) else [maps]
    return [np.asarray(m.detach() if hasattr(m, "detach") else m) for m in given]
