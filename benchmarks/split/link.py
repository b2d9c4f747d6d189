"""Predicted against measured: a network cut between two processes on the loopback, the link throttled.

    python benchmarks/split/link.py mobilenet-v2 --bandwidth 50Mbit --latency 2ms
    python benchmarks/split/link.py mobilenet-v2 --prepare /tmp/parts   # compiles only
    python benchmarks/split/link.py mobilenet-v2 --prepared /tmp/parts  # measures only
    python benchmarks/split/link.py inception-v3 --at Mixed_6c --price -1.22 --calibrate 32

Five cuts spread over the network. Predicted as `actzip split` does: layers of the whole network
timed on the engine, coding timed, bits over bandwidth, latency both ways. Measured: the head in this
process, the tail in another, frames over TCP; both ends send no faster than the link, and each
message late by the latency. Writes benchmarks/results/split/link-NAME.json with the share that
encoding and decoding have of the head's time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actzip
from actzip import cpu
from actzip.files import write_text
from actzip.split import Head, Tail
from actzip.split.api import open_network
from actzip.split.choose import rates_of
from actzip.split.clock import code_time, time_layers, timed
from actzip.split.coder import MapCoder
from actzip.split.cut import find_cut
from actzip.split.link import Link

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accelerate"))
from networks import NETWORKS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "split"
_CHUNK = 4096
CODECS = ("rans", "seg", "zvc")


def send(to: socket.socket, data: bytes, link: Link) -> None:
    """Sends a message as the link would: late, and no faster."""
    message = struct.pack("<I", len(data)) + data
    start = time.perf_counter() + link.latency
    for at in range(0, len(message), _CHUNK):
        chunk = message[at : at + _CHUNK]
        due = start + 8 * (at + len(chunk)) / link.bandwidth
        while (left := due - time.perf_counter()) > 0:
            if left > 2e-4:  # a sleep ends late
                time.sleep(left - 1e-4)
        to.sendall(chunk)


def receive(of: socket.socket) -> bytes:
    (size,) = struct.unpack("<I", of.recv(4, socket.MSG_WAITALL))
    return of.recv(size, socket.MSG_WAITALL) if size else b""


def serve(path: str, tune: bool, link: Link, ready: Any) -> None:
    """The other process: frames in, answers and the milliseconds they took out."""
    torch.set_num_threads(1)
    tail = actzip.split.load(path, threads=1, tune=tune)
    assert isinstance(tail, Tail)
    listener = socket.create_server(("127.0.0.1", 0))
    ready.put(listener.getsockname()[1])
    with listener.accept()[0] as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while frame := receive(peer):
            start = time.perf_counter()
            maps = tail.coder.decode(frame)
            middle = time.perf_counter()
            y = np.ascontiguousarray(tail.run(maps))
            end = time.perf_counter()
            times = struct.pack("<dd", 1e3 * (middle - start), 1e3 * (end - middle))
            send(peer, times + y.tobytes(), link)


def prepare(o: argparse.Namespace, folder: Path) -> None:
    """Compiles heads and tails of five cuts, or of those asked for, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "x.npy").exists():
        np.save(folder / "x.npy", NETWORKS[o.network].data(o.calibrate)[0].numpy())
    network, x = opened(o.network, folder)
    tune = not o.no_tune
    cuts = network.cuts()
    chosen = [cuts[round((i + 0.5) * len(cuts) / 5)] for i in range(5)]
    if o.at:
        found = [find_cut(network.graph, at, network.layers) for at in o.at]
        chosen = [next(c for c in cuts if c.values == f.values) for f in found]
    for cut in chosen:
        head, tail = network.parts(cut)
        rates = rates_of(head, tail, list(x.split(8)), cut.values, bits=8, per="channel")
        price = 2.0**o.price * sum(r.dropped for r in rates) / sum(r.elements for r in rates)
        coder = MapCoder([r.at(price)[0] for r in rates])
        parts = network.compiled(cut, example=x[:1], threads=1, tune=tune)
        place = folder / str(cut.index)
        place.mkdir(parents=True, exist_ok=True)
        Head(parts.head, coder, cut.name).save(place / "head.actzip")
        Tail(parts.tail, coder, cut.name).save(place / "tail.actzip")
    time_layers(network.graph, x[:1], threads=1, tune=tune)  # its kernels are in the cache then


