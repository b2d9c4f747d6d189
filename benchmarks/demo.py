"""The end of ``make demo``: the clock on this machine, one image a call, one thread.

First the sparse LeNet-5 that the demo trained, compiled, beside PyTorch and ONNX Runtime; then a
MobileNet-V1 for CIFAR-10 through ``actzip.accelerate``, without training. What is missing here
(data, weights, an engine) is left out in one line. Run as ``python benchmarks/demo.py out/demo``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from actzip import accelerate
from actzip.cli import bench
from actzip.cli.accelerate import clock_lines
from actzip.errors import DataError

RIVALS = ("torch", "torch channels_last", "onnxruntime")
WEIGHTS = "cifar10_mobilenet_v1"


def sparse_lenet(weights: Path, data: str = "mnist", *, rounds: int = 20, runs: int = 200) -> list[str]:
    """The sparse network on the engine, beside the rivals, each in a process of its own."""
    found = bench.run("lenet5", data, str(weights), 1, None, 1, list(RIVALS), rounds, runs, 20.0, False, True)
    rows = {r["engine"]: r for r in found["engines"]}
    left_out = {name: rows.pop(name)["skip"] for name in list(rows) if "skip" in rows[name]}
    dense = [name for name in RIVALS if name in rows]
    fastest = min(dense, key=lambda name: rows[name]["median_ms"], default=None)
    gain = rows["actzip"]["against_best_dense"] if "actzip" in rows else None
    clock = {
        **found,
        "engines": rows,
        "left_out": left_out,
        "fastest_dense": fastest,
        "against_fastest_dense": gain,
    }
    return clock_lines(clock)


def mobilenet_without_training(
    data: str = "cifar10",
    weights: str = WEIGHTS,
    *,
    images: int = 1536,
    attempts: int = 5,
    rounds: int = 20,
) -> list[str]:
    """The verdict of ``actzip accelerate``, and the clock before and after."""
    found = accelerate(
        "mobilenet_v1",
        data,
        weights=weights,
        images=images,
        calibrate=256,
        attempts=attempts,
        by="macs",  # by time would first calibrate a cost model, for a minute
        threads=1,
    )
    rows = found.time(rounds=rounds)["engines"]
    before, after = (rows.get(f"actzip, {when}", {}).get("median_ms") for when in ("before", "after"))
    gain = [f"  {before / after:.2f}x actzip, before"] if before and after else []
    return [*found.lines(), *clock_lines(found.clock), *gain]


def main(arguments: Sequence[str]) -> None:
    """Prints both parts, and for one whose data is missing why."""
    folder = Path(arguments[0])
    for title, part in (
        ("The sparse LeNet-5 by the clock:", lambda: sparse_lenet(folder / "sparse.safetensors")),
        ("MobileNet-V1 (CIFAR-10), actzip.accelerate without training:", mobilenet_without_training),
    ):
        print(f"\n{title}", flush=True)
        try:
            lines = part()
        except DataError as error:
            lines = [f"left out: {error}"]
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
