"""ONNX's own backend node tests on the engine: python benchmarks/integrations/onnx_backend.py

Runs ``onnx.backend.test.BackendTest`` (all node cases, CPU) against ``actzip.onnx_backend`` with
ONNX's own runner and tolerances, and writes benchmarks/results/integrations/onnx-backend.json:
which cases passed, which are reported as unsupported and why, which failed; and the counts of each
operator that the engine claims.
"""

from __future__ import annotations

import json
import unittest
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt

from actzip import onnx_backend
from actzip.files import write_text
from actzip.runtime.from_onnx import OPERATORS

RESULTS = Path(__file__).resolve().parent.parent / "results" / "integrations" / "onnx-backend.json"


class _Result(unittest.TestResult):
    """Notes which case runs, and what the backend says of it: ONNX's runner counts an unsupported
    case as passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = ""
        self.operators: dict[str, list[str]] = {}
        self.unsupported: dict[str, str] = {}
        self.ran: list[str] = []

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.now = test.id().rsplit(".", 1)[-1].removesuffix("_cpu")
        self.ran.append(self.now)


class _Recorded(onnx_backend.ActzipBackend):
    """The backend, telling ``result`` what it does not support."""

    result: _Result

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> Any:
        now = cls.result.now
        cls.result.operators[now] = sorted({n.op_type for n in model.graph.node})
        rep = super().prepare(model, device, **kwargs)
        run = rep.run

        def recorded(inputs: Any, **kw: Any) -> Any:
            try:
                return run(inputs, **kw)
            except BackendIsNotSupposedToImplementIt as error:
                cls.result.unsupported[now] = str(error)
                raise

        rep.run = recorded
        return rep


def main() -> None:
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    tests = onnx.backend.test.BackendTest(_Recorded, __name__)
    suite = unittest.TestSuite()
    for case in tests.test_cases.values():
        if case.__name__ == "OnnxBackendNodeModelTest":
            names = [n for n in dir(case) if n.startswith("test_") and n.endswith("_cpu")]
            suite.addTests(case(n) for n in names)
    result = _Recorded.result = _Result()
    suite.run(result)
    failed = {
        t.id().rsplit(".", 1)[-1].removesuffix("_cpu"): text.strip().splitlines()[-1][:300]
        for t, text in (*result.failures, *result.errors)
    }
    skipped = {t.id().rsplit(".", 1)[-1].removesuffix("_cpu"): why for t, why in result.skipped}
    unsupported = {**result.unsupported, **skipped}
    passed = [n for n in result.ran if n not in unsupported and n not in failed]
    single = {n: ops[0] for n, ops in result.operators.items() if len(ops) == 1}
    counts = {
        "passed": Counter(single[n] for n in passed if n in single),
        "unsupported": Counter(single[n] for n in unsupported if n in single),
        "failed": Counter(single[n] for n in failed if n in single),
    }
    document = {
        "command": "python benchmarks/integrations/onnx_backend.py",
        "onnx": onnx.__version__,
        "opset": onnx.defs.onnx_opset_version(),
        "cases": len(result.ran),
        "passed": len(passed),
        "unsupported": len(unsupported),
        "failed": len(failed),
        "claimed_operators": {op: {k: c[op] for k, c in counts.items()} for op in OPERATORS},
        "failed_cases": failed,
        "passed_cases": sorted(passed),
        "unsupported_cases": {n: " ".join(w.split())[:160] for n, w in sorted(unsupported.items())},
    }
    write_text(RESULTS, json.dumps(document, indent=1) + "\n")
    print(
        f"{len(passed)} passed, {len(unsupported)} unsupported, {len(failed)} failed of "
        f"{len(result.ran)} cases (onnx {onnx.__version__})"
    )


if __name__ == "__main__":
    main()
