"""All tables of the engine: python benchmarks/engine/suite.py [--only inception_v3] [--gate COMMAND] (make bench-engine)

Runs run.py for every network, batch, number of threads and instruction set below, one after the other, then writes
docs/engine-benchmarks.md from all results (report.py). What is prepared (ONNX files, thresholds) is kept in --folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# network, batch, threads, further arguments
IMPOSED = ["--impose", "0.56", "--impose", "0.34", "--impose", "0.25", "--photos", "4", "--unseen", "4"]
FEW = ["--rounds", "6", "--runs", "5"]
RANDOM = ["--photos", "2", "--unseen", "2"]
SUITE: list[tuple[str, int, int, list[str]]] = [
    ("inception_v3", 1, 1, ["--isa", "avx2"]),
    ("inception_v3", 1, 2, ["--isa", "avx2"]),
    ("inception_v3", 8, 2, FEW),
    ("inception_v3", 32, 2, FEW),
    ("resnet18", 1, 1, IMPOSED),
    ("resnet34", 1, 1, IMPOSED),
    ("resnet50", 1, 1, IMPOSED),
    ("vgg16", 1, 1, IMPOSED),
    ("mobilenet_v1", 1, 1, []),
    ("mobilenet_v1", 32, 2, []),
    ("cifar_resnet20", 1, 1, []),
    ("cifar_resnet20", 32, 2, []),
    ("cifar_resnet32", 1, 1, []),
    ("mobilenet_v2", 1, 1, RANDOM),
    ("mobilenet_v3_large", 1, 1, RANDOM),
    ("efficientnet_b0", 1, 1, RANDOM),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="networks")
    parser.add_argument("--folder", type=Path, default=Path("out/engine"))
    parser.add_argument("--gate", help="as for run.py")
    parser.add_argument("--prepare-only", action="store_true")
    args = parser.parse_args()
    for network, batch, threads, extra in SUITE:
        if args.only and network not in args.only:
            continue
        command = [
            sys.executable, str(HERE / "run.py"), "--network", network, "--batch", str(batch), "--threads", str(threads),
            "--folder", str(args.folder / f"{network}-b{batch}"), *extra,
        ]  # fmt: skip
        if args.gate:
            command += ["--gate", args.gate]
        if args.prepare_only:
            command.append("--prepare-only")
        if subprocess.run(command).returncode != 0:
            print(f"{network}, batch {batch}, {threads} threads: failed", file=sys.stderr)
    if not args.prepare_only:
        subprocess.run([sys.executable, str(HERE / "report.py")], check=True)


if __name__ == "__main__":
    main()
