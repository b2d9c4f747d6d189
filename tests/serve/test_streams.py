"""Video through a served tail: frames that predict from the one before, and what is lost on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actzip
from actzip.errors import CodecError, InputError, StreamError
from actzip.serve import Client
from actzip.split import Head, MapCoder, MapQuantizer, Tail

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Head, Tail, Path]:
    import torch

    from actzip.models import resolve

    torch.manual_seed(0)
    net, x = resolve("lenet5").eval(), torch.rand(2, 1, 28, 28)
    parts = actzip.split(net, "relu1", x, compile=True, threads=1)
    (map_,) = [np.asarray(parts.head(x.numpy()))]
    name = str(parts.tail.graph.inputs[0])
    step = np.array([map_.max() / 255], np.float32)
    points = np.arange(256, dtype=np.float32)
    coder = MapCoder([MapQuantizer(name, map_.shape[1:], False, step, 255, 0.5, points)])
    tail = Tail(parts.tail, coder)
    path = tail.save(tmp_path_factory.mktemp("streams") / "tail.actzip")
    return Head(parts.head, coder), tail, path


def video(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.random((1, 1, 28, 28), np.float32)
    for _ in range(count):
        yield x
        x = np.clip(x + np.float32(0.002) * rng.standard_normal(x.shape, np.float32), 0, 1)


def watched(client: Client) -> list[int]:
    """The sizes of the bodies that a client sends from now on."""
    sizes: list[int] = []
    send = client._once

    def once(method: str, path: str, body: Any, more: Any) -> Any:
        sizes.append(len(body or b""))
        return send(method, path, body, more)

    client._once = once  # type: ignore[method-assign]
    return sizes


def test_a_stream_gives_what_its_frames_give_alone_in_fewer_bytes(
    start: Callable[..., Any], sides: tuple[Head, Tail, Path]
) -> None:
    head, tail, path = sides
    server = start(path, "--workers", "2")
    with Client(server.url) as client:
        sizes = watched(client)
        streams = [client.stream(head, key_every=100) for _ in range(3)]
        for frames in zip(*(video(5, seed) for seed in range(3)), strict=True):  # in turns
            for stream, x in zip(streams, frames, strict=True):
                assert np.array_equal(stream(x), tail(head.encode(x)))
        keys, others = sizes[:3], sizes[3:]
        assert len(sizes) == 15 and max(others) < 0.6 * min(keys)
        assert "actzip_streams 3" in client._request("GET", "/metrics").decode()


def test_a_worker_that_dies_takes_no_stream_with_it(
    start: Callable[..., Any], sides: tuple[Head, Tail, Path]
) -> None:
    head, tail, path = sides
    server = start(path)
    with Client(server.url, retries=50) as client:
        sizes, stream = watched(client), client.stream(head, key_every=100)
        for i, x in enumerate(video(4)):
            assert np.array_equal(stream(x), tail(head.encode(x)))
            if i == 1:
                for pid in server.workers():
                    os.kill(pid, signal.SIGKILL)
        assert max(sizes[1:]) < 0.6 * sizes[0]  # no key frame was needed


def test_a_forgotten_stream_goes_on_with_a_key_frame_by_itself(
    start: Callable[..., Any], sides: tuple[Head, Tail, Path]
) -> None:
    head, tail, path = sides
    server = start(path, "--streams", "1")
    with Client(server.url) as client:
        sizes = watched(client)
        one, other = (client.stream(head, key_every=100) for _ in range(2))
        first, second = (list(video(2, seed)) for seed in range(2))
        one(first[0])
        other(second[0])  # there is room for one
        sizes.clear()
        assert np.array_equal(one(first[1]), tail(head.encode(first[1])))
        assert len(sizes) == 2 and sizes[0] < 0.6 * sizes[1]  # refused, then a key frame


def test_what_is_no_stream_is_refused(start: Callable[..., Any], sides: tuple[Head, Tail, Path]) -> None:
    head, _, path = sides
    server = start(path)
    frames = [next(video(1))] * 3
    sender = head.sender(key_every=100)
    bodies = [sender.encode(x) for x in frames]
    name = "a" * 16
    with Client(server.url) as client:
        for bad in ("short", "x" * 65, "../../../../etc/passwd", "a b c d e f g h i j"):
            with pytest.raises(CodecError, match="a stream is named by"):
                client.predict(bodies[0], stream=bad)
        with pytest.raises(StreamError, match="a key frame is needed"):
            client.predict(bodies[1], stream=name)
        client.predict(bodies[0], stream=name)
        with pytest.raises(StreamError, match="1 lost"):
            client.predict(bodies[2], stream=name)
        with pytest.raises(CodecError, match="400"):
            client.predict(bodies[1][:-1], stream=name)
        client.predict(bodies[1], stream=name)  # what was refused changed nothing
        with pytest.raises(StreamError, match="twice or late"):
            client.predict(bodies[1], stream=name)
        with pytest.raises(CodecError):  # a blob is no frame
            client.predict(actzip.encode(head.maps(frames[0])[0]), stream=name)


def test_a_model_that_is_no_tail_takes_no_streams(start: Callable[..., Any], tail: Path) -> None:
    server = start(tail)
    with Client(server.url) as client, pytest.raises(CodecError, match="none"):
        client.predict(b"AZSF" + bytes(40), stream="a" * 16)


def test_streams_are_bounded_and_forgotten() -> None:
    from fastapi import HTTPException

    from actzip.serve.streams import Streams

    now = [0.0]
    streams = Streams(2, 10, lambda: now[0])
    names = [c * 16 for c in "abcd"]

    def use(name: str, state: bytes = b"s") -> bytes:
        with streams.frame(name) as stream:
            before, stream.state = stream.state, state
        return before

    assert use(names[0]) == b"" and use(names[0]) == b"s" and len(streams) == 1
    use(names[1])
    use(names[0])
    use(names[2])  # b was quiet longest
    assert len(streams) == 2 and use(names[0]) == b"s" and use(names[1]) == b""
    now[0] = 11.0
    assert use(names[0]) == b"" and len(streams) == 1
    assert use(names[3], b"") == b"" and len(streams) == 1  # one that failed at once leaves nothing
    with streams.frame(names[0]), pytest.raises(HTTPException) as busy, streams.frame(names[0]):
        pass
    assert busy.value.status_code == 409
    with streams.frame(names[0]), streams.frame(names[1]):
        now[0] = 99.0
        with pytest.raises(HTTPException) as full, streams.frame(names[2]):
            pass
    assert full.value.status_code == 503 and full.value.headers


def test_a_snapshot_goes_on_where_the_receiver_was() -> None:
    points = np.arange(8, dtype=np.float32)
    coder = MapCoder([MapQuantizer("m", (2, 3, 3), False, np.ones(1, np.float32), 7, 0.5, points)])
    rng = np.random.default_rng(0)
    sender, receiver = coder.sender(key_every=100), coder.receiver()
    with pytest.raises(StreamError, match="no frame yet"):
        receiver.snapshot()
    for _ in range(6):
        x = rng.integers(0, 8, (1, 2, 3, 3)).astype(np.float32)
        receiver.decode(sender.encode(x))
        again = coder.receiver()
        again.restore(receiver.snapshot())
        receiver = again
        y = rng.integers(0, 8, (1, 2, 3, 3)).astype(np.float32)
        assert np.array_equal(receiver.decode(sender.encode(y))[0], y)
    with pytest.raises(CodecError):
        receiver.restore(receiver.snapshot()[:-1])


def test_settings_of_streams_are_checked() -> None:
    from actzip.serve import Settings

    for bad in ({"streams": 0}, {"stream_seconds": 0}, {"streams": 1.5}):
        with pytest.raises(InputError, match=r"streams|stream_seconds"):
            Settings(**bad)
