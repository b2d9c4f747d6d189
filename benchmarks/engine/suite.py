"""Tables of the engine (make bench-engine makes all of them):

    python benchmarks/engine/suite.py                                           # all below
    python benchmarks/engine/suite.py resnet18 vgg16 --batches 1 8 --repeats 30 --engines actzip ort openvino
    python benchmarks/engine/suite.py mobilenet_v1 --weights mobilenet_v1=FILE.safetensors
    python benchmarks/engine/suite.py --list

One table is one network at one batch and number of threads: run.py makes it, then
benchmarks/tables.py writes docs/results/engine.md from all results. The timed rounds of a table
take about --seconds. Before them every engine is made ready: some seconds each, the first time 20
more for each row of actzip, whose trials are remembered (the tuning cache), and for torch.compile.
What is prepared (ONNX files, thresholds and what they do) is kept in --folder; --prepare-only does
that alone, for which the machine may be busy.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHORT = {"ort": "onnxruntime", "ov": "openvino"}
ROUNDS = 6


@dataclass
class Network:
    """Tables as (batch, threads), arguments of run.py for all of them, and instruction sets for
    actzip at batch 1."""

    tables: tuple[tuple[int, int], ...]
    arguments: tuple[str, ...] = ()
    isa: tuple[str, ...] = ()


_MANY = ((1, 1), (8, 2), (32, 2))
_IMPOSED = ("--impose=0.56", "--impose=0.34", "--impose=0.25", "--photos", "4", "--unseen", "4")
_RANDOM = ("--photos", "2", "--unseen", "2")
NETWORKS = {
    "inception_v3": Network(((1, 1), (1, 2), *_MANY[1:]), isa=("avx2",)),
    "resnet18": Network(((1, 1),), _IMPOSED),
    "resnet34": Network(((1, 1),), _IMPOSED),
    "resnet50": Network(_MANY, _IMPOSED),
    "vgg16": Network(((1, 1),), _IMPOSED),
    "mobilenet_v1": Network(_MANY),
    "cifar_resnet20": Network(_MANY),
    "cifar_resnet32": Network(((1, 1),)),
    "mobilenet_v2": Network(((1, 1),), _RANDOM),
    "mobilenet_v3_large": Network(((1, 1),), (*_RANDOM, "--no-zeros")),
    "efficientnet_b0": Network(((1, 1),), (*_RANDOM, "--no-zeros")),
    "convnext_tiny": Network(((1, 1),), (*_RANDOM, "--no-zeros")),
}


def commands(args: argparse.Namespace) -> list[list[str]]:
    """run.py's arguments, a table each."""
    weights: dict[str, list[str]] = {}
    for given in args.weights:
        name, equals, path = given.partition("=")
        if not equals or name not in NETWORKS:
            raise SystemExit(f"--weights takes NETWORK=FILE, and a network below, not {given!r}")
        weights.setdefault(name, []).append(path)
    rounds = min(ROUNDS, args.repeats)
    common = [
        "--rounds",
        str(rounds),
        "--runs",
        str(math.ceil(args.repeats / rounds)),
        "--seconds",
        str(args.seconds),
    ]
    if args.engines:
        common += ["--engines", ",".join(SHORT.get(e, e) for e in args.engines)]
    if args.gate:
        common += ["--gate", args.gate]
    if args.results:
        common += ["--results", str(args.results)]
    if args.prepare_only:
        common.append("--prepare-only")
    made = []
    for name in args.networks or NETWORKS:
        network = NETWORKS[name]
        tables = network.tables
        if args.batches or args.threads:
            tables = tuple((b, t) for b in args.batches or [1] for t in args.threads or [1])
        for batch, threads in tables:
            isa = (
                network.isa if args.isa is None and batch == 1 else [i for i in args.isa or [] if i != "none"]
            )
            made.append(
                [
                    "--network",
                    name,
                    "--batch",
                    str(batch),
                    "--threads",
                    str(threads),
                    "--folder",
                    str(args.folder),
                    *network.arguments,
                    *common,
                    *(a for i in isa for a in ("--isa", i)),
                    *(a for w in weights.get(name, []) for a in ("--weights", w)),
                ]
            )
    return made


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all where none is named")
    add("--batches", type=int, nargs="+", help="tables at these batches, instead of the usual ones")
    add(
        "--threads",
        type=int,
        nargs="+",
        help="tables at these numbers of threads (1 where --batches is given)",
    )
    add("--repeats", type=int, default=30, help="runs of every engine, if --seconds allow them")
    add(
        "--seconds",
        type=float,
        default=60,
        help="no other round of a table begins once its rounds took so long",
    )
    add(
        "--engines",
        nargs="+",
        help="only these, as run.py names them; ort and ov are ONNX Runtime and OpenVINO",
    )
    add(
        "--isa",
        nargs="+",
        help="instruction sets for actzip besides the best (avx2 for Inception-V3 at batch 1), or none",
    )
    add(
        "--weights",
        action="append",
        default=[],
        metavar="NETWORK=FILE",
        help="also with these sparsified weights (safetensors; NAME.thresholds.json beside it counts)",
    )
    add("--folder", type=Path, default=Path("out/engine"))
    add("--results", type=Path, help="as for run.py; then tables.py is not run")
    add("--gate", help="as for run.py")
    add("--prepare-only", action="store_true")
    add("--list", action="store_true", help="print what would be run")
    args = parser.parse_args(words)
    unknown = [n for n in args.networks if n not in NETWORKS]
    if unknown or args.repeats < 1:
        parser.error(f"no table is of {unknown[0]!r}" if unknown else "--repeats must be 1 or more")
    return args


def main() -> None:
    args = parse()
    for words in commands(args):
        if args.list:
            print("run.py", *words)
        elif subprocess.run([sys.executable, str(HERE / "run.py"), *words]).returncode != 0:
            print("failed: run.py", *words, file=sys.stderr)
    if not (args.prepare_only or args.list or args.results):
        subprocess.run([sys.executable, str(HERE.parent / "tables.py")], check=True)


if __name__ == "__main__":
    main()
