"""What ONNX Runtime computes, as a node of a graph: for modules, not for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from actzip.errors import InputError
from actzip.runtime.graph import Node, Shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Elsewhere(Node):
    """One output of a node that ONNX Runtime runs.

    ``model`` holds the node alone, as an ONNX file; ``names`` and ``kinds`` are its inputs' names and
    types there, ``shape`` is the output's for the inputs that the graph was made for. It has no
    gradient.
    """

    model: bytes = b""
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    result: str = ""
    shape: Shape = ()

    op: ClassVar[str] = "elsewhere"
    arity: ClassVar[tuple[int, int]] = (0, 1 << 16)

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        return self.shape

    def run(self, args: Sequence[Tensor]) -> Tensor:
        """The output, float32 as all values of a graph.

        Raises:
            InputError: ONNX Runtime refuses the inputs.
        """
        import torch

        session = self.__dict__.get("session")
        if session is None:
            session = self.__dict__["session"] = self._open()
        given = {
            n: np.ascontiguousarray(a.detach().numpy().astype(kind))
            for n, kind, a in zip(self.names, self.kinds, args, strict=True)
        }
        try:
            (y,) = session.run([self.result], given)
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{self.where()}: ONNX Runtime refuses its inputs: {why}") from error
        return torch.from_numpy(np.asarray(y, np.float32))

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "session"}
