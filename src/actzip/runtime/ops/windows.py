"""Sizes, padding and the like of sliding windows, as each front end says them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actzip.errors import InputError
from actzip.runtime.graph import Dim, Sym
from actzip.runtime.onnx_node import OnnxNode

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer


def window(size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool) -> int:
    span = size + before + after - dilation * (kernel - 1) - 1
    if span < 0:
        raise InputError(
            f"a window of {kernel} (dilation {dilation}) does not fit {size} + {before} + {after}"
        )
    out = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (out - 1) * stride >= size + before:  # the last window must start inside (PyTorch's rule)
        out -= 1
    return out


def torch_two(v: Any) -> tuple[int, int]:
    v = [v] if isinstance(v, int) else list(v)
    return (int(v[0]), int(v[0])) if len(v) == 1 else (int(v[0]), int(v[1]))


def torch_three(v: Any) -> list[int]:
    v = [v] if isinstance(v, int) else list(v)
    return [int(d) for d in (v * 3 if len(v) == 1 else v)]


def torch_four(v: Any) -> tuple[int, int, int, int]:
    a, b = torch_two(v)
    return (a, b, a, b)


def onnx_pads(
    node: OnnxNode,
    spatial: Sequence[Dim],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    n = len(kernel)
    auto = node.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = node.ints("pads", [0] * (2 * n))
    elif auto == "VALID":
        pads = [0] * (2 * n)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * (2 * n)
        for i in range(n):
            size = spatial[i]
            if isinstance(size, Sym):
                raise node.refuse("a spatial dimension depends on the batch")
            out = -(-size // strides[i])
            total = max(0, (out - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size)
            small, large = total // 2, total - total // 2
            pads[i], pads[i + n] = (small, large) if auto == "SAME_UPPER" else (large, small)
    else:
        raise node.wrong(f"auto_pad {auto!r}")
    if len(pads) != 2 * n:
        raise node.wrong(f"{len(pads)} pads for {n} spatial dimensions")
    return pads


def onnx_spatial(node: OnnxNode, name: str, n: int, default: int) -> list[int]:
    values = node.ints(name, [default] * n)
    if len(values) != n:
        raise node.wrong(f"attribute {name!r} has {len(values)} numbers for {n} spatial dimensions")
    return values


def onnx_four(pads: list[int]) -> tuple[int, int, int, int]:
    """ONNX order (begins, ends) -> (top, left, bottom, right); one dimension becomes a row of height 1."""
    if len(pads) == 2:
        return (0, pads[0], 0, pads[1])
    return (pads[0], pads[1], pads[2], pads[3])


def onnx_two(values: list[int], fill: int = 1) -> tuple[int, int]:
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


def as_map(imp: Importer, x: Any, n: int) -> Any:
    """(N, C, L) -> (N, C, 1, L)."""
    shape = imp.shape(x)
    return imp.reshape(x, (shape[0], shape[1], 1, shape[2])) if n == 1 else x


def from_map(imp: Importer, y: Any, n: int) -> Any:
    shape = imp.shape(y)
    return imp.reshape(y, (shape[0], shape[1], shape[3])) if n == 1 else y
