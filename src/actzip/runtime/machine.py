"""What this machine is: its identity for the tuning cache, its peak, and advice on its units."""

from __future__ import annotations

import logging
import math
import threading

from actzip import cpu
from actzip._native import _engine
from actzip.errors import told


def identity() -> dict[str, str]:
    from actzip._version import __version__

    info = {"cpu": str(_engine.cpu_model()), "isa": str(_engine.isa()), "version": __version__}
    kernels = getattr(_engine, "kernels", None)
    if kernels is not None:  # another set of kernels makes old winners meaningless
        info["kernels"] = ",".join(row["name"] for row in kernels.table(info["isa"]))
    return info


_advised = False


def advise() -> None:
    """Once a process: on CPUs with matrix units dense low-precision engines are quicker than any
    float32 (a warning), with dot-product instructions they may be (a line in the log)."""
    global _advised
    if _advised:
        return
    _advised = True
    text = advice()
    if text and any(e.startswith("amx") for e in cpu.info()["extras"]):
        told(text)
    elif text:
        logging.getLogger("actzip").info(text)


def advice() -> str:
    """Where this CPU has units that make dense bfloat16 or int8 quicker than float32: which, else ''."""
    extras = [
        e
        for e in _engine.cpu_extras()
        if e.startswith("amx") or e in ("avx512_bf16", "avx512_vnni", "avx_vnni")
    ]
    if not extras:
        return ""
    strong = [e for e in extras if e.startswith("amx")]
    kinds = []
    if any("bf16" in e for e in extras):
        kinds.append("bfloat16")
    if any("vnni" in e or "int8" in e for e in extras):
        kinds.append("int8")
    how = (
        "is quicker than any float32 path"
        if strong
        else "may be quicker than float32, at its loss of accuracy"
    )
    return (
        f"this CPU has {', '.join(strong or extras)}: dense {' or '.join(kinds)} (OpenVINO, "
        f"ONNX Runtime) {how}"
    )


_peak_lock = threading.Lock()


_peaks: dict[str, float] = {}


def peak_gflops() -> float:
    """GFLOP/s of one core on the instruction set in use, measured once a process."""
    with _peak_lock:
        isa = str(_engine.isa())
        if isa not in _peaks:
            _peaks[isa] = float(_engine.peak_gflops(0.1))
        return _peaks[isa] if _peaks[isa] > 0 else math.nan
