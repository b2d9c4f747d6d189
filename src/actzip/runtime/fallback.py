"""An ONNX file on the engine or with ONNX Runtime, whichever is quicker here: both are timed, by
turns, and the choice is said and explained."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actzip.errors import InputError, UnsupportedError, told
from actzip.runtime.binding import arrays_of
from actzip.runtime.drawn import drawn
from actzip.runtime.explain import Explanation
from actzip.runtime.graph import Array
from actzip.runtime.onnx_file import inputs_of, load_onnx
from actzip.runtime.parts import PartitionedModel, Plan, RefusedInput, line_of, runtime, types_of

__all__ = ["FallbackModel", "check_fallback", "quicker", "untimed"]

MARGIN = 0.95  # of the engine's time: ONNX Runtime has to take less, by the median and by the minimum
_LEAST, _MOST, _SECONDS = 5, 200, 1.0  # turns, and how long more than the least go on


def check_fallback(model: Any) -> None:
    """
    Raises:
        InputError: the model is no path of an ONNX file.
        UnsupportedError: ONNX Runtime is not installed.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(
            f"fallback=True takes the path of an ONNX file, not {type(model).__name__}: ONNX Runtime runs "
            "no other"
        )
    try:
        runtime()
    except UnsupportedError as error:
        raise UnsupportedError(
            "fallback=True needs ONNX Runtime to time the file with: `pip install onnxruntime`"
        ) from error


def untimed(model: Any, tune: bool) -> str:
    """Why a quantized model is not timed with ONNX Runtime; "" where it can be."""
    what = (
        "this file is quantized and the engine computes it in float32: ONNX Runtime's integers may be quicker"
    )
    if not isinstance(model, (str, os.PathLike)):
        return f"{what}; give compile() the file itself, and both are timed"
    try:
        runtime()
    except UnsupportedError:
        return f"{what}; where that is installed (`pip install onnxruntime`) both are timed"
    return "" if tune else f"{what}; tune=False times nothing, fallback=True times both"


def quicker(made: Any, source: str | os.PathLike[str], example: Any, threads: int) -> Any:
    """``made``, the compiled file ``source``; or a :class:`FallbackModel` with a warning, where ONNX
    Runtime runs the ``example`` in less than :data:`MARGIN` of its time."""
    model = load_onnx(Path(source))
    arrays = _shown(made, model, example)
    _open_declared(model, arrays)
    names = [v.name for v in inputs_of(model)]
    given = [arrays[n] for n in names]
    data = model.SerializeToString()
    del model
    try:
        other = FallbackModel(data, names, made, threads)
        other.run_elsewhere(given)
    except Exception as error:
        made.note = f"the engine runs it: {line_of(error)}"
        return made
    ours, theirs = _race(lambda: made.run(given), lambda: other.run_elsewhere(given))
    times = (
        f"{np.median(theirs):.4g} ms with ONNX Runtime, {np.median(ours):.4g} on the engine "
        f"(medians of {len(ours)} runs by turns)"
    )
    if not all(f(theirs) < MARGIN * f(ours) for f in (np.median, np.min)):
        made.note = f"the engine runs it: {times}"
        return made
    other.note = f"ONNX Runtime runs all of it, which is quicker here: {times}"
    other._sample = given
    made.rest()
    told(other.note)
    return other


def _shown(made: Any, model: Any, example: Any) -> dict[str, Array]:
    """The example by input, of the file's own types; random numbers where there is none or it is all
    zeros."""
    types = types_of(model)
    if isinstance(made, PartitionedModel):
        return dict(zip(made._names, made._sample, strict=True))
    graph = made.graph
    arrays = made._sample if example is None else arrays_of(graph, example, "example")
    rng = np.random.default_rng(0)
    return {
        v: np.ascontiguousarray(a if a.any() else drawn(rng, a.shape, str(types[v])), types[v])
        for v, a in zip(graph.inputs, arrays, strict=True)
    }


