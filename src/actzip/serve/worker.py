"""The process that runs a model: ``python -m actzip.serve.worker FILE THREADS MAX_BATCH``.

Frames come on standard input and go on standard output: a byte that says what it is, the length as
eight bytes, little-endian, the content. It ends when standard input does. Signals that a terminal
or a service manager sends to the whole group are left to the server.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from typing import IO, Any

from actzip.errors import ActzipError

__all__ = [
    "ASK_BINARY",
    "ASK_JSON",
    "DONE",
    "FAULT",
    "HEAD",
    "IN_STREAM",
    "READY",
    "REFUSED",
    "joined",
    "main",
    "parted",
]

HEAD = struct.Struct("<BQ")
ASK_BINARY, ASK_JSON = 0, 1
IN_STREAM = 16  # added: the content, and that of the answer, is a stream's state and then the rest
READY, DONE, REFUSED, FAULT = 2, 3, 4, 5


def main(argv: list[str]) -> None:
    """Loads the model and answers until standard input ends."""
    path, threads, max_batch = argv[0], int(argv[1]), int(argv[2])
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not write into the frames
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        model, reader, about = _load(path, threads, max_batch)
    except ActzipError as error:
        _put(target, FAULT, _said(error))
        return
    _put(target, READY, json.dumps(about).encode())
    while head := source.read(HEAD.size):
        kind, size = HEAD.unpack(head)
        body = source.read(size)
        if len(body) < size:
            return
        _put(target, *_answer(model, reader, body, kind))


def joined(state: bytes, rest: bytes) -> bytes:
    """What goes with ``IN_STREAM``."""
    return struct.pack("<Q", len(state)) + state + rest


def parted(content: bytes) -> tuple[bytes, bytes]:
    """(state, rest) of :func:`joined`."""
    (size,) = struct.unpack_from("<Q", content)
    return content[8 : 8 + size], content[8 + size :]


def _put(target: IO[bytes], kind: int, content: bytes) -> None:
    target.write(HEAD.pack(kind, len(content)))
    target.write(content)
    target.flush()


def _said(error: Exception) -> bytes:
    return json.dumps({"type": type(error).__name__, "error": str(error)}).encode()


def _load(path: str, threads: int, max_batch: int) -> tuple[Any, Any, dict[str, Any]]:
    """The model after one run on zeros, what reads its requests, and what it takes and gives."""
    import numpy as np

    from actzip.runtime import load
    from actzip.runtime.graph import concrete
    from actzip.serve.wire import Reader, named

    model = load(path, threads=threads)
    graph = model.graph
    n = int(graph.meta.get("batches", (1, None))[0])
    zeros = [np.zeros(concrete(graph.shape(v), n), graph.values[v].dtype) for v in graph.inputs]
    outputs = named(model.structured(model.run(zeros)))
    takes = [
        {
            "name": v,
            "dtype": graph.values[v].dtype,
            "shape": [d if isinstance(d, int) else str(d) for d in graph.shape(v)],
        }
        for v in graph.inputs
    ]
    gives = [{"name": k, "dtype": str(a.dtype), "shape": list(a.shape)} for k, a in outputs.items()]
    return (
        model,
        Reader(model, max_batch),
        {"model": graph.name, "inputs": takes, "outputs": gives, "outputs_batch": n},
    )


def _answer(model: Any, reader: Any, body: bytes, kind: int) -> tuple[int, bytes]:
    """A frame for one request; nothing that a body holds ends the process."""
    from actzip.serve.wire import answer, named

    try:
        state = b""
        if kind & IN_STREAM:
            arrays, state = reader.next_frame(*parted(body))
        else:
            arrays = reader.arrays(body)
        content = answer(named(model.structured(model.run(arrays))), bool(kind & ASK_JSON))
        return DONE, joined(state, content) if kind & IN_STREAM else content
    except ActzipError as error:
        return REFUSED, _said(error)
    except Exception as error:
        return FAULT, _said(error)


if __name__ == "__main__":
    main(sys.argv[1:])
