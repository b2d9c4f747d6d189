"""Parts that do not compile are cut at the node that fails, and what runs elsewhere is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import ActzipWarning, UnsupportedError
from actzip.runtime import ops
from actzip.runtime.blame import MOST_CUTS, first_failing, reasons
from actzip.runtime.registry import LOWER


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_the_first_node_that_fails_is_found(count: int) -> None:
    for bad in range(count):
        asked: list[int] = []

        def fails(n: int, bad: int = bad, asked: list[int] = asked) -> bool:
            asked.append(n)
            return n > bad

        assert first_failing(count, fails) == bad
        assert len(asked) <= count.bit_length() and 0 not in asked


def test_reasons_are_said_once() -> None:
    assert reasons(["a", "b", "a", ""]) == "a; b"
    assert reasons("abcd", 2) == "a; b; and 2 more"


class Steps(nn.Module):
    """Convolutions with a softmax after some, a sort (which the engine lacks) where asked for."""

    def __init__(self, softmaxes: int, sort: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(softmaxes + 1))
        self.sort = sort

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs[:-1]:
            x = conv(x).relu()
            x = x.sort(1)[0] if self.sort else x
            x = (3 * x).softmax(1) + x
        return self.convs[-1](x)


@pytest.fixture
def no_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(low: Any, n: Any) -> None:
        raise UnsupportedError(f"{n.where()}: no softmax today")

    monkeypatch.setitem(LOWER, ops.Softmax, refused)


def kernels(fast: Any) -> list[str]:
    return [r.op for r in fast.explain(runs=1).rows]


@torch.no_grad()
@pytest.mark.parametrize("sort", [True, False])
def test_a_part_of_a_module_is_cut_at_the_node_that_does_not_compile(no_softmax: None, sort: bool) -> None:
    torch.manual_seed(0)
    model = Steps(2, sort).eval()
    with pytest.warns(ActzipWarning, match="softmax.*no softmax today"):
        fast = actzip.compile(model, torch.randn(1, 4, 12, 9), tune=False, cache=False, threads=1)
    assert kernels(fast).count("conv2d") == 3
    why = fast.explain(runs=1).rows[-1].why
    assert "no softmax today" in why and "2 softmax" in why and ("sort" in why) == sort
    for shape in [(1, 4, 12, 9), (3, 4, 12, 9), (2, 4, 5, 20)]:
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=1e-5)


def test_parts_are_cut_a_bounded_number_of_times(no_softmax: None) -> None:
    model = Steps(MOST_CUTS + 3, False).eval()
    x = torch.randn(1, 4, 6, 6)
    with pytest.warns(ActzipWarning, match="no softmax today"):
        fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=1e-5)
    assert 0 < kernels(fast).count("conv2d") < MOST_CUTS + 4


@torch.no_grad()
@pytest.mark.parametrize("softmaxes, sort", [(2, True), (2, False), (MOST_CUTS + 3, False)])
def test_a_part_of_a_file_is_cut_at_the_node_that_does_not_compile(
    no_softmax: None, softmaxes: int, sort: bool, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, path = Steps(softmaxes, sort).eval(), str(tmp_path / "m.onnx")
    x = torch.randn(1, 4, 12, 9)
    names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n", 2: "h", 3: "w"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=False, **names)
    with pytest.warns(ActzipWarning, match="does not compile.*no softmax today"):
        fast = actzip.compile(path, x, tune=False, cache=False, threads=1)
    rows = fast.explain(runs=1).rows
    convs = [r for r in rows if r.op == "conv2d"]
    assert len(convs) == 3 if softmaxes == 2 else 0 < len(convs) < MOST_CUTS + 4
    assert any("no softmax today" in r.why for r in rows if r.op == "onnxruntime")
    for shape in [(1, 4, 12, 9), (2, 4, 5, 20)]:
        x = torch.randn(shape)
        np.testing.assert_allclose(fast(x.numpy()), model(x).numpy(), atol=2e-5, rtol=1e-5)


def test_a_file_without_onnx_runtime_says_what_did_not_compile(
    no_softmax: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "m.onnx")
    x = torch.randn(1, 4, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Steps(1, False).eval(), (x,), path, dynamo=False)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"no softmax today.*pip install onnxruntime"):
        actzip.compile(path, x, tune=False, cache=False)


def test_warnings_point_at_the_users_line(no_softmax: None) -> None:
    x = torch.randn(1, 4, 8, 8)
    with pytest.warns(ActzipWarning, match="run in PyTorch") as caught:
        actzip.compile(Steps(1, True).eval(), x, tune=False, cache=False)
    assert {Path(w.filename).name for w in caught if w.category is ActzipWarning} == {Path(__file__).name}
