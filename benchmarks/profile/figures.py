"""Figures of the profiler (all of them: python benchmarks/profile/figures.py; some: ... predict overhead):

    predict    time that the cost model predicts against that measured in the engine, layer by layer
    inception Inception-V3 with trained weights on 100 photographs, all codecs: seconds, peak memory
    of the process, densities overhead one pass with statistics, without codecs, over the plain
    forward pass

Results: benchmarks/results/profile/*.json. The machine has to be idle. The first `predict`
calibrates the cost model (a minute).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "profile"
sys.path[:0] = [str(HERE.parent / "engine"), str(HERE.parent / "real")]

#: (network of benchmarks/engine/models.py or file of benchmarks/real/files.py; density imposed on
#: every ReLU where the weights are random)
NETWORKS: tuple[tuple[str, float | None], ...] = (
    ("inception_v3", None),
    ("mobilenet_v1", None),
    ("cifar_resnet20", None),
    ("cifar_resnet32", None),
    ("resnet18", 0.56),
    ("resnet18", 0.25),
    ("resnet34", 0.34),
    ("resnet50", 0.56),
    ("resnet50", 0.34),
    ("vgg16", 0.56),
    ("mobilenet_v2", None),
    ("crepe_full", None),
    ("crepe_tiny", None),
)


def write(name: str, data: dict[str, Any]) -> None:
    from actzip import cpu
    from actzip.files import write_text

    data = {"machine": cpu.info(), **data}
    write_text(RESULTS / f"{name}.json", json.dumps(data, indent=1) + "\n")


def _network(name: str, density: float | None) -> tuple[Any, Any]:
    """An nn.Module and one input of its own kind."""
    import files
    import models
    import modules
    import torch

    import actzip

    if name in files.BY_NAME:
        file = files.BY_NAME[name]
        net = actzip.load(str(files.path(file))) if file.onnx else getattr(modules, name)()
        return net, torch.from_numpy(files.make_input(file, 2))
    x = models.images(name, "unseen", 1)
    return models.build(name, models.impose_density(name, x, density) if density else None), x


def predict(args: argparse.Namespace) -> None:
    """Layers are the engine's; those below a thousandth of their network's time count for the
    network alone."""
    from actzip.profile.cost import CostModel
    from actzip.profile.timing import measure_engine

    start = time.perf_counter()
    cost = CostModel.of_this_machine(args.threads)
    print(f"cost model: {time.perf_counter() - start:.1f} s, {len(cost.samples)} timings", flush=True)
    path = RESULTS / "predicted.json"
    known = json.loads(path.read_text())["networks"] if args.resume and path.exists() else []
    known = [r for r in known if r["network"] not in args.again]
    done = {(r["network"], r["imposed"]) for r in known}
    for name, density in NETWORKS:
        if (name, density) in done:
            continue
        net, x = _network(name, density)
        found = measure_engine(net, x, [], threads=args.threads, cost=cost)
        measured = sum(r["milliseconds"] for r in found["layers"])
        errors = [
            r["predicted_ms"] / r["milliseconds"] - 1
            for r in found["layers"]
            if r["macs"] and r["milliseconds"] >= measured / 1000
        ]
        every = [r["predicted_ms"] / r["milliseconds"] - 1 for r in found["layers"] if r["macs"]]
        row = {
            "network": name,
            "imposed": density,
            "threads": args.threads,
            "latency_ms": found["latency_ms"],
            "layers_ms": measured,
            "predicted_ms": found["predicted_ms"],
            "error": found["predicted_ms"] / found["latency_ms"] - 1,
            "median_layer_error": statistics.median(map(abs, every)),
            "layer_errors": [round(e, 4) for e in every],
            "layer_errors_above_a_thousandth": [round(e, 4) for e in errors],
        }
        known.append(row)
        known.sort(key=lambda r: NETWORKS.index((r["network"], r["imposed"])))
        print(
            f"{name} {density or ''}: measured {row['latency_ms']:.2f} ms, predicted "
            f"{row['predicted_ms']:.2f} ({row['error']:+.1%}); layers "
            f"{row['median_layer_error']:.1%}",
            flush=True,
        )
        layers = [abs(e) for r in known for e in r["layer_errors"]]
        large = [abs(e) for r in known for e in r["layer_errors_above_a_thousandth"]]
        networks = [abs(r["error"]) for r in known]
        write(
            "predicted",
            {
                "command": "python benchmarks/profile/figures.py predict",
                "median_layer_error": statistics.median(layers),
                "median_layer_error_above_a_thousandth": statistics.median(large),
                "median_network_error": statistics.median(networks),
                "worst_network_error": max(networks),
                "layers": len(layers),
                "networks": known,
            },
        )
    print(
        f"median over {len(layers)} layers {statistics.median(layers):.1%}, over {len(networks)} networks"
        f" {statistics.median(networks):.1%}, worst network {max(networks):.1%}"
    )


_INCEPTION = """
import json, sys, time
start = time.perf_counter()
import torch
torch.set_num_threads(2)
from actzip.cli.profile import Asked, available_codecs, run
name = "inception_v3_5class"
how = {"codecs": available_codecs(), "bits": [8, 16], "threads": 2, "tiles": None}
report = run(Asked(name, sys.argv[1], name, None, False), 100, 4, how, None, True)
sys.stderr.write("seconds %.1f\\n" % (time.perf_counter() - start))
relus = [m for m in report.maps if m["can_be_sparse"]]
convs = [r for r in report.layers if r["kind"] == "conv2d"]
n = sum(m["elements"] for m in relus)
macs = sum(r["macs"] for r in convs)
print(json.dumps({
    "images": report.data["data"]["images"], "codecs": list(report.totals["coded"]), "threads": 2,
    "relu_density": sum(m["density"] * m["elements"] for m in relus) / n,
    "conv_input_density_by_macs": sum(r["input_density"] * r["macs"] for r in convs) / macs,
    "theoretical_speedup": report.totals["theoretical_speedup"],
    "engine_error": (report.data["engine"] or {}).get("error"),
    "coded": report.totals["coded"],
}))
"""


def inception(args: argparse.Namespace) -> None:
    """In a process of its own, set-up and imports included."""
    from actzip.profile.cost import CostModel

    CostModel.of_this_machine(2)  # as on any machine that has profiled before
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", _INCEPTION, "imagenet_sample"], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    data = json.loads(run.stdout)
    print(
        f"{seconds:.1f} s, peak {peak / 1e9:.2f} GB, ReLU density {data['relu_density']:.4f} (0.439 given),"
        f" inputs by MACs {data['conv_input_density_by_macs']:.4f} (0.389 given)"
    )
    write(
        "inception",
        {
            "command": "python benchmarks/profile/figures.py inception",
            "seconds": seconds,
            "peak_bytes": peak,
            **data,
        },
    )


def overhead(args: argparse.Namespace) -> None:
    """Batches of 4 photographs, the two passes by turns, medians of 5."""
    import models
    import torch

    from actzip.profile import collect

    torch.set_num_threads(args.threads)
    out = []
    for name in ("inception_v3", "resnet18"):
        net, x = models.build(name), models.images(name, "unseen", 4)
        plain, counted = [], []
        for _ in range(6):
            start = time.perf_counter()
            with torch.no_grad():
                net(x)
            middle = time.perf_counter()
            collect(net, [x])
            plain.append(middle - start)
            counted.append(time.perf_counter() - middle)
        ratio = statistics.median(counted[1:]) / statistics.median(plain[1:])
        out.append(
            {
                "network": name,
                "threads": args.threads,
                "plain_ms": 1e3 * statistics.median(plain[1:]),
                "counted_ms": 1e3 * statistics.median(counted[1:]),
                "ratio": ratio,
            }
        )
        print(f"{name}: {ratio:.2f}x the plain forward pass", flush=True)
    write("overhead", {"command": "python benchmarks/profile/figures.py overhead", "networks": out})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["predict", "inception", "overhead"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep the networks that the results have")
    parser.add_argument("--again", nargs="*", default=[], help="but these")
    args = parser.parse_args()
    parts = {"predict": predict, "inception": inception, "overhead": overhead}
    for part in args.parts:
        if part not in parts:
            parser.error(f"no part {part!r}; there are {', '.join(parts)}")
        parts[part](args)


if __name__ == "__main__":
    main()
