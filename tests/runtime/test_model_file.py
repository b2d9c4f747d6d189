"""`.actzip` files: what was saved is what runs, and whatever is wrong with a file is a DataError."""

from __future__ import annotations

import collections
import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import actzip
from actzip.runtime import load
from actzip.runtime.graph import Graph, Sym, Value
from actzip.runtime.graph_data import from_data, to_data
from actzip.runtime.ops import Binary


class Net(nn.Module):
    """Convolutions, a residual, pools, a threshold, several outputs in nested structures."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.t = nn.Threshold(0.1, 0.0)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        y = self.t(self.a(x))
        z = torch.relu(self.b(y) + y)
        p = self.pool(z)
        return {"scores": self.fc(p.mean((2, 3))), "maps": [z, (p, nn.functional.gelu(p))]}


@pytest.fixture(scope="module")
def net() -> tuple[actzip.runtime.CompiledModel, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    return actzip.compile(Net().eval(), x, tune=False, threads=1), x


@pytest.fixture
def saved(net: tuple[actzip.runtime.CompiledModel, torch.Tensor], tmp_path: Path) -> Path:
    return net[0].save(tmp_path / "net.actzip")


def test_what_was_saved_is_what_runs(
    net: tuple[actzip.runtime.CompiledModel, torch.Tensor], saved: Path
) -> None:
    fast, x = net
    again = load(saved, threads=1)
    want, got = fast(x), again(x)
    assert list(got) == list(want) and torch.equal(got["scores"], want["scores"])
    assert torch.equal(got["maps"][1][1], want["maps"][1][1])
    assert again(x[:1])["scores"].shape == (1, 5)
    assert str(again.graph) == str(fast.graph)


def test_graph_as_data_and_back(net: tuple[actzip.runtime.CompiledModel, torch.Tensor]) -> None:
    data, arrays = to_data(net[0].graph)
    again = from_data(json.loads(json.dumps(data)), arrays)
    assert str(again) == str(net[0].graph)
    assert again.meta == net[0].graph.meta


def test_quantized_maps_keep_their_integers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    x = torch.randn(4, 3, 12, 12)
    fast = actzip.compile(actzip.quantize(model, x, bits=8), x, tune=False)
    assert torch.equal(load(fast.save(tmp_path / "q.actzip"))(x), fast(x))


def test_a_file_loads_and_runs_without_torch(saved: Path) -> None:
    code = (
        "import sys, numpy as np; from actzip.runtime import load\n"
        f"f = load({str(saved)!r}); y = f(np.zeros((3, 3, 16, 16), np.float32))\n"
        "assert y['scores'].shape == (3, 5) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_another_cpu_kernels_are_chosen_again(
    net: tuple[actzip.runtime.CompiledModel, torch.Tensor], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actzip.runtime.compiled.identity", lambda: {"cpu": "another"})
    fast, x = net
    torch.testing.assert_close(load(saved, tune=False)(x)["scores"], fast(x)["scores"])


def test_outputs_of_a_class_of_their_own_are_refused_before_writing(tmp_path: Path) -> None:
    fast = actzip.compile(nn.ReLU().eval(), torch.rand(1, 3, 4, 4), tune=False)
    fast.graph.meta["out_spec"] = '[1, {"type": "my.Pair", "context": "null", "children_spec": []}]'
    with pytest.raises(actzip.errors.UnsupportedError, match="class of their own"):
        fast.save(tmp_path / "two.actzip")
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Scores:
    scores: torch.Tensor
    more: Any = None


Pair = collections.namedtuple("Pair", "a b")
torch.export.register_dataclass(Scores, serialized_type_name="tests.Scores")


class Classes(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 8, 3), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.conv(x))


@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda y: Scores(y.mean((2, 3)), y), lambda o: {"scores": o.scores, "more": o.more}),
        (lambda y: [Pair(y, 2 * y)], lambda o: [tuple(o[0])]),
        (
            lambda y: {"b": Pair(y, None), "a": Scores(y + 1)},
            lambda o: {"b": (o["b"].a, None), "a": o["a"].scores},
        ),
    ],
)
@torch.no_grad()
def test_outputs_of_classes_are_saved_as_their_fields(wrap: Any, take: Any, tmp_path: Path) -> None:
    model, x = Classes(wrap).eval(), torch.randn(2, 3, 9, 9)
    fast = actzip.compile(model, x, tune=False)
    with pytest.warns(actzip.errors.ActzipWarning, match="holds no classes"):
        fast.save(tmp_path / "a.actzip")
    got, want = load(tmp_path / "a.actzip")(x), take(fast(x))
    if isinstance(want, dict) and "b" in want:
        got = {"b": got["b"], "a": got["a"]["scores"]}
    assert str(torch.utils._pytree.tree_structure(got)) == str(torch.utils._pytree.tree_structure(want))
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want))


def test_damaged_files_are_data_errors(
    net: tuple[actzip.runtime.CompiledModel, torch.Tensor], saved: Path, tmp_path: Path
) -> None:
    fast, x = net
    good, want = saved.read_bytes(), fast(x)["scores"]
    rng = np.random.default_rng(0)
    bad = tmp_path / "bad.actzip"
    refused = 0
    for i in range(200):
        data = bytearray(good)
        if i % 4 == 0:
            data = data[: int(rng.integers(0, len(data)))]
        else:
            at = int(rng.integers(0, len(data) if i % 2 else 4000))
            data[at] ^= 1 << int(rng.integers(0, 8))
        bad.write_bytes(data)
        try:
            assert torch.equal(load(bad, threads=1)(x)["scores"], want)  # the damage hit padding
        except actzip.errors.DataError:
            refused += 1
    assert refused > 180


def _retold(saved: Path, **changes: object) -> None:
    """The file with another description, its checksum right: what a forger writes."""
    from actzip._native import _codec

    raw = saved.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    text = {**json.loads(header["__metadata__"]["actzip"]), **changes}
    body = json.dumps(text)
    header["__metadata__"] = {"actzip": body, "crc32c": f"{_codec.crc32c(body.encode()):08x}"}
    head = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + size :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "newer actzip"),
        ({"format": "x"}, "names no format"),
        ({"graph": {}}, "damaged"),
        ({"graph": []}, "damaged"),
        ({"graph": {"name": "g", "inputs": ["x"], "outputs": ["y"], "values": [], "constants": {}, "meta": {},
                    "nodes": [{"op": "system", "name": "a", "inputs": [], "output": "y"}]}}, "not known"),
        ({"variants": 3}, "damaged"),
        ({"sample": ["no such"]}, "damaged"),
        ({"crc32c": {}}, "checksums"),
    ],
)  # fmt: skip
def test_forged_descriptions_are_data_errors(saved: Path, changes: dict[str, object], message: str) -> None:
    _retold(saved, **changes)
    with pytest.raises(actzip.errors.DataError, match=message):
        load(saved)


def test_foreign_files_are_data_errors(tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, other)
    with pytest.raises(actzip.errors.DataError, match="no compiled model"):
        load(other)
    for name, content in {"empty": b"", "text": b"hello, world", "pickle": b"\x80\x05K\x01."}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(actzip.errors.DataError, match=name):
            load(tmp_path / name)
    with pytest.raises(actzip.errors.DataError, match="absent"):
        load(tmp_path / "absent")


def test_packed_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 64, 3)).eval()
    x = torch.randn(1, 64, 10, 10)
    fast = actzip.compile(model, x, tune=False, threads=1)
    path = fast.save(tmp_path / "m.actzip")
    again = load(path, threads=1)
    assert torch.equal(again(x), fast(x))
    with open(path, "rb") as file:
        whole = file.read()
    taken = again._store.used()
    assert taken.keys() == fast._store.used().keys() and len(taken) == 2
    for array in taken.values():
        assert array.ctypes.data % 64 == 0 and array.tobytes() in whole


def test_constants_of_rank_zero_keep_it(tmp_path: Path) -> None:
    """They came back with one dimension, and the file was called damaged."""
    graph = Graph()
    x = graph.add_input("x", (Sym(), 3))
    graph.constants["k"], graph.values["k"] = np.array(2.5, np.float32), Value("k", ())
    graph.outputs = [graph.add(Binary("m", (x, "k"), "y", kind="mul"))]
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    fast = actzip.runtime.compile_graph(graph, example=given)
    again = load(fast.save(tmp_path / "m.actzip"), threads=1)
    assert np.array_equal(again(given), 2.5 * given) and again.graph.constants["k"].shape == ()


_CHILD = """
import sys, numpy as np
from actzip.runtime import load
fast = load(sys.argv[1], threads=1)
fast(np.ones((1, 64, 10, 10), np.float32))
print("ready", flush=True)
sys.stdin.read()
"""


def _mapped(pid: int, path: Path) -> dict[str, int]:
    """KiB of the mappings of ``path`` in a process, by smaps' names."""
    total: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.endswith(" kB"):
            total[first[:-1]] = total.get(first[:-1], 0) + int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps")
