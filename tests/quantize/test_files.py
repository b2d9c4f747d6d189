"""Scales on disk and in ONNX, both ways; the integers of ONNX Runtime are ours."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from test_model import Net

import actzip
from actzip.errors import ActzipWarning, DataError, InputError, LayerError
from actzip.quantize import integers, quantization
from actzip.quantize.files import (
    load_quantization,
    load_quantized,
    save_quantization,
    save_quantized,
)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 10, 10, generator=g)


@pytest.fixture
def quantized(data):
    torch.manual_seed(0)
    net = Net().eval()
    return actzip.quantize(net, data, bits={"*": 8, "relu6": 5}, per="channel", weights=8, inputs="conv1")


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_scales_come_back_exactly(quantized, data, tmp_path, suffix):
    path = tmp_path / f"deep/q.{suffix}"
    save_quantization(quantized, path)
    torch.manual_seed(0)
    other = load_quantization(Net().eval(), path)
    assert torch.equal(other(data), quantized(data))
    a, b = quantization(other), quantization(quantized)
    assert a.bits == b.bits and list(a.sites) == list(b.sites) and list(a.weights) == list(b.weights)
    assert [s.signed for s in a.sites.values()] == [s.signed for s in b.sites.values()]
    assert all(torch.equal(a.scales[n], b.scales[n]) for n in a.sites)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_weights_and_scales_together(quantized, data, tmp_path):
    save_quantized(quantized, tmp_path / "net.v1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.v1.json", "net.v1.safetensors"]
    other = load_quantized(Net().eval(), tmp_path / "net.v1")
    assert torch.equal(other(data), quantized(data))
    with pytest.raises(DataError, match="weights"):
        load_quantized(torch.nn.Linear(2, 2), tmp_path / "net.v1")


def test_damaged_files_are_data_errors(quantized, tmp_path):
    path = tmp_path / "q.json"
    save_quantization(quantized, path)
    good = json.loads(path.read_text())
    net = Net()
    for change, text in [
        (lambda d: d.update(format="x"), "not a file of scales"),
        (lambda d: d.update(version=9), "version 9"),
        (lambda d: d.update(maps=[1]), "no table|not a table"),
        (lambda d: d["maps"]["relu"].pop("scale"), "'relu' is damaged"),
        (lambda d: d["maps"]["relu"].update(scale=[-1.0]), "'relu' is damaged"),
        (lambda d: d["maps"]["relu"].update(bits=99), "'relu' is damaged"),
    ]:
        bad = json.loads(json.dumps(good))
        change(bad)
        path.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=text):
            load_quantization(net, path)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load_quantization(net, path)
    for name in ("none.json", "none.safetensors"):
        with pytest.raises(DataError, match="cannot be read"):
            load_quantization(net, tmp_path / name)
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read"):
        load_quantization(net, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"\.json or \.safetensors"):
        save_quantization(quantized, tmp_path / "q.yaml")


CASES = [
    {"bits": 8},
    {"bits": 4},
    {"bits": {"*": 8, "relu": 6}, "weights": 8},
    {"bits": 6, "per": "channel", "inputs": "all"},
    {"bits": 16, "weights": 8},
    {"bits": 11, "per": "channel", "weights": 12},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_onnx_there_and_back(data, tmp_path, options):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from actzip.quantize.onnx import export_qdq, import_qdq

    torch.manual_seed(0)
    net = Net(inplace=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActzipWarning)
        q = actzip.quantize(net, data, **options, observer="minmax")
    path = tmp_path / "net.onnx"
    export_qdq(q, data[:2], path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]

    back = import_qdq(Net().eval(), path, data[:2])
    back.load_state_dict(q.state_dict())
    a, b = quantization(q), quantization(back)
    assert a.bits == b.bits and set(a.weights) == set(b.weights)
    assert all(torch.equal(a.scales[n], b.scales[n]) for n in a.sites)
    assert torch.equal(back(data), q(data))

    # ONNX Runtime, another batch size: the first map's integers are the same where its float input is
    graph = onnx.load(str(path))
    tensors = {n.name: n for n in graph.graph.node if n.op_type == "QuantizeLinear"}
    assert set(tensors) == {f"actzip:{n}" for n in a.sites}
    for name in a.sites:
        graph.graph.output.append(onnx.ValueInfoProto(name=f"actzip:{name}/integers"))
    session_options = runtime.SessionOptions()
    session_options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(graph.SerializeToString(), session_options)
    out, *maps = session.run(None, {"input": data.numpy()})
    ours = integers(q, data)
    assert np.abs(out - q(data).detach().numpy()).max() <= 0.02 * np.abs(out).max()
    for name, m in zip(a.sites, maps):
        difference = np.abs(m.astype(np.int64) - ours[name].numpy().astype(np.int64))
        assert m.dtype == ours[name].numpy().dtype
        assert (difference != 0).mean() < 0.02, name  # sums in another order round differently near halves


def test_the_onnx_quantizer_itself_gives_our_integers(tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from actzip.quantize.onnx import export_qdq

    model = torch.nn.Sequential(torch.nn.ReLU())
    g = torch.Generator().manual_seed(9)
    x = torch.randn(4, 6, 16, 16, generator=g) * 3
    for bits in (4, 7, 8, 12, 16):
        q = actzip.quantize(model, x, bits=bits, observer="percentile", percentile=99.5)
        export_qdq(q, x, tmp_path / "relu.onnx")
        session = runtime.InferenceSession(str(tmp_path / "relu.onnx"))
        (out,) = session.run(None, {"input": x.numpy()})
        assert np.array_equal(out, q(x).detach().numpy()), bits


def test_scales_of_another_tool_are_matched_by_node_names(data, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    from actzip.quantize.onnx import import_qdq

    torch.manual_seed(0)
    net = Net().eval()
    torch.onnx.export(net, (data[:2],), str(tmp_path / "f.onnx"), dynamo=False, opset_version=17)

    class Reader(CalibrationDataReader):
        def __init__(self, name):
            self.items = iter([{name: data[:2].numpy()}, {name: data[2:4].numpy()}])

        def get_next(self):
            return next(self.items, None)

    name = onnx.load(str(tmp_path / "f.onnx")).graph.input[0].name
    quantize_static(
        str(tmp_path / "f.onnx"),
        str(tmp_path / "q.onnx"),
        Reader(name),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
    )
    with pytest.warns(ActzipWarning, match="left out"):
        q = import_qdq(net, tmp_path / "q.onnx", data[:2])
    sites = quantization(q).sites
    assert {"relu", "(model)"} <= set(sites)
    top = {}
    from actzip.activations import ActivationTap

    def watch(site, y):
        top[site.name] = float(y[:4].max())

    with ActivationTap(net, watch), torch.no_grad():
        quantization(net).enabled = False
        net(data[:4])
    for n in ("relu", "(model)", "silu"):
        assert sites[n].scale.item() * sites[n].range.qmax == pytest.approx(top[n], rel=0.02)
    with pytest.raises(LayerError, match="names"):
        import_qdq(net, tmp_path / "q.onnx", data[:2], names={name: "nowhere"})
    with pytest.raises(LayerError, match="none of its"):
        import_qdq(net, tmp_path / "f.onnx", data[:2])


def test_export_errors(quantized, data, tmp_path):
    pytest.importorskip("onnx")
    from actzip.quantize.onnx import export_qdq, read_qdq

    with pytest.raises(InputError, match="not quantized"):
        export_qdq(Net(), data, tmp_path / "x.onnx")
    wide = actzip.quantize(Net().eval(), data, bits=12)
    with pytest.raises(InputError, match="opset 17 is too old"):
        export_qdq(wide, data, tmp_path / "x.onnx", opset=17)
    with pytest.raises(DataError, match="no ONNX"):
        read_qdq(tmp_path / "x.onnx")
    (tmp_path / "y.onnx").write_bytes(b"\x08nonsense")
    with pytest.raises(DataError, match="no ONNX model"):
        read_qdq(tmp_path / "y.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["y.onnx"]
