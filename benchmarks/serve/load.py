"""Good and bad requests of many clients on ``actzip serve``, while its workers are killed.

    python benchmarks/serve/load.py                          # 30 minutes, 16 clients
    python benchmarks/serve/load.py --minutes 1 --out -      # a look, nothing written

The model is a small tail with random weights; the server runs in processes of its own, each with
one thread. Every answer is compared, bit for bit, with that of the model loaded here. A tenth of
the requests is damaged, oversized or cut off. Memory is sampled all along. Where all processes were
stopped from outside for more than five seconds (a busy machine), requests under way then are
counted apart.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

import actzip
from actzip import cpu
from actzip.files import write_text

OUT = Path(__file__).resolve().parents[1] / "results" / "serve" / "load.json"
MAX_MB = 0.5
SHAPE = (64, 28, 28)  # of the map that is sent


def make_model(folder: Path) -> Path:
    import torch
    from torch import nn

    torch.manual_seed(0)
    sides = [(64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    convs = [nn.Conv2d(i, o, 3, stride=s, padding=1) for i, o, s in sides]
    parts = [m for conv in convs for m in (conv, nn.ReLU())]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).eval()
    fast = actzip.compile(net, torch.relu(torch.randn(1, *SHAPE)), threads=1, tune=False)
    return fast.save(folder / "tail.actzip")


@dataclass
class Case:
    """A request and the answer that is right."""

    body: bytes
    answer: Any


def make_cases(model: Path) -> list[Case]:
    from actzip.runtime import load

    fast, rng = load(model, threads=1), np.random.default_rng(0)
    cases = []
    for _ in range(32):
        x = np.maximum(rng.standard_normal((1, *SHAPE)), 0).astype(np.float32)
        body = actzip.encode(x, codec="rans", bits=8)
        cases.append(Case(body, fast(actzip.decode(body))))
    return cases


@dataclass
class Tally:
    """What came of the requests."""

    good: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    not_accepted: Counter[int] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    bad_answered_otherwise: list[str] = field(default_factory=list)
    reconnected: int = 0
    paused: int = 0
    seconds: list[float] = field(default_factory=list)


class Pauses:
    """Notices when this process did not run for a while."""

    def __init__(self) -> None:
        self.gaps: list[tuple[float, float]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            if now - before > 5:
                self.gaps.append((before, now))
            before = now

    def within(self, begin: float, end: float) -> bool:
        time.sleep(0.6 if end - begin > 5 else 0)  # the watcher wakes first
        return any(a < end and begin < b for a, b in self.gaps)


class Client:
    """One client: a request, a pause, the next."""

    def __init__(self, port: int, cases: list[Case], seed: int, pauses: Pauses, over: threading.Event):
        self.port, self.cases, self.pauses, self.over = port, cases, pauses, over
        self.random = random.Random(seed)
        self.tally = Tally()
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def run(self, every: float, bad_share: float) -> Tally:
        self.over.wait(every * self.random.random())
        while not self.over.is_set():
            began = time.monotonic()
            if self.random.random() < bad_share:
                self.bad()
            else:
                self.good()
            pause = every * (0.5 + self.random.random())
            self.over.wait(max(0.0, pause - (time.monotonic() - began)))
        self.connection.close()
        return self.tally

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Once more, on a new connection, where the server had closed the one that was kept."""
        kept = self.connection.sock is not None
        try:
            return self.once(body)
        except (ConnectionError, http.client.RemoteDisconnected):
            self.connection.close()
            if not kept:
                raise
        self.tally.reconnected += 1
        return self.once(body)

    def once(self, body: bytes) -> tuple[int, bytes]:
        self.connection.request("POST", "/v1/predict", body)
        response = self.connection.getresponse()
        return response.status, response.read()

    def good(self) -> None:
        from safetensors.numpy import load

        case, began, t = self.random.choice(self.cases), time.monotonic(), self.tally
        try:
            status, content = self.post(case.body)
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            status, content = 0, repr(error).encode()
        ended = time.monotonic()
        if self.pauses.within(began, ended):
            t.paused += 1
        elif status == 200:
            right = np.array_equal(load(content)["output"], case.answer)
            t.good, t.wrong = t.good + right, t.wrong + (not right)
            t.seconds.append(ended - began)
        elif status in (429, 503):
            t.not_accepted[status] += 1
        else:
            t.lost.append(f"{status}: {content[:200].decode(errors='replace')}")

    def bad(self) -> None:
        kind = self.random.choice(["damaged", "oversized", "cut off"])
        body, began = bytearray(self.random.choice(self.cases).body), time.monotonic()
        try:
            if kind == "cut off":
                self.cut_off(bytes(body))
                want = status = 0
            elif kind == "oversized":
                want, status = 413, self.post(bytes(int((MAX_MB + 0.5) * 2**20)))[0]
            else:
                body[self.random.randrange(len(body))] ^= 1 << self.random.randrange(8)
                want, status = 400, self.post(bytes(body))[0]
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            want, status = 1, -1
            kind = f"{kind}: {error!r}"
        if not self.pauses.within(began, time.monotonic()):
            self.tally.bad[kind] += 1
            if status != want:
                self.tally.bad_answered_otherwise.append(f"{kind}: {status}")

    def cut_off(self, body: bytes) -> None:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as s:
            s.sendall(head.encode() + body[: self.random.randrange(len(body))])


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory(server: int) -> dict[str, float]:
    """Resident MiB of the server and of its workers together."""

    def rss(pid: int) -> float:
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        except (OSError, IndexError):  # it has just died
            return 0.0

    workers = [rss(p) for p in children(server)]
    return {"server": rss(server), "workers": sum(workers), "count": len([w for w in workers if w > 20])}


