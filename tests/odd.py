"""Odd objects for arguments, and what may come of them: a result, or an error that actzip raises on
purpose."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from actzip.errors import ActzipError


class Bare:
    """No number, no sequence, no text."""


class Broken:
    """An array that cannot be had."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no array today")


def plain() -> dict[str, Any]:
    """Objects of Python and numpy."""
    return {
        "None": None,
        "True": True,
        "text": "nonsense",
        "no text": "",
        "bytes": b"\x00\xff",
        "negative": -3,
        "zero": 0,
        "huge": 10**400,
        "large": 2**62,
        "fraction": 1.5,
        "nan": float("nan"),
        "inf": float("inf"),
        "tiny": 5e-324,
        "complex": 1 + 2j,
        "list": [1, "a", None],
        "no list": [],
        "tuple": (0, 2),
        "dict": {1: "a"},
        "names": {"a": "b"},
        "set": {1, 2},
        "slice": slice(None, None, -1),
        "slice of text": slice("a", "b"),
        "object": Bare(),
        "broken": Broken(),
        "type": int,
        "function": lambda *a, **k: None,
        "iterator": iter([1, 2]),
        "numbers": np.arange(6.0).reshape(2, 3),
        "no numbers": np.zeros((0, 3), np.float32),
        "objects": np.array([None, "a"], object),
        "dates": np.array(["2020-01-01"], "datetime64[D]"),
        "texts": np.array(["a", "b"]),
        "complexes": np.ones(3, np.complex64),
        "records": np.zeros((4, 5), [("x", "f4"), ("y", "u1")])["x"],
        "longs": np.ones(3, np.longdouble),
        "scalar": np.float32(np.nan),
        "whole scalar": np.int64(-5),
        "NaT": np.datetime64("NaT"),
        "gaps": memoryview(b"abcdef")[::2],
        "read only": memoryview(b"abcdef"),
    }


def tensors() -> dict[str, Any]:
    """Odd tensors and modules."""
    import torch

    x = torch.arange(6.0).reshape(2, 3)
    return {
        "tensor": x,
        "no tensor": x[:0],
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "complex tensor": torch.ones(3, dtype=torch.complex64),
        "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
        "negated": torch.ones(3, dtype=torch.complex64).conj().imag,
        "bytes tensor": torch.ones(2, 3, dtype=torch.uint8),
        "half": x.half(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "graph": x.clone().requires_grad_(),
        "nan tensor": torch.full((2, 3), float("nan")),
        "module": torch.nn.ReLU(),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }


def untyped(calls: Iterable[tuple[str, Callable[[], Any]]]) -> Iterator[str]:
    """Of calls by name: those that end in an error that is none of actzip's, or say nothing."""
    for name, call in calls:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except ActzipError as error:
            if len(str(error)) < 10:
                yield f"{name}: {error!r}"
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}".split("\n")[0][:200]


def saved_tensors_hooks() -> bool:
    """Whether some are in force."""
    import torch

    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)
    node = (x * torch.ones(2)).grad_fn
    try:
        node._raw_saved_other.register_hooks(lambda t: seen.append(1) or t, lambda t: t)
    except RuntimeError:  # hooks took the tensor already
        return True
    return not seen