def test_two_processes_share_the_pages_of_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(64, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3)).eval()
    fast = actzip.compile(model, torch.randn(1, 64, 10, 10), tune=False, threads=1)
    path = fast.save(tmp_path / "m.actzip").resolve()
    weights = sum(a.nbytes for a in fast._store.used().values()) // 1024
    command = [sys.executable, "-c", _CHILD, str(path)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe) for _ in range(2)]
    try:
        for child in both:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        for child in both:
            found = _mapped(child.pid, path)
            assert found["Rss"] >= weights
            assert found["Private_Dirty"] == found["Shared_Dirty"] == 0
            assert found["Pss"] <= 0.6 * found["Rss"]
            assert found["Shared_Clean"] >= weights
    finally:
        for child in both:
            child.communicate()


@pytest.mark.parametrize(
    "damage",
    [
        {"shapes": []},
        {"shapes": 3},
        {"free": [[0, 2, 1, 9, 0]]},
        {"free": [[0]]},
        {"rules": [[["no such", "shape", 0], 1, 1, False, "x", [2]]]},
        {"rules": [[["up", "size", 0], 1, 0, False, "x", [2]]]},
        {"rules": [[["up", "size", 0], 1, 1, False, "nothing", [2]]]},
        {"rules": [[["up", "size", 7], 1, 1, False, "x", [2]]]},
        {"rules": [[["up", "name"], 1, 1, False, "x", [2]]]},
        {"rules": [[["up", "size", 0], 1, 1, False, "x", [9]]]},
        {"graph": {}},
    ],
)
def test_forged_rules_of_sizes_are_data_errors(tmp_path: Path, damage: dict[str, object]) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.a(x).relu())

    path = actzip.compile(Up().eval(), torch.randn(1, 3, 16, 16), tune=False).save(tmp_path / "m.actzip")
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    sizes = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["actzip"])["sizes"]
    assert sizes["rules"] and sizes["rules"][0][0][:2] == ["up", "size"]
    _retold(path, sizes={**sizes, **damage})
    with pytest.raises(actzip.errors.DataError, match="damaged"):
        load(path)


_MEMORY = """
import sys

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024

import actzip.runtime.compiled
before = resident()
fast = actzip.runtime.compiled.load(sys.argv[1], threads=1)
after = resident()
print(after - before, fast.weight_bytes())
first = fast.graph.nodes[0].weight
print(float(first.sum()))  # comes from the file again
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
def test_loaded_weights_lie_in_memory_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(512, 1024, 3, padding=1), nn.ReLU(), nn.Conv2d(1024, 64, 3, padding=1))
    fast = actzip.compile(net.eval(), torch.randn(1, 512, 8, 8), tune=False, threads=1)
    path = fast.save(tmp_path / "wide.actzip")
    done = subprocess.run([sys.executable, "-c", _MEMORY, path], capture_output=True, text=True, check=True)
    (grown, weights), (total,) = (line.split() for line in done.stdout.splitlines())
    assert int(weights) > 20e6
    assert int(grown) < 1.3 * int(weights)
    assert float(total) == pytest.approx(float(fast.graph.nodes[0].weight.sum()), rel=1e-4)
