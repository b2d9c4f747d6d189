"""Layers for simulators: sizes and densities are those of PyTorch's own tensors, SCALE-Sim runs its
file unchanged, Timeloop's files are what its front end declares, and folders are whole or absent."""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from typer.testing import CliRunner

from actzip.cli import build
from actzip.errors import DataError, InputError
from actzip.profile import load_report, profile
from actzip.profile.workloads import workloads

SCHEMA = json.loads((Path(__file__).parent / "timeloop_v4_problem.json").read_text())


class Net(nn.Module):
    """Strides that leave the border out, uneven padding, depthwise, groups, dilation, a transposed
    convolution, three ranks, a layer that runs twice, linear layers over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.dw = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.g = nn.Conv2d(16, 12, 3, groups=4, padding=(1, 0))
        self.even = nn.Conv2d(12, 12, 2, padding="same")
        self.cut = nn.Conv2d(12, 4, 1, stride=3)
        self.d = nn.Conv2d(12, 4, 3, dilation=2)
        self.t = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.DP = nn.Conv2d(4, 4, (1, 3), stride=(1, 2))
        self.one = nn.Conv1d(4, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.g(torch.relu(self.dw(torch.relu(self.a(x))))))
        x = torch.relu(self.even(x))
        c = torch.relu(self.cut(x))
        x = torch.relu(self.t(torch.relu(self.d(x))))
        x = torch.relu(self.one(self.DP(x).flatten(2)))
        return self.fc(x.transpose(1, 2)).mean(1) + c.mean()


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.g.weight[torch.rand_like(net.g.weight) < 0.5] = 0
    return net


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 22, 19)


@pytest.fixture(scope="module")
def report(net: Net, images: torch.Tensor) -> Any:
    return profile(net, [images], codecs=[], engine=False, tiles="4x4x4")


def operands(net: nn.Module, x: torch.Tensor) -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Of every layer: itself, its input and its output, by hooks."""
    seen: dict[str, Any] = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, k=k: seen.setdefault(k, (m, i[0], o)) and None)
        for k, m in net.named_modules()
        if not list(m.children())
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return seen


