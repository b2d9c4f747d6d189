"""How long `actzip.accelerate` takes, end to end, step by step.

    python benchmarks/accelerate/wall.py efficientnet-lite0

The network of networks.py, 160 of its images, everything that the verb does but reading them: weighing, five
candidates with their repair, the proof, both compilations, the clock against other engines. The cost
model, timed once a machine, is timed before (``--cost-model`` counts it too). Writes
benchmarks/results/accelerate/wall/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS

import actzip
from actzip import cpu
from actzip.files import write_text
from actzip.profile.cost import CostModel

RESULTS = Path(__file__).resolve().parents[1] / "results" / "accelerate" / "wall"


def run(
    name: str, keep: float, images: int, attempts: int, threads: int, *, cost_model: bool
) -> dict[str, Any]:
    network = NETWORKS[name]
    model = network.make()
    x, rest, _ = network.data(network.calibrate, 0)
    batches = torch.cat([x, rest])[:images].split(network.batch)
    torch.set_num_threads(threads)
    if not cost_model:
        CostModel.of_this_machine(threads)
    seconds: dict[str, float] = {}
    started, cpu_started = time.perf_counter(), time.process_time()
    last = [started, ""]

    def step(what: str, done: int = 0, of: int = 0) -> None:
        now = time.perf_counter()
        if last[1]:
            seconds[last[1]] = seconds.get(last[1], 0.0) + now - last[0]
        if what != last[1]:
            print(f"{now - started:6.1f} s  {what}", flush=True)
        last[:] = [now, what]

    step("checks")
    found = actzip.accelerate(model, batches, keep=keep, attempts=attempts, threads=threads, on_step=step)
    step("timing engines")
    found.time()
    step("")
    info = cpu.info()
    return {
        "network": name,
        "cpu": info["cpu"],
        "isa": info["isa"],
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "images": found.images,
        "attempts": attempts,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "steps": seconds,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "found": found.to_dict() | {"layers": []},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--keep", type=float, default=0.95)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--attempts", type=int, default=5, help="candidates")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cost-model", action="store_true", help="forget it first, and count its timing")
    a = parser.parse_args()
    if a.cost_model:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ACTZIP_CACHE"] = folder
            found = run(a.network, a.keep, a.images, a.attempts, a.threads, cost_model=True)
    else:
        found = run(a.network, a.keep, a.images, a.attempts, a.threads, cost_model=False)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"{a.network}.json", json.dumps(found, indent=1) + "\n")
    steps = ", ".join(f"{what} {s:.0f}" for what, s in found["steps"].items())
    print(f"{found['seconds']:.0f} s ({found['cpu_seconds']:.0f} s of CPU): {steps}")
    print("\n".join(found["found"]["note"].splitlines() or ["promise met: " + str(found["found"]["met"])]))


if __name__ == "__main__":
    main()
