"""Native engine of actzip."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

from _engine import kernels as kernels, training as training


def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """The instruction sets that this CPU can run, best last."""

def force_isa(name: str) -> bool:
    """
    Force an instruction set in this module ('' for the best); False if it cannot run here.
    """

def isa_warning() -> str:
    """What was wrong with ACTZIP_ISA, or ''."""

def cpu_model() -> str:
    """The CPU's own name."""

def cpu_extras() -> list[str]:
    """Features beyond the ladder: AMX, VNNI, bfloat16."""

def default_threads() -> int:
    """Threads used where none are given."""

class Plan:
    """A compiled network; see docs/engine.md."""

    def run(self, batch: int, inputs: Sequence[Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]], outputs: Sequence[Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')]], threads: int = 0) -> None: ...

    def profile(self, batch: int, inputs: Sequence[Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]], outputs: Sequence[Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')]], threads: int = 0) -> list:
        """(op, name, kernel, kind, seconds) of every node of one run."""

    def densities(self, batch: int, inputs: Sequence[Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)]], outputs: Sequence[Annotated[NDArray[numpy.float32], dict(order='C', device='cpu')]], threads: int = 0) -> list[float]:
        """
        Share of non-zeros of every value that a node writes in one run, -1 for the others.
        """

    def shape(self, value: int, batch: int) -> list[int]: ...

    def arena_bytes(self, batch: int) -> int: ...

    def weight_bytes(self) -> int: ...

    def spilled_bytes(self) -> int: ...

    def release(self) -> None:
        """Frees the memory of idle contexts."""

class PlanBuilder:
    """Values and nodes of a Plan to be; see docs/engine.md."""

    def __init__(self) -> None: ...

    def value(self, name: str, dims: Sequence[int], batch: Sequence[bool], layout: str = 'plain', parent: int = -1, offset: int = 0, parts: Sequence[int] = [], type: str = 'f32', scales: Sequence[float] = [], tops: Sequence[float] = [], density: float = 1.0, data: object | None = None, band: int = 0) -> int: ...

    def node(self, op: str, name: str, inputs: Sequence[int], output: int, ints: Mapping[str, Sequence[int]] = {}, floats: Mapping[str, Sequence[float]] = {}, arrays: dict = {}, strings: Mapping[str, str] = {}) -> None: ...

    def variants(self, op: str, name: str, inputs: Sequence[int], output: int, ints: Mapping[str, Sequence[int]] = {}, floats: Mapping[str, Sequence[float]] = {}, arrays: dict = {}, strings: Mapping[str, str] = {}) -> list[str]:
        """Kernel variants for a conv or linear node between values added before."""

    def input(self, value: int) -> None: ...

    def output(self, value: int) -> None: ...

    def build(self) -> Plan: ...

def operators() -> list[str]:
    """Operators that a node of a plan can have."""

def activations() -> list[str]:
    """Elementwise functions that nodes apply (strings 'act')."""

def peak_gflops(seconds: float = 0.05) -> float:
    """
    GFLOP/s of one core by a loop of FMAs in registers on the instruction set in use.
    """