def read(m: nn.Conv2d, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What a convolution reads, padded by PyTorch and cut to the last tap of the last output."""
    k, s, d = m.kernel_size, m.stride, m.dilation
    sizes = [(o - 1) * s[i] + d[i] * (k[i] - 1) + 1 for i, o in enumerate(out.shape[2:])]
    pads: list[int] = []
    for i in reversed(range(len(k))):
        if m.padding == "same":
            total = d[i] * (k[i] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [m.padding[i], m.padding[i]]  # type: ignore[list-item]
    x = F.pad(x, pads)
    for i, size in enumerate(sizes):
        x = x.narrow(2 + i, 0, size)
    return x


def test_workloads_are_the_tensors_of_the_model(report: Any, net: Net, images: torch.Tensor) -> None:
    found, left = workloads(report.to_dict())
    assert [x.name for x in left] == ["t"] and "transposed" in left[0].why
    seen = operands(net, images)
    for w in found:
        m, x, out = seen[w.name]
        assert w.times == 1
        assert w.weight_density == pytest.approx(float((m.weight != 0).float().mean()))
        if isinstance(m, nn.Linear):
            assert (w.rows, w.inputs, w.outputs) == (x.shape[1], m.in_features, m.out_features)
            continue
        assert isinstance(m, (nn.Conv1d, nn.Conv2d))
        box = read(m, x, out)
        assert (w.groups * w.inputs, *w.read[-(box.dim() - 2) :]) == tuple(box.shape[1:])
        assert (w.groups * w.outputs, *w.out[-(box.dim() - 2) :]) == tuple(out.shape[1:])
        assert w.input_density == pytest.approx(float((box != 0).float().mean()), rel=1e-6)
        assert w.macs == out[0].numel() * w.inputs * math.prod(m.kernel_size)
        if w.name in ("a", "dw", "g", "even", "d", "one", "cut"):
            assert w.output_density == pytest.approx(float((out > 0).float().mean()), rel=1e-6)
        else:  # read as it is
            assert w.output_map is None and w.output_density == 1


def test_a_branch_takes_the_map_behind_the_sum() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.down, self.linear = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)
            self.last = nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.b(torch.relu(self.a(x))) + self.down(x))
            return torch.relu(self.last(self.linear(y)))

    rows = profile(Block(), [torch.randn(1, 4, 6, 6)], codecs=[], engine=False).layers
    maps = {r["name"]: r["output_map"] for r in rows}
    assert maps["b"] == maps["down"] and maps["b"] != maps["a"]
    assert maps["linear"] is None and maps["last"] not in (None, maps["b"])


def test_timeloop_files_are_what_its_front_end_declares(report: Any, tmp_path: Path) -> None:
    done = report.export("timeloop", tmp_path / "out")
    found, _ = workloads(report.to_dict())
    files = sorted(p for p in (tmp_path / "out").glob("*.yaml"))
    assert done.layers == len(files) == len(found) and [x.name for x in done.left_out] == ["t"]
    for path, w in zip(files, found):
        text = path.read_text()
        data = yaml.safe_load(text)
        jsonschema.validate(data, SCHEMA)
        shape, instance = data["problem"]["shape"], data["problem"]["instance"]
        names = {*shape["dimensions"], *(c["name"] for c in shape["coefficients"])}
        assert names == set(instance) - {"densities"}
        assert math.prod(instance[d] for d in shape["dimensions"]) == w.macs
        spaces = {s["name"]: s["projection"] for s in shape["data_spaces"]}
        assert set(instance["densities"]) == set(spaces)
        assert {n for p in spaces.values() for axis in p for term in axis for n in term} == names
        assert size(spaces["Weights"], instance) == w.macs // math.prod((w.rows, *w.out))
        assert size(spaces["Outputs"], instance) == w.rows * w.groups * w.outputs * math.prod(w.out)
        assert size(spaces["Inputs"], instance) == w.rows * w.groups * w.inputs * math.prod(w.read)
        assert instance["densities"]["Inputs"]["density"] == pytest.approx(w.input_density, rel=1e-5)
        assert f"layer {w.name} " in text and "hypergeometric, against" in text and "distance" in text


def size(projection: list[list[list[str]]], instance: dict[str, Any]) -> int:
    """Elements of a data space: of each axis the farthest place, and one."""
    sides = []
    for axis in projection:
        far = sum((instance[t[0]] - 1) * (instance[t[1]] if len(t) > 1 else 1) for t in axis)
        sides.append(far + 1)
    return math.prod(sides)


def test_without_tiles_the_files_say_so(net: Net, images: torch.Tensor, tmp_path: Path) -> None:
    report = profile(net, [images], codecs=[], engine=False)
    report.export("timeloop", tmp_path / "out")
    assert "was not measured" in (tmp_path / "out" / "000_a.yaml").read_text()


CONFIG = """
[general]
run_name = run
[architecture_presets]
ArrayHeight: 8
ArrayWidth: 8
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: ws
Bandwidth: 10
ReadRequestBuffer: 32
WriteRequestBuffer: 32
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
SparseRep: ellpack_block
OptimizedMapping: false
BlockSize: 8
RandomNumberGeneratorSeed: 40
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


def test_scalesim_runs_the_topology_unchanged(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scalesim")
    from scalesim.memory import double_buffered_scratchpad_mem
    from scalesim.scale_sim import scalesim
    from scalesim.topology_utils import topologies

    done = report.export("scalesim", tmp_path / "out")
    left = {x.name: x.why for x in done.left_out}
    assert set(left) == {"t", "d", "DP"} and "dilation" in left["d"] and "strides 1 and 2" in left["DP"]
    path = tmp_path / "out" / "topology.csv"
    assert "no density of activations" in path.read_text().splitlines()[0]
    topology = topologies()
    topology.load_arrays(str(path))
    topology.topo_calc_hyperparams()
    macs: dict[str, int] = {}
    for row, (_, _, count, _) in zip(topology.topo_arrays, topology.layers_calculated_hyperparams):
        number = row[0].removeprefix("DP_")[:3]
        macs[number] = macs.get(number, 0) + count
    found, _ = workloads(report.to_dict())
    assert macs == {f"{w.number:03}": w.macs for w in found if w.name not in left}
    (tmp_path / "scale.cfg").write_text(CONFIG)
    (tmp_path / "layout.csv").write_text("Layer name,\n")  # version 3 reads one, used or not
    monkeypatch.chdir(tmp_path)
    # 3.0.0 takes int() of the largest of arrays of one element, which NumPy 2.4 refuses
    memory = double_buffered_scratchpad_mem
    monkeypatch.setattr(memory, "max", lambda *x: np.max(max(*x)), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = scalesim(
            save_disk_space=True, verbose=False, config="scale.cfg", topology=str(path), layout="layout.csv"
        )
        run.run_scale(top_path=str(tmp_path / "logs"))
    reports = list((tmp_path / "logs").rglob("COMPUTE_REPORT.csv"))
    with reports[0].open() as file:
        assert len(list(csv.reader(file))) == 1 + len(topology.topo_arrays)


def test_stonne_tensors_give_the_layers_output(
    report: Any, net: Net, images: torch.Tensor, tmp_path: Path
) -> None:
    done = report.export("stonne", tmp_path / "out", model=net, batch=images)
    assert {x.name for x in done.left_out} == {"t", "d", "DP"}
    seen = operands(net, images[:1])
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == done.layers
    for row in rows:
        k = {n: int(v) for n, v in row.items() if n not in ("folder", "layer")}
        folder = tmp_path / "out" / row["folder"]
        x = torch.from_numpy(np.fromfile(folder / "ifmap.f32", "<f4")).reshape(k["X"], k["Y"], k["C"])
        weight = torch.from_numpy(np.fromfile(folder / "filters.f32", "<f4"))
        weight = weight.reshape(k["K"], k["R"], k["S"], k["C"] // k["G"]).permute(0, 3, 1, 2)
        y = F.conv2d(x.permute(2, 0, 1)[None], weight, None, k["strides"], groups=k["G"])
        m, _, out = seen[row["layer"]]
        if isinstance(m, nn.Linear):
            out = out.transpose(1, 2)[..., None]
        elif out.dim() == 3:
            out = out[:, :, None]
        bias = m.bias.detach().reshape(1, -1, 1, 1)
        assert torch.allclose(y + bias, out.reshape(y.shape), atol=1e-4), row["layer"]
    commands = (tmp_path / "out" / "commands.sh").read_text().splitlines()
    assert len([c for c in commands if c.startswith("./stonne -SparseGEMM")]) == len(rows)


def test_a_saved_report_can_be_exported(report: Any, tmp_path: Path) -> None:
    report.to_json(tmp_path / "r.json")
    for kind in ("timeloop", "scalesim"):
        again = load_report(tmp_path / "r.json").export(kind, tmp_path / f"{kind}2")
        report.export(kind, tmp_path / kind)
        for path in (tmp_path / kind).iterdir():
            assert path.read_bytes() == (again.folder / path.name).read_bytes()


def test_a_folder_is_written_whole_or_not_at_all(
    report: Any, net: Net, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists"):
        report.export("timeloop", tmp_path / "there")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    with pytest.raises(InputError, match="link exists"):
        report.export("timeloop", tmp_path / "link")
    with pytest.raises(DataError, match="there is no folder"):
        report.export("timeloop", tmp_path / "a" / "b")
    with pytest.raises(InputError, match="timeloop, scalesim, stonne"):
        report.export("gem5", tmp_path / "out")
    with pytest.raises(InputError, match="model and batch"):
        report.export("stonne", tmp_path / "out")
    monkeypatch.setattr("actzip.profile.timeloop._comment", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.export("timeloop", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]


def test_a_report_without_layers_or_of_an_older_version_is_said(report: Any, tmp_path: Path) -> None:
    none = profile(nn.ReLU(), [torch.randn(1, 3, 4, 4)], codecs=[], engine=False)
    with pytest.raises(InputError, match="no convolution"):
        none.export("scalesim", tmp_path / "out")
    old = report.to_dict()
    for row in old["layers"]:
        del row["read_shape"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="no convolution"):
        load_report(tmp_path / "old.json").export("scalesim", tmp_path / "out")


def test_the_command_line_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["profile", "lenet5", "--images", "1", "--codecs", "none", "--no-engine"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("timeloop", "scalesim", "stonne"):
            result = CliRunner().invoke(build(), [*options, "--export", kind, kind])
            assert result.exit_code == 0, result.output
        result = CliRunner().invoke(build(), [*options, "--export", "timeloop", "timeloop"])
        assert isinstance(result.exception, InputError) and "exists" in str(result.exception)
        result = CliRunner().invoke(build(), [*options, "--export", "timelop", "x"])
        assert "did you mean 'timeloop'" in str(result.exception)
        result = CliRunner().invoke(build(), [*options, "--tiles", "8x8"])
        assert isinstance(result.exception, InputError) and "8x8x16" in str(result.exception)
    assert "tiles of 8x8x1" in (tmp_path / "timeloop" / "000_conv1.yaml").read_text()
    assert (tmp_path / "stonne" / "000_conv1" / "ifmap.f32").stat().st_size == 4 * 28 * 28
