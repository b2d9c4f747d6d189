"""Engines in processes of their own (``_engines.py``), timed in turns: what ``actzip bench`` and
benchmarks/engine share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "AVX2_AT_MOST",
    "DENSE",
    "NO_AVX2_CAP",
    "Worker",
    "convert_ncnn",
    "export_ncnn",
    "export_onnx",
    "take_turns",
]

#: Engines whose time does not depend on zeros.
DENSE = ("torch", "torch channels_last", "torch.compile", "onnxruntime", "openvino", "ncnn")

_TORCH = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
#: Variables that keep an engine from using more than AVX2 (oneDNN's, and each one's own for its
#: other kernels).
AVX2_AT_MOST = {
    "torch": _TORCH,
    "torch channels_last": _TORCH,
    "torch.compile": _TORCH,  # ATen's is asked for generated code too
    "openvino": {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2", "OV_CPU_MAX_ISA": "AVX2"},
    "deepsparse": {"NM_ARCH": "avx2"},
    "actzip": {"ACTZIP_ISA": "avx2"},
}
#: Why the others are not kept from it.
NO_AVX2_CAP = {
    "onnxruntime": "its kernels (MLAS) take no order to stay at AVX2",
    "ncnn": "it takes no order to stay at AVX2",
}


class Worker:
    """One engine's process, ready to be timed; where it cannot run, ``info["skip"]`` says why.

    Args:
        spec: see ``_engines.py``.
        env: environment variables besides those that the thread counts take.
        skip: do not start it, for this reason.

    Attributes:
        info: what it said when it was ready (``version``, ``seconds``).
        ms: times of all runs.
        peak: peak memory of the process in bytes.
    """

    def __init__(
        self, engine: str, spec: dict[str, Any], env: dict[str, str] | None = None, skip: str = ""
    ) -> None:
        self.engine, self.output = engine, str(spec.get("output", ""))
        self.ms: list[float] = []
        self.peak = 0
        self.info: dict[str, Any] = {"skip": skip} if skip else {}
        self._process: subprocess.Popen[str] | None = None
        python = sys.executable
        if engine == "deepsparse":
            python = os.environ.get("ACTZIP_DEEPSPARSE_PYTHON", "")
            if not python:
                self.info = {"skip": "ACTZIP_DEEPSPARSE_PYTHON names no Python that has it"}
        if self.info:
            return
        count = str(spec["threads"])
        script = str(Path(__file__).with_name("_engines.py"))
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", script, engine, json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env={**os.environ, "OMP_NUM_THREADS": count, "ACTZIP_NUM_THREADS": count, **(env or {})},
            )  # fmt: skip
        except OSError as error:
            self.info = {"skip": f"{python}: {error.strerror or error}"}
            return
        self.info = self._answer()
        self.peak = int(self.info.get("peak_bytes", 0))

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        return dict(json.loads(line)) if line else {"skip": self._death()}

    def _death(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        return f"its process ended with {how}" + (f": {lines[-1]}" if lines else "")

    def _ask(self, line: str) -> dict[str, Any]:
        """The answer; a process that ended is marked as one to skip."""
        if "skip" in self.info:
            return {}
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._answer()
        except BrokenPipeError:
            answer = {"skip": self._death()}
        if "skip" in answer:
            self.info = answer
            return {}
        return answer

    def time(self, runs: int, seconds: float) -> None:
        """Times ``runs`` more runs, or as many as ``seconds`` allow: one at least."""
        answer = self._ask(f"run {runs} {seconds}")
        self.ms += answer.get("ms", [])
        self.peak = max(self.peak, int(answer.get("peak_bytes", 0)))

    def explain(self) -> dict[str, Any] | None:
        """What a compiled model says of itself; None for other engines."""
        return self._ask("explain").get("explain")

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def take_turns(
    workers: Sequence[Worker],
    rounds: int,
    runs: int,
    seconds: float,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Times ``runs`` runs of each worker, ``rounds`` times in turns, so that what else the machine
    does hits all alike.

    Once ``seconds`` have passed no other round begins; in a round each worker gets an equal share
    of them, and does one run at least.
    """
    end = time.monotonic() + seconds
    live = sum("skip" not in w.info for w in workers)
    for i in range(rounds):
        if i and time.monotonic() > end:
            break
        for w in workers:
            w.time(runs, seconds / rounds / max(live, 1))
        after()


def export_onnx(net: Any, x: Any, path: Path, opset: int = 17) -> str:
    """Writes the model as ONNX with the batch of ``x``; why not, else ''."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net, (x,), str(path), dynamo=False, opset_version=opset)
    except Exception as error:
        return f"no ONNX export: {_first_line(error)}"
    return ""


def export_ncnn(net: Any, x: Any, folder: Path) -> tuple[str, str]:
    """Converts the model for ncnn with pnnx, float32: what ``ncnn`` is in a spec, and why not, else ''."""
    import torch

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(net, x[:1]), str(folder / "net.pt"))  # type: ignore[no-untyped-call]
    except Exception as error:
        return "", f"the model cannot be traced for pnnx: {_first_line(error)}"
    return convert_ncnn(folder / "net.pt", (1, *x.shape[1:]))


def convert_ncnn(file: Path, shape: tuple[int, ...]) -> tuple[str, str]:
    """:func:`export_ncnn` of a traced module's or ONNX file, beside which the result goes."""
    file = file.resolve()  # pnnx writes beside the file it reads, and is run there
    program = next((p for p in _programs("pnnx") if p.is_file()), None)
    if program is None:
        return "", "pnnx is not installed, which converts the model"
    done = subprocess.run(
        [program, file, f"inputshape=[{','.join(map(str, shape))}]", "fp16=0"],
        cwd=file.parent,
        capture_output=True,
        text=True,
    )
    made = file.with_suffix(".ncnn")
    if done.returncode or not made.with_suffix(".ncnn.param").is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        return "", f"pnnx does not convert the model (code {done.returncode}): {lines[-1] if lines else ''}"
    return str(made), ""


def _programs(name: str) -> Iterable[Path]:
    import shutil

    yield Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found:
        yield Path(found)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