def watch(server: int, minutes: float, kills: int) -> tuple[list[dict[str, float]], list[float]]:
    """Samples memory until the time is over; kills a worker now and then."""
    began, samples, killed = time.monotonic(), [], []
    while (now := (time.monotonic() - began) / 60) < minutes:
        if len(killed) < kills and now > minutes * (len(killed) + 1) / (kills + 1):
            os.kill(children(server)[0], signal.SIGKILL)
            killed.append(round(now, 2))
        samples.append({"minute": now, **memory(server)})
        time.sleep(min(2.0, minutes * 60 / 50))
    return samples, killed


def growth(samples: list[dict[str, float]], what: str, workers: int) -> dict[str, float]:
    """Medians of the second and of the last tenth, all workers being there."""
    whole = [s for s in samples if s["count"] == workers]
    tenth = max(1, len(whole) // 10)
    first = statistics.median(s[what] for s in whole[tenth : 2 * tenth])
    last = statistics.median(s[what] for s in whole[-tenth:])
    return {"first_mib": round(first, 1), "last_mib": round(last, 1), "change": round(last / first - 1, 4)}


def start(model: Path, workers: int) -> tuple[subprocess.Popen[bytes], int]:
    command = [sys.executable, "-m", "actzip.cli", "serve", str(model), "--port", "0", "--json"]
    command += ["--workers", str(workers), "--threads", "1", "--max-mb", str(MAX_MB), "--seconds", "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = b""
    while not text.endswith(b"}\n"):
        text += process.stdout.readline()
    return process, int(json.loads(text)["url"].rsplit(":", 1)[1])


def merged(tallies: list[Tally]) -> Tally:
    whole = Tally()
    for t in tallies:
        for f in fields(Tally):
            setattr(whole, f.name, getattr(whole, f.name) + getattr(t, f.name))
    return whole


def report(
    t: Tally, samples: list[dict[str, float]], killed: list[float], args: Any, gaps: int
) -> dict[str, Any]:
    ms = np.array(t.seconds) * 1000
    p50, p95, p99 = (float(np.percentile(ms, p)) for p in (50, 95, 99))
    asked = t.good + t.wrong + len(t.lost) + sum(t.not_accepted.values()) + sum(t.bad.values())
    return {
        "command": "python benchmarks/serve/load.py "
        f"--minutes {args.minutes:g} --clients {args.clients} --every {args.every:g}",
        "environment": cpu.info(),
        "load_average_at_the_end": [round(x, 1) for x in os.getloadavg()],
        "minutes": args.minutes,
        "clients": args.clients,
        "workers": args.workers,
        "requests": asked,
        "answered_rightly": t.good,
        "answered_wrongly": t.wrong,
        "accepted_and_lost": len(t.lost),
        "lost": t.lost[:20],
        "not_accepted": {str(k): v for k, v in t.not_accepted.items()},
        "bad": dict(t.bad),
        "bad_answered_otherwise": t.bad_answered_otherwise[:20],
        "workers_killed_at_minute": killed,
        "reconnected": t.reconnected,
        "pauses": gaps,
        "under_way_in_a_pause": t.paused,
        "ms": {"p50": p50, "p95": p95, "p99": p99, "max": float(ms.max()), "p99_to_p50": p99 / p50},
        "memory": {w: growth(samples, w, args.workers) for w in ("server", "workers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument(
        "--every", type=float, default=1.0, help="mean seconds from request to request of a client"
    )
    parser.add_argument("--bad", type=float, default=0.1, help="share of bad requests")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default=str(OUT), help="a JSON file; - for standard output alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        cases, over, pauses = make_cases(model), threading.Event(), Pauses()
        server, port = start(model, args.workers)
        try:
            with ThreadPoolExecutor(args.clients) as pool:
                clients = [Client(port, cases, i, pauses, over) for i in range(args.clients)]
                running = [pool.submit(c.run, args.every, args.bad) for c in clients]
                samples, killed = watch(server.pid, args.minutes, args.kills)
                over.set()
                result = report(
                    merged([r.result() for r in running]), samples, killed, args, len(pauses.gaps)
                )
            server.terminate()
            result["exit_code_after_sigterm"] = server.wait(60)
        finally:
            over.set()
            server.kill()
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.out != "-":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, text)


if __name__ == "__main__":
    main()
