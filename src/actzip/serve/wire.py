"""What goes over the wire: bodies as blobs, files of maps or frames, answers as safetensors or JSON.

Nothing of it is executed: a body is checked against the shapes that the model takes before any of
it is decoded, so that it cannot claim memory either.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.codec import MapWriter, decode, encode, inspect, iter_maps
from actzip.codec.maps import is_map_file
from actzip.errors import CodecError, InputError

if TYPE_CHECKING:
    from actzip.runtime.compiled import CompiledModel
    from actzip.split.coder import MapCoder

__all__ = ["BINARY", "JSON", "PROTOCOL", "STREAM", "Reader", "answer", "body_of", "named"]

#: Sent as the header ``Actzip-Protocol`` by both sides; another one is refused.
PROTOCOL = "1"
#: Header that names the stream which a frame belongs to.
STREAM = "Actzip-Stream"
BINARY = "application/octet-stream"
JSON = "application/json"
_FRAME = b"AZSF"  # how the frames of a split network begin
_MOST_NUMBERS = 100_000  # in an answer as JSON


def body_of(maps: Mapping[str, Any] | Any, **options: Any) -> bytes:
    """A request's body: one blob for one map, a file of maps (``.azm``) for several by name;
    ``options`` are those of :func:`actzip.encode`."""
    if not isinstance(maps, Mapping):
        return bytes(encode(maps, **options))
    file = io.BytesIO()
    with MapWriter(file, **options) as writer:
        for name, value in maps.items():
            writer.add(name, value)
    return file.getvalue()


class Reader:
    """Reads requests for one model.

    Raises:
        DataError: the model's file says that it is part of a split network, wrongly.
    """

    def __init__(self, model: CompiledModel, max_batch: int) -> None:
        self._model, self._max_batch = model, max_batch
        self._coder: MapCoder | None = None
        said = model.graph.meta.get("split")
        if isinstance(said, Mapping) and said.get("part") == "tail":
            from actzip.split.coder import MapCoder

            self._coder = MapCoder.from_dict(said.get("coder"))

    def arrays(self, body: bytes) -> list[Any]:
        """The model's inputs, in its order, out of a request's body.

        Raises:
            CodecError: the body is damaged, cut off, or no blob of this version.
            InputError: maps that are not the model's inputs: names, shapes, types, batch.
            StreamError: a frame that needs the one before it.
        """
        if body[:4] == _FRAME:
            return self._of_frame(body)
        model = self._model
        blobs = _blobs(body, model.graph.inputs)
        batch: int | None = None
        for name in model.graph.inputs:
            batch = _fits(name, blobs[name], model, batch)
        self._check_batch(batch)
        return [decode(blobs[v], framework="numpy", threads=model.threads) for v in model.graph.inputs]

    def next_frame(self, state: bytes, body: bytes) -> tuple[list[Any], bytes]:
        """The model's inputs out of a stream's next frame, and the state that the one after it needs;
        no state: the stream begins.

        Raises:
            StreamError: the frame needs one that is not there. Else as :meth:`arrays`.
        """
        if self._coder is None:
            raise CodecError("streams are for tails of split networks; this model is none")
        receiver = self._coder.receiver()
        if state:
            receiver.restore(state)
        arrays = receiver.decode(body)
        self._check_batch(len(arrays[0]))
        return list(arrays), receiver.snapshot()

    def _of_frame(self, body: bytes) -> list[Any]:
        """The maps of a frame, as ``actzip.split.load("head.actzip").encode`` gives it."""
        if self._coder is None:
            raise CodecError("a frame of a split network; this model is no tail of one")
        arrays = self._coder.decode(body)
        self._check_batch(len(arrays[0]))
        return list(arrays)

    def _check_batch(self, batch: int | None) -> None:
        if batch is not None and batch > self._max_batch:
            raise InputError(f"a batch of {batch}; this server takes at most {self._max_batch}")


def _blobs(body: bytes, inputs: list[str]) -> dict[str, bytes]:
    """The blobs of a body by the model's names."""
    if not body:
        raise CodecError("the body is empty; a blob of actzip.encode is needed")
    if is_map_file(body):
        found: dict[str, bytes] = {}
        for name, blob in iter_maps(io.BytesIO(body), blobs=True):
            if name in found:
                raise CodecError(f"the map {name!r} comes twice")
            found[name] = blob
    else:
        inspect(body)  # what is wrong with the body comes before what is wrong with the number of maps
        found = {inputs[0] if len(inputs) == 1 else "": body}
    if len(inputs) == 1 and len(found) == 1:
        return {inputs[0]: next(iter(found.values()))}
    if set(found) != set(inputs):
        have = ", ".join(map(repr, found)) if "" not in found else "one map without a name"
        raise InputError(
            f"the body holds {have or 'no map'}; the model takes {', '.join(map(repr, inputs))}: "
            "send them as one file of maps (actzip.codec.save_maps)"
        )
    return found


def _fits(name: str, blob: bytes, model: CompiledModel, batch: int | None) -> int | None:
    """The batch, after checking the header of one map."""
    from actzip.runtime.binding import fit

    header, value = inspect(blob), model.graph.values[name]
    if header.dtype != value.dtype:
        raise InputError(f"map {name!r} is {header.dtype}; the model takes {value.dtype}")
    return fit(name, value.shape, header.shape, batch)


def named(value: Any, name: str = "") -> dict[str, Any]:
    """The arrays of a model's outputs by where they are: ``scores``, ``maps.0``; a lone one is
    ``output``.

    >>> named({"scores": np.zeros(1), "maps": [np.zeros(2)]}).keys()
    dict_keys(['scores', 'maps.0'])
    """
    if isinstance(value, Mapping):
        parts = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {name or "output": np.asarray(value)}
    return {k: a for key, v in parts for k, a in named(v, f"{name}.{key}" if name else key).items()}


def answer(outputs: Mapping[str, Any], as_json: bool) -> bytes:
    """An answer's body.

    Raises:
        InputError: JSON is asked for and there are too many numbers for it.
    """
    if not as_json:
        from safetensors.numpy import save

        return bytes(save({k: np.ascontiguousarray(a) for k, a in outputs.items()}))
    numbers = sum(a.size for a in outputs.values())
    if numbers > _MOST_NUMBERS:
        raise InputError(
            f"{numbers} numbers are too many for JSON (at most {_MOST_NUMBERS}): accept {BINARY}"
        )
    rows = {k: {"shape": a.shape, "data": _plain(a)} for k, a in outputs.items()}
    return json.dumps(rows, allow_nan=False).encode()


def _plain(a: np.ndarray[Any, Any]) -> Any:
    """Nested lists; what JSON has no number for (NaN, infinity) is None."""
    if a.dtype.kind != "f" or bool(np.isfinite(a).all()):
        return a.tolist()
    out = a.astype(object)
    out[~np.isfinite(a)] = None
    return out.tolist()