def _open_declared(model: Any, arrays: dict[str, Array]) -> None:
    """In place: where the file declares other sizes of its inputs than these, it declares none."""

    def fits(value: Any) -> bool:
        dims, array = value.type.tensor_type.shape.dim, arrays[value.name]
        return len(dims) == array.ndim and all(d.dim_value in (0, n) for d, n in zip(dims, array.shape))

    if all(fits(v) for v in inputs_of(model)):
        return
    for value in inputs_of(model):
        for i, d in enumerate(value.type.tensor_type.shape.dim):
            d.Clear()
            d.dim_param = f"{value.name}_{i}"
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]


def _race(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Milliseconds of both, by turns: who is first changes. It ends early where every run of ours was
    quicker."""
    times: tuple[list[float], list[float]] = ([], [])
    both = list(zip((ours, theirs), times, strict=True))
    for run, _ in both:
        run()
        run()
    end = time.perf_counter() + _SECONDS
    while len(times[0]) < _LEAST or (len(times[0]) < _MOST and time.perf_counter() < end):
        for run, took in both:
            start = time.perf_counter()
            run()
            took.append(1e3 * (time.perf_counter() - start))
        both.reverse()
        if len(times[0]) >= 3 and max(times[0]) < min(times[1]):
            break
    return times


class FallbackModel(PartitionedModel):
    """An ONNX file that ONNX Runtime runs, because it was quicker here: called, run, explained and
    pickled as a :class:`~actzip.runtime.compiled.CompiledModel`.

    The engine's is made again when it is needed: inputs of sizes that ONNX Runtime refuses run there,
    and :meth:`save` writes it.

    Attributes:
        threads: threads of a call.
        note: what runs it, and the times of both.
    """

    def __init__(self, model: bytes, names: Sequence[str], engine: Any, threads: int) -> None:
        self._engine = engine
        super().__init__(model, names, None, threads)
        self._plans[()] = Plan.elsewhere(model, names, self._outputs, threads)

    @property
    def quantized(self) -> bool:
        """Whether the file computes in integers."""
        return bool(self._engine.quantized)

    @property
    def engine(self) -> Any:
        """The same file on the engine, which takes memory from here on."""
        with self._lock:
            self._engine.wake()
        return self._engine

    def _open(self) -> None:
        super()._open()
        self._model = None  # its bytes are enough

    def _plan(self, arrays: Sequence[Array]) -> Plan:
        return self._plans[()]

    def run_elsewhere(self, inputs: list[Any]) -> list[Array]:
        """:meth:`run` with ONNX Runtime.

        Raises:
            RefusedInput: it refuses the sizes or values. InputError: as calling.
        """
        return super().run(inputs)

    def run(self, inputs: list[Any]) -> list[Array]:
        """Outputs as a flat list of arrays, for a flat list of inputs.

        Raises:
            InputError: as calling.
        """
        try:
            return self.run_elsewhere(inputs)
        except RefusedInput:
            outputs: list[Array] = self.engine.run(inputs)
            return outputs

    def explain(self, x: Any = None, *, runs: int = 10) -> Explanation:
        """What runs where and why, measured now on ``x`` (or on the example)."""
        try:
            return super().explain(x, runs=runs)
        except RefusedInput:
            found: Explanation = self.engine.explain(x, runs=runs)
            return found

    def says(self) -> str:
        return self.note

    def _reason(self, counts: str, why: list[str]) -> str:
        return f"quicker than the engine here: {counts}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the engine's model as a ``.actzip`` file, with a warning: where it is loaded, the
        engine runs it.

        Raises:
            DataError, UnsupportedError: as of the engine's own model.
        """
        written: Path = self.engine.save(path)
        told(
            f"{written} holds the engine's model, in float32, which was slower here: ONNX Runtime is in "
            "no .actzip file; pickle the model, or compile the ONNX file where it runs, to keep it"
        )
        return written
