"""A small compiled model, and servers of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import actzip


class Two(nn.Module):
    """Two maps in, a dict of a vector and a list out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, object]:
        y = torch.relu(self.conv(a)) + b
        return {"mean": y.mean((2, 3)), "maps": [y, y.argmax(1)]}


@pytest.fixture(scope="session")
def tail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    fast = actzip.compile(net, torch.rand(1, 8, 12, 12), threads=1, tune=False)
    return fast.save(tmp_path_factory.mktemp("serve") / "tail.actzip")


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    example = (torch.rand(2, 8, 6, 6), torch.rand(2, 8, 6, 6))
    fast = actzip.compile(Two().eval(), example, threads=1, tune=False)
    return fast.save(tmp_path_factory.mktemp("serve") / "two.actzip")


@pytest.fixture
def maps() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.maximum(rng.standard_normal((3, 8, 12, 12)), 0).astype(np.float32)


class Server:
    """``actzip serve`` in a process of its own."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [sys.executable, "-m", "actzip.cli", "serve", str(model), "--port", "0", "--json"]
        self.process = subprocess.Popen(
            [*command, "--threads", "1", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        lines = []
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            lines.append(line)
            if line.rstrip() == b"}":
                break
        assert lines, self.process.stderr.read().decode()
        self.url: str = json.loads(b"".join(lines))["url"]
        self.port = int(self.url.rsplit(":", 1)[1])

    def workers(self) -> list[int]:
        """Ids of the processes that run the model."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        if not children.exists():
            pytest.skip("the ids of child processes are known on Linux only")
        return [int(p) for p in children.read_text().split()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Server]]:
    """start(model, *options) -> Server, stopped at the end."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    servers: list[Server] = []

    def begin(model: Path, *options: str) -> Server:
        servers.append(Server(model, *options))
        return servers[-1]

    yield begin
    for server in servers:
        server.process.kill()
        server.process.wait()
        for stream in (server.process.stdout, server.process.stderr):
            assert stream is not None
            stream.close()