def opened(name: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """The network and the images that :func:`prepare` took."""
    x = torch.from_numpy(np.load(folder / "x.npy"))
    return open_network(NETWORKS[name].make(), x[:2]), x


def coding_shares(coder: MapCoder, maps: Any, head_ms: float, elements: int) -> dict[str, Any]:
    """Encoding and decoding over the time of the head, and bits an element, by codec."""
    found = {}
    for codec in CODECS:
        other = MapCoder(coder.quantizers, codec)
        both = code_time(other, maps)
        found[codec] = {
            "encode_ms": both[0],
            "decode_ms": both[1],
            "share_of_head": sum(both) / head_ms,
            "bits_per_element": 8 * len(other.encode(list(maps))) / elements,
        }
    return found


def measure(name: str, folder: Path, link: Link, rounds: int, tune: bool) -> dict[str, Any]:
    """Predicts, then runs, each cut of the folder."""
    network, x = opened(name, folder)
    times = time_layers(network.graph, x[:1], threads=1, tune=tune)
    by_index = {c.index: c for c in network.cuts()}
    with torch.no_grad():
        answer = 32 * network.model(x[:1]).numel()
    rows = []
    for place in sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: int(p.name)):
        cut = by_index[int(place.name)]
        head = actzip.split.load(place / "head.actzip", threads=1, tune=tune)
        assert isinstance(head, Head)
        maps = head.maps(x[:1])
        encode_ms, decode_ms = code_time(head.coder, [np.asarray(m) for m in maps])
        head_ms = times.head(cut.values)
        bits = 8 * len(head.encode(x[:1]))
        predicted = {
            "head_ms": head_ms,
            "encode_ms": encode_ms,
            "link_ms": link.ms(bits, answer),
            "decode_ms": decode_ms,
            "tail_ms": times.total - head_ms,
        }
        measured = run(place / "tail.actzip", tune, head, x[:1], link, rounds)
        total = sum(predicted.values())
        row = {
            "cut": cut.name,
            "number": cut.index,
            "maps": len(cut.values),
            "kilobytes": bits / 8000,
            "bits_per_element": bits / cut.elements,
            "predicted": predicted,
            "predicted_ms": total,
            **measured,
            "off": total / measured["measured_ms"] - 1,
            "coding": coding_shares(
                head.coder,
                [np.asarray(m) for m in maps],
                timed(lambda h=head: h.model(x[:1])),
                cut.elements,
            ),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    info = cpu.info()
    return {
        "network": name,
        "bandwidth": link.bandwidth,
        "latency": link.latency,
        "threads": 1,
        "tuned": tune,
        "cpu": info["cpu"],
        "isa": info["isa"],
        "rounds": rounds,
        "cuts": rows,
    }


def run(tail: Path, tune: bool, head: Head, x: Any, link: Link, rounds: int) -> dict[str, Any]:
    """Medians over rounds, until the answer is back, and of the parts."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    other = context.Process(target=serve, args=(str(tail), tune, link, ready), daemon=True)
    other.start()
    seen: dict[str, list[float]] = {k: [] for k in ("measured_ms", "client_ms", "decode_ms", "tail_ms")}
    with socket.create_connection(("127.0.0.1", ready.get(timeout=60))) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(rounds + 3):
            start = time.perf_counter()
            frame = head.encode(x)
            middle = time.perf_counter()
            send(peer, frame, link)
            answer = receive(peer)
            total = 1e3 * (time.perf_counter() - start)
            if i >= 3:
                decoding, tailing = struct.unpack_from("<dd", answer)
                for key, value in zip(seen, (total, 1e3 * (middle - start), decoding, tailing), strict=True):
                    seen[key].append(value)
        send(peer, b"", link)
    other.join(10)
    return {k: statistics.median(v) for k, v in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--bandwidth", default="50Mbit")
    parser.add_argument("--latency", default="2ms")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prepare", type=Path, help="only compile, into this folder")
    parser.add_argument("--prepared", type=Path, help="only measure what is in this folder")
    parser.add_argument("--no-tune", action="store_true", help="kernels by density, without trials")
    parser.add_argument("--at", nargs="+", help="cut behind these layers instead of at five places")
    parser.add_argument(
        "--price", type=float, default=-7.0, help="of a bit: 2 to this, in the error of sending nothing"
    )
    parser.add_argument("--calibrate", type=int, default=8, help="images that quantizers are chosen by")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    torch.set_num_threads(1)
    folder = o.prepare or o.prepared or Path("/tmp") / f"actzip-split-{o.network}"
    if not o.prepared:
        prepare(o, folder)
    if not o.prepare:
        found = measure(o.network, folder, Link.of(o.bandwidth, o.latency), o.rounds, not o.no_tune)
        path = o.out or RESULTS / f"link-{o.network}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
