"""ONNX's backend interface: its own node tests on the engine and on the Graph's reference semantics.

All 1884 cases, with counts of each operator: benchmarks/integrations/onnx_backend.py.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip.onnx_backend as backend  # noqa: E402
from actzip.errors import InputError  # noqa: E402
from actzip.onnx_backend import ActzipBackend, BackendIsNotSupposedToImplementIt  # noqa: E402
from actzip.runtime.from_onnx import OPERATORS  # noqa: E402
from actzip.runtime.interpret import interpret  # noqa: E402

RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "integrations" / "onnx-backend.json"
SHARE = 4


class Interpreted(ActzipBackend):
    """The Graph as PyTorch computes it, instead of the engine."""

    @staticmethod
    def runner(graph):
        def run(inputs):
            values = {n: torch.from_numpy(np.array(x)) for n, x in zip(graph.inputs, inputs, strict=True)}
            return [o.numpy() for o in interpret(graph, values)[0]]

        return run


@pytest.fixture(scope="module")
def cases():
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(load_model_tests(kind="node"), key=lambda c: c.name)


def run_cases(which, cases):
    """(passed, unsupported, failed) names, with the tolerances of the cases."""
    passed, unsupported, failed = [], [], []
    for case in cases:
        try:
            for inputs, outputs in case.data_sets:
                got = which.prepare(case.model).run(inputs)
                assert len(got) == len(outputs)
                for a, b in zip(got, outputs, strict=True):
                    want = numpy_helper.to_array(b) if hasattr(b, "data_type") else np.asarray(b)
                    assert a.shape == want.shape and a.dtype == want.dtype
                    np.testing.assert_allclose(a, want, rtol=case.rtol, atol=case.atol)
            passed.append(case.name)
        except BackendIsNotSupposedToImplementIt:
            unsupported.append(case.name)
        except Exception as error:
            failed.append(f"{case.name}: {type(error).__name__}: {str(error)[:200]}")
    return passed, unsupported, failed


@pytest.mark.parametrize("which", [ActzipBackend, Interpreted])
def test_a_share_of_the_node_tests(cases, which):
    passed, _, failed = run_cases(which, cases[::SHARE])
    assert failed == []
    assert len(passed) >= 100
    record = json.loads(RECORD.read_text())
    if record["onnx"] == onnx.__version__:  # what the whole run found
        assert passed == [c.name for c in cases[::SHARE] if c.name in set(record["passed_cases"])]


def test_the_record_is_of_this_front_end():
    record = json.loads(RECORD.read_text())
    assert record["failed"] == 0 and record["passed"] == len(record["passed_cases"]) >= 500
    assert sorted(record["claimed_operators"]) == sorted(OPERATORS)
    assert not any(c["failed"] for c in record["claimed_operators"].values())


def test_models_nodes_and_devices():
    assert backend.supports_device("CPU") and not backend.supports_device("CUDA:0")
    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    (y,) = backend.run_node(helper.make_node("Relu", ["x"], ["y"]), [x])
    assert np.array_equal(y, np.maximum(x, 0))
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["y"])], "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert ActzipBackend.is_compatible(model)
    np.testing.assert_allclose(backend.run_model(model, [x])[0], np.sin(x), atol=1e-6)
    with pytest.raises(InputError, match="CPU"):
        backend.prepare(model, "CUDA:0")
    with pytest.raises(InputError, match="1: x"):
        backend.prepare(model).run([x, x])
    model.graph.node[0].op_type = "Hardmax"
    assert not ActzipBackend.is_compatible(model)
    with pytest.raises(BackendIsNotSupposedToImplementIt, match="Hardmax"):
        backend.run_model(model, [x])
