"""What :func:`actzip.accelerate` gives: the changed network, what was promised, and what was measured."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actzip.accelerate.promise import Promise
from actzip.activations import set_thresholds
from actzip.errors import ActzipError, InputError
from actzip.files import write_text
from actzip.profile.work import Work, as_rows
from actzip.sparsify.judge import Judgement
from actzip.sparsify.thresholds import put_parameters

__all__ = ["Acceleration", "Attempt", "bars"]


@dataclass
class Attempt:
    """One candidate that was tried.

    Attributes:
        share: of the zeros' worth that is left, by the table.
        density, theoretical_speedup, predicted_ms: on the calibration inputs.
        choice: how it keeps what was promised, on the inputs of the choice; kept: whether it does.
        proof: the same on the inputs of the proof, where it came to that.
    """

    share: float
    density: float
    theoretical_speedup: float
    predicted_ms: float | None
    choice: Judgement
    kept: bool
    proof: Judgement | None = None


@dataclass
class Acceleration:
    """A faster network, and the proof of what it keeps.

    Attributes:
        name: of the model.
        model: the module: a copy with thresholds and repaired parameters, in eval mode; the
            original where nothing is met.
        promise: what was to be kept.
        before, after: :class:`actzip.accelerate.Work` of both.
        met: a faster network keeps the promise on held-out inputs that chose nothing. proven: so
            does its whole 95 % interval, and one answer for all inputs would not.
        judged: ``promised``, ``agreement``, ``error`` of the result on those inputs.
        tried: all candidates.
        note: why the network is unchanged, else "".
        compiled, compiled_before: both on the engine, where it takes them; ``not_compiled`` says
            why it does not.
        images: how many inputs calibrated, chose and proved.
    """

    name: str
    model: nn.Module
    promise: Promise
    before: Work
    after: Work
    example: Tensor
    threads: int | None = None
    met: bool = False
    proven: bool = False
    judged: dict[str, Judgement] = field(default_factory=dict)
    tried: list[Attempt] = field(default_factory=list)
    note: str = ""
    thresholds: dict[str, float | Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    compiled: Any = None
    compiled_before: Any = None
    not_compiled: str = ""
    images: dict[str, int] = field(default_factory=dict)
    original: nn.Module | None = None
    clock: dict[str, Any] = field(default_factory=dict)

    # -- making

    def unchanged(self, note: str) -> Acceleration:
        """This, as the result: nothing was changed, and why."""
        self.met = self.proven = False
        self.note = f"unchanged: {note}"
        self.original = self.model
        return self

    def with_point(
        self, thresholds: dict[str, float | Tensor], parameters: dict[str, Tensor], after: Work
    ) -> Acceleration:
        """This with the network changed."""
        made = copy.copy(self)
        made.original = self.model
        made.model = copy.deepcopy(self.model)
        for m in made.model.modules():
            m.training = False
        put_parameters(made.model, parameters)
        set_thresholds(made.model, thresholds)
        made.thresholds, made.parameters, made.after = thresholds, parameters, after
        return made

    def compiled_by(self, threads: int | None, step: Callable[[str, int, int], None]) -> Acceleration:
        """Compiles the original and the result."""
        from actzip.runtime import compile

        x = self.example
        try:
            step("compiling", 0, 2)
            self.compiled_before = compile(self.original or self.model, x, threads=threads)
            step("compiling", 1, 2)
            self.compiled = (
                compile(self.model, x, threads=threads) if self.thresholds else self.compiled_before
            )
            step("compiling", 2, 2)
        except ActzipError as error:
            self.compiled = self.compiled_before = None
            self.not_compiled = str(error)
        return self

    # -- using

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the result gives: by the engine where it is compiled, else by PyTorch."""
        if self.compiled is not None:
            return self.compiled(*args, **kwargs)
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the compiled network as one file, for :func:`actzip.runtime.load`.

        Raises:
            InputError: it is not compiled. DataError: the file cannot be written.
        """
        if self.compiled is None:
            raise InputError(f"there is no compiled network to save: {self.not_compiled or 'compile=False'}")
        made: Path = self.compiled.save(path)
        return made

    def export(self, path: str | os.PathLike[str], *, opset: int = 17) -> Path:
        """Writes an ONNX file that other engines run to the same numbers.

        Raises:
            UnsupportedError: PyTorch cannot export an operator. DataError: the file cannot be
                written.
        """
        from actzip.runtime.onnx_export import export_onnx

        fixed = getattr(self.model, "batch", None)
        return export_onnx(self.model, self.example, Path(path), opset=opset, dynamic_batch=fixed is None)

    def time(self, *, rounds: int = 10, engines: bool = True) -> dict[str, Any]:
        """Milliseconds of the original and the result on the engine, and of the original on other
        installed engines."""
        from actzip.accelerate.clock import race

        self.clock = race(self, rounds=rounds, engines=engines)
        return self.clock

    # -- saying

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.name,
            "promise": str(self.promise),
            "met": self.met,
            "proven": self.proven,
            "doubt": self.doubt,
            "note": self.note,
            "images": self.images,
            "judged": {k: j.as_dict() for k, j in self.judged.items()},
            "before": _plain(self.before),
            "after": _plain(self.after),
            "tried": [asdict(t) for t in self.tried],
            "layers": as_rows(self.before, self.after),
            "not_compiled": self.not_compiled,
            "clock": self.clock,
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Writes :meth:`to_dict` whole or not at all."""
        return write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the one-page report."""
        from actzip.accelerate.page import render

        return write_text(path, render(self.to_dict()))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    @property
    def doubt(self) -> str:
        """Why a promise that is met is not proven, else ""."""
        if not self.met or self.proven:
            return ""
        if self.promise.by_chance(self.judged["promised"]):
            return (
                "one answer for all inputs would keep the promise: give inputs of more classes, "
                "or promise a max_error"
            )
        return "the interval reaches beyond the promise: more held-out inputs would narrow it"

    def lines(self) -> list[str]:
        """The verdict, in a few lines."""
        b, a = self.before, self.after
        out = [self.note] if self.note else [_verdict(self)]
        if not self.note:
            out.append(f"kept on {self.images['prove']} held-out inputs: {self.judged['promised']}")
            out += [self.doubt] if self.doubt else []
            out.append(f"density {b.density:.3f} -> {a.density:.3f}")
        work = f"theoretical speed-up {b.theoretical_speedup:.2f}x -> {a.theoretical_speedup:.2f}x"
        if b.ms is not None and a.ms is not None:
            work += f"; predicted {b.ms:.2f} -> {a.ms:.2f} ms"
        out.append(work)
        if self.not_compiled:
            out.append(f"not compiled: {self.not_compiled}")
        return out


def _verdict(found: Acceleration) -> str:
    b, a = found.before, found.after
    less = b.effective_macs / a.effective_macs if a.effective_macs else float("inf")
    text = f"{less:.2f}x less work than with natural zeros"
    if b.ms and a.ms:
        text += f", predicted {b.ms / a.ms:.2f}x as fast"
    return f"{text}; promise ({found.promise}) met"


def _plain(work: Work) -> dict[str, Any]:
    return {
        "density": work.density,
        "macs": work.macs,
        "effective_macs": work.effective_macs,
        "theoretical_speedup": work.theoretical_speedup,
        "predicted_ms": work.ms,
        "densities": work.densities,
    }


@contextmanager
def bars(also: Callable[[str, int, int], None] | None) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar as the function that moves it."""
    from rich.console import Console

    from actzip.progress import display

    with display(Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=None)

        def step(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)
            if also is not None:
                also(what, done, of)

        yield step
