"""Parts of maps that are written to: slice_scatter, select_scatter, ScatterND, ScatterElements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actzip.errors import UnsupportedError
from actzip.runtime.interpret import interpret
from actzip.runtime.tracing import capture
from wrapped import Of


def ghost(x):
    """The skipping sum of a GhostNet: in place, on a part of a concatenation."""
    y = torch.cat([x, x * 2], 1)[:, :6]
    y += x.repeat(1, 2, 1, 1)[:, :6]
    return y


def head(x):
    """Of a YOLOv5 in inference."""
    y = x.sigmoid().view(-1, 2, 2, 6, 6).permute(0, 1, 3, 4, 2).contiguous()
    y[..., 0:1] = y[..., 0:1] * 2 - 0.5
    y[..., 1] = 3.0
    return y.view(x.shape[0], -1, 2)


def filled(x):
    y = x.new_zeros(x.shape[0], 6, 8, 8)
    y[:, 1:5, 1:7, 1:-1] = x
    y[:, -1].fill_(2.0)
    y[:, 2:2] = 7.0
    return y


def swapped(x):
    y = x.clone()
    y[:, 0], y[:, 1] = x[:, 1], x[:, 0]
    y[:] = y + 1
    y[:, 3:].relu_()
    return y


@pytest.mark.parametrize("form", [ghost, head, filled, swapped], ids=lambda f: f.__name__)
def test_parts_of_maps_that_are_written_in_place(form):
    torch.manual_seed(0)
    model = Of(form).eval()
    graph = capture(model, torch.randn(1, 4, 6, 6))
    for n in (1, 3):
        x = torch.randn(n, 4, 6, 6)
        (y, *_), _ = interpret(graph, {graph.inputs[0]: x})
        torch.testing.assert_close(y, model(x))


def test_a_write_to_every_other_row_is_refused_by_name():
    def f(x):
        y = x.clone()
        y[:, :, ::2] = 0.0
        return y

    with pytest.raises(UnsupportedError, match="every other"):
        capture(Of(f), torch.randn(1, 4, 6, 6))


def scattered(op, x, indices, updates, **attributes):
    """What our graph of one node gives, and what ONNX's definition of the operator does."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from actzip.runtime.from_onnx import from_onnx

    made = helper.make_graph(
        [helper.make_node(op, ["x", "i", "u"], ["y"], **attributes)],
        "g",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(a.shape))
            for name, a in (("x", x), ("u", updates))
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(indices, "i")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    feed = {"x": x, "u": updates}
    want = x.copy()
    for at in np.ndindex(indices.shape[:-1] if op == "ScatterND" else indices.shape):
        place = list(indices[at]) if op == "ScatterND" else list(at)
        if op == "ScatterElements":
            place[attributes.get("axis", 0)] = indices[at]
        want[tuple(place)] = updates[at]
    (got,), _ = interpret(from_onnx(model), {k: torch.from_numpy(v) for k, v in feed.items()})
    return got.numpy(), want


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    at = [sorted(draw(st.tuples(st.integers(0, d - 1), st.integers(1, d)))) for d in shape]
    return (
        shape,
        [(a, max(a + 1, b)) for a, b in at],
        draw(st.integers(0, len(shape) - 1)),
        draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(boxes())
def test_a_block_that_onnx_writes_is_the_definitions(case):
    shape, box, axis, negative = case
    random = np.random.default_rng(0)
    x = random.normal(size=shape).astype(np.float32)
    # ScatterND: indices of the first dimensions, updates whole in the others
    box_nd = box[: axis + 1]
    at = np.stack(np.meshgrid(*[np.arange(a, b) for a, b in box_nd], indexing="ij"), -1)
    at = at - np.array(shape[: axis + 1]) if negative else at
    updates = random.normal(size=(*at.shape[:-1], *shape[axis + 1 :])).astype(np.float32)
    got, want = scattered("ScatterND", x, at.astype(np.int64), updates)
    np.testing.assert_array_equal(got, want)
    # ScatterElements: the updates begin at 0 but for one axis
    sizes = [b - a for a, b in box]
    at = np.arange(*box[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    at = np.broadcast_to(at - (shape[axis] if negative else 0), sizes)
    updates = random.normal(size=sizes).astype(np.float32)
    got, want = scattered("ScatterElements", x, at.astype(np.int64), updates, axis=axis)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("op", "indices", "more"),
    [
        ("ScatterND", [[0], [2]], {}),  # two rows that are no neighbours
        ("ScatterND", [[1], [0]], {}),
        ("ScatterND", [[0], [0]], {}),
        ("ScatterND", [[0], [1]], {"reduction": "add"}),
        ("ScatterElements", [[0, 1, 0, 1], [1, 0, 1, 0]], {}),
    ],
)
def test_other_writes_are_refused_and_not_computed_wrongly(op, indices, more):
    x = np.zeros((3, 4), np.float32)
    with pytest.raises(UnsupportedError, match=r"block|reduction"):
        scattered(op, x, np.array(indices, np.int64), np.ones((2, 4), np.float32), **more)


def test_indices_outside_of_the_tensor_are_refused():
    from actzip.runtime.ops.scatter import _box, _box_along

    assert _box(np.array([[2], [3]]), (3, 4)) is None and _box(np.array([[-4], [-3]]), (3, 4)) is None
    assert _box(np.array([3, 4]), (3, 4)) is None and _box(np.zeros((1, 3), int), (3, 4)) is None
    assert _box_along(np.zeros((1, 4), int), (3, 4), 2) is None
    assert _box_along(np.full((1, 4), 3), (3, 4), 0) is None
