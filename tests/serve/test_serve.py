"""A served model gives what the loaded one gives; what is wrong with a request is said by its
status; accepted requests outlive their workers."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actzip
from actzip.codec import save_maps
from actzip.errors import CodecError, DataError, InputError, StreamError
from actzip.runtime import load
from actzip.serve import Client


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], tail: Path) -> Any:
    return start(tail, "--max-mb", "0.25", "--max-batch", "8")


@pytest.fixture(scope="module")
def pair(start: Callable[..., Any], two: Path) -> Any:
    return start(two)


def ask(port: int, body: bytes, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/predict", body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content, response.headers


def test_answers_are_those_of_the_loaded_model(server: Any, tail: Path, maps: np.ndarray) -> None:
    want = load(tail, threads=1)(maps)
    with Client(server.url) as client:
        assert np.array_equal(client(maps), want)
        assert np.array_equal(client(maps[:1]), want[:1])
    with Client(server.url, bits=8) as client:  # quantized by the sender
        received = actzip.decode(actzip.encode(maps, codec="rans", bits=8))
        assert np.array_equal(client(maps), load(tail, threads=1)(received))


def test_several_maps_in_and_out_by_name(pair: Any, two: Path, maps: np.ndarray) -> None:
    a, b = maps[:2, :, :6, :6].copy(), maps[1:, :, 6:, 6:].copy()
    want = load(two, threads=1)(a, b)
    with Client(pair.url) as client:
        names = [i["name"] for i in client.model()["inputs"]]
        for got in (client(a, b), client(**{names[1]: b, names[0]: a})):
            assert set(got) == {"mean", "maps.0", "maps.1"}
            assert np.array_equal(got["mean"], want["mean"])
            assert np.array_equal(got["maps.0"], want["maps"][0])
            assert np.array_equal(got["maps.1"], want["maps"][1])
            assert got["maps.1"].dtype == np.int64
        with pytest.raises(InputError, match="the model takes"):
            client.predict(actzip.encode(a, codec="zvc"))
        with pytest.raises(InputError, match="the body holds 'x', 'y'"):
            client.predict(as_file(x=a, y=b))
        with pytest.raises(InputError, match="has shape"):  # batches that differ
            client(a, b[:1])


def as_file(**maps: np.ndarray) -> bytes:
    file = io.BytesIO()
    save_maps(file, maps, codec="zvc")
    return file.getvalue()


def test_an_answer_as_json(server: Any, tail: Path, maps: np.ndarray) -> None:
    blob = actzip.encode(maps, codec="zvc")
    status, content, headers = ask(server.port, blob, Accept="application/json")
    assert status == 200 and headers["Content-Type"] == "application/json"
    got = json.loads(content)["output"]
    assert got["shape"] == [3, 5]
    assert np.allclose(got["data"], load(tail, threads=1)(maps))


def bad_bodies(maps: np.ndarray) -> dict[str, tuple[bytes, int, str]]:
    blob = actzip.encode(maps, codec="rans")
    flipped = bytearray(blob)
    flipped[len(blob) // 2] ^= 1
    newer = bytearray(blob)
    newer[4] = 99
    file = as_file(input=maps)
    return {
        "empty": (b"", 400, "empty"),
        "foreign": (b"GIF89a" + bytes(100), 400, "byte 0"),
        "a flipped bit": (bytes(flipped), 400, "checksum"),
        "cut off": (blob[:-1], 400, "truncated"),
        "another version": (bytes(newer), 400, "version|header"),
        "a file of maps cut off": (file[: len(file) // 2], 400, "ends within"),
        "channels": (actzip.encode(maps[:, :3], codec="zvc"), 422, "has shape"),
        "a dimension less": (actzip.encode(maps[0], codec="zvc"), 422, "has shape"),
        "float16": (actzip.encode(maps.astype(np.float16), codec="zvc"), 422, "float16"),
        "integers": (actzip.encode((maps > 0).astype(np.uint8), codec="seg"), 422, "uint8"),
        "a large batch": (
            actzip.encode(np.zeros((9, 8, 12, 12), np.float32), codec="zvc"),
            422,
            "batch",
        ),
        "two maps": (as_file(a=maps, b=maps), 422, "holds 'a', 'b'"),
        "oversized": (bytes(300_000), 413, "262144"),
        "four times oversized": (bytes(900_000), 413, "262144"),
    }


@pytest.mark.parametrize("name", bad_bodies(np.zeros((1, 8, 12, 12), np.float32)))
def test_a_bad_body_is_refused_in_one_line(server: Any, maps: np.ndarray, name: str) -> None:
    body, status, word = bad_bodies(maps)[name]
    got, content, _ = ask(server.port, body)
    detail = json.loads(content)["detail"]
    assert got == status, detail
    assert re.search(word, detail) and "\n" not in detail


def test_the_client_raises_what_the_library_raises(server: Any, maps: np.ndarray) -> None:
    with Client(server.url) as client:
        with pytest.raises(CodecError, match="400"):
            client.predict(b"no blob")
        with pytest.raises(InputError, match="413"):
            client.predict(bytes(300_000))
        with pytest.raises(InputError, match="422"):
            client(maps[:, :2])
        assert client(maps).shape == (3, 5)  # and goes on
    with pytest.raises(InputError, match="http://host:port"):
        Client("127.0.0.1:8000")
    with pytest.raises(DataError, match="does not answer"):
        Client("http://127.0.0.1:1", retries=0)(maps)


def test_another_protocol_is_refused(server: Any, maps: np.ndarray) -> None:
    headers = {"Actzip-Protocol": "2"}
    status, content, _ = ask(server.port, actzip.encode(maps, codec="zvc"), **headers)
    assert status == 400 and "speaks 1" in json.loads(content)["detail"]


def test_a_request_that_is_cut_off_harms_nobody(server: Any, maps: np.ndarray) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nACTZ")
    with Client(server.url) as client:
        assert client(maps).shape == (3, 5)
    until(server, 'actzip_requests_total{status="499"} 5.0')
    until(server, "actzip_requests_inside 0.0")


def get(server: Any, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def metrics(server: Any) -> str:
    return get(server, "/metrics")[1].decode()


def until(server: Any, words: str, seconds: float = 60) -> None:
    """Waits for ``words`` among the metrics."""
    deadline = time.monotonic() + seconds
    while words not in metrics(server):
        assert time.monotonic() < deadline, words
        time.sleep(0.05)


def test_health_metrics_and_the_page(server: Any, maps: np.ndarray) -> None:
    with Client(server.url) as client:
        client(maps)
    assert get(server, "/health") == (200, b'{"status": "ok", "workers_ready": 1}')
    text = metrics(server)
    assert 'actzip_requests_total{status="200"}' in text
    assert "actzip_request_seconds_bucket" in text and "actzip_workers_ready 1.0" in text
    api = json.loads(get(server, "/openapi.json")[1])
    assert set(api["paths"]) == {"/v1/predict", "/v1/model", "/health", "/metrics"}
    assert {"400", "413", "422", "429", "503"} <= set(api["paths"]["/v1/predict"]["post"]["responses"])
    assert get(server, "/docs")[0] == 200


def test_no_accepted_request_is_lost_or_answered_wrongly_when_workers_are_killed(
    start: Callable[..., Any], tail: Path, maps: np.ndarray
) -> None:
    server = start(tail, "--workers", "2")
    want = load(tail, threads=1)(maps)
    over = threading.Event()

    def one_client(_: int) -> int:
        done = 0
        with Client(server.url, retries=0) as client:
            while not over.is_set():
                assert np.array_equal(client(maps), want)
                done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(one_client, i) for i in range(4)]
        for _ in range(4):
            time.sleep(0.4)
            for pid in server.workers()[:1]:
                os.kill(pid, signal.SIGKILL)
        over.set()
        assert all(c.result() > 0 for c in counts)
    until(server, "actzip_workers_ready 2.0")  # killed ones come back
    assert "actzip_worker_restarts_total 0.0" not in metrics(server)


def test_back_pressure_and_a_graceful_stop(start: Callable[..., Any], tail: Path, maps: np.ndarray) -> None:
    """A server whose worker is stopped fills up: 503; SIGTERM lets those inside end."""
    server = start(tail, "--queue", "2")
    want = load(tail, threads=1)(maps)
    blob = actzip.encode(maps, codec="zvc")
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(3) as pool:
        inside = [pool.submit(ask, server.port, blob) for _ in range(3)]
        until(server, "actzip_requests_inside 3.0")
        status, content, headers = ask(server.port, blob)
        assert status == 503 and int(headers["Retry-After"]) >= 1, content
        with pytest.raises(DataError, match="503"):
            Client(server.url, retries=0)(maps)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        os.kill(worker, signal.SIGCONT)
        from safetensors.numpy import load as arrays

        for reply in inside:
            status, content, _ = reply.result()
            assert status == 200 and np.array_equal(arrays(content)["output"], want)
    assert server.process.wait(30) == 0


def test_a_model_that_hangs_is_ended_and_said_so(
    start: Callable[..., Any], tail: Path, maps: np.ndarray
) -> None:
    server = start(tail, "--seconds", "0.5")
    blob = actzip.encode(maps, codec="zvc")
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    status, content, _ = ask(server.port, blob)
    assert status == 504 and "0.5 s" in json.loads(content)["detail"]
    with Client(server.url) as client:
        assert client(maps).shape == (3, 5)
    assert server.workers() != [worker]


def test_more_than_the_rate_is_refused(start: Callable[..., Any], tail: Path, maps: np.ndarray) -> None:
    server = start(tail, "--rate", "2")
    blob = actzip.encode(maps, codec="zvc")
    replies = [ask(server.port, blob) for _ in range(6)]
    assert [r[0] for r in replies[:2]] == [200, 200]
    late = [r for r in replies if r[0] == 429]
    assert late and all(int(r[2]["Retry-After"]) >= 1 for r in late)
    assert Client(server.url)(maps).shape == (3, 5)  # waits as it is told


def run(*args: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "actzip.cli", "serve", *args],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def test_what_cannot_be_served_is_one_line(tail: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, said = run(str(tail), "--port", port)
        assert code == 2 and f"port {port}" in said and said.count("\n") == 1
    code, said = run(str(tmp_path / "none.actzip"))
    assert code == 4 and "No such file" in said and said.count("\n") == 1
    damaged = bytearray(tail.read_bytes())
    damaged[-20] ^= 255
    (tmp_path / "damaged.actzip").write_bytes(damaged)
    code, said = run(str(tmp_path / "damaged.actzip"), "--port", "0")
    assert code == 4 and "damaged" in said and said.count("\n") == 1
    code, said = run(str(tail), "--host", "no.such.host.invalid")
    assert code == 2 and said.count("\n") == 1


def test_the_server_does_without_torch(server: Any) -> None:
    without_torch(server)


def without_torch(server: Any) -> None:
    maps_of = Path(f"/proc/{server.process.pid}/maps")
    if not maps_of.exists():
        pytest.skip("what a process has loaded is known on Linux only")
    for pid in [server.process.pid, *server.workers()]:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("at", [0, 3], ids=["one map", "two maps"])
def test_the_tail_of_a_split_network(start: Callable[..., Any], tmp_path: Path, at: int) -> None:
    """Blobs, files of maps and frames of the head; of another split they are refused."""
    import torch

    from actzip.models import resolve
    from actzip.split import Head, MapCoder, MapQuantizer, Tail
    from actzip.split import load as load_part

    torch.manual_seed(0)
    net, x = resolve("cifar_resnet20").eval(), torch.rand(2, 3, 32, 32)
    parts = actzip.split(net, at, x, compile=True, threads=1)
    maps = parts.head(x.numpy())
    maps = list(maps) if isinstance(maps, (tuple, list)) else [maps]
    assert len(maps) == (1 if at == 0 else 2)
    names = [str(v) for v in parts.tail.graph.inputs]

    def coder_of(levels: int) -> Any:
        points = np.arange(levels + 1, dtype=np.float32)
        steps = [np.array([m.max() / levels], np.float32) for m in maps]
        shapes = [m.shape[1:] for m in maps]
        return MapCoder(
            [MapQuantizer(v, d, False, s, levels, 0.5, points) for v, d, s in zip(names, shapes, steps)]
        )

    coder = coder_of(255)
    Tail(parts.tail, coder).save(tmp_path / "tail.actzip")
    server = start(tmp_path / "tail.actzip")
    with Client(server.url) as client:
        assert np.array_equal(client(*maps), parts.tail(*maps))
        frame = Head(parts.head, coder).encode(x.numpy())
        tail = load_part(tmp_path / "tail.actzip", threads=1)
        assert np.array_equal(client.predict(frame), tail(frame))
        with pytest.raises(CodecError, match="400"):
            client.predict(frame[:-1])
        with pytest.raises(CodecError, match="another split"):
            client.predict(coder_of(15).encode(maps))
        sender = coder.sender()
        sender.encode(maps)
        with pytest.raises(StreamError, match=r"409: .*the one before"):
            client.predict(sender.encode(maps))
    without_torch(server)


def test_a_frame_for_a_model_that_is_no_tail_is_refused(server: Any) -> None:
    status, content, _ = ask(server.port, b"AZSF" + bytes(40))
    assert status == 400 and "no tail" in json.loads(content)["detail"]
