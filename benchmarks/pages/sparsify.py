"""docs/results/sparsify.md: recipes and thresholds."""

from __future__ import annotations

from typing import Any

from .common import grid, load, percent, stage, table
from .engine import engine_name


@table
def resnet20_clock() -> list[str]:
    d = load("engine/zen3/cifar_resnet20-b1-t1")
    rows = [r for r in d["rows"] if "median_ms" in r and r["isa"] != "baseline"]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for r in rows:
        key = (r["engine"].removesuffix(" channels_last"), r["zeros"])
        if key not in best or r["median_ms"] < best[key]["median_ms"]:
            best[key] = r
    return grid(
        "engine | zeros | density | median ms | against the fastest dense engine",
        "llrrr",
        (
            (
                engine_name(r),
                "not used" if r["zeros"] == "dense" else r["zeros"],
                f"{r['density']:.3f}",
                f"{r['median_ms']:.2f}",
                f"{r['against_fastest_dense']:.2f}x",
            )
            for r in sorted(
                best.values(), key=lambda r: (r["engine"] == "actzip", r["zeros"], r["median_ms"])
            )
        ),
    )


#: Result, what was done, stage. The control is the result's stage of that name.
SPARSIFIED = (
    ("lenet5-mnist/sparsify", "7 epochs", "sparse"),
    ("lenet5-mnist/long", "20 epochs", "sparse"),
    ("mobilenet-v1-cifar10/sparsify", "30 epochs, penalty alone", "sparse"),
    ("mobilenet-v1-cifar10/sparsify", "the same, then thresholds", "thresholded"),
    ("mobilenet-v1-cifar10/distilled", "20 more epochs, both distilled, penalty alone", "sparse"),
    ("mobilenet-v1-cifar10/distilled", "the same, then thresholds", "thresholded"),
    ("mobilenet-v1-cifar10/thresholds", "8 more epochs, both distilled, thresholds and no penalty", "sparse"),
    ("mobilenet-v1-cifar10/thresholds-1.6x", "the same, milder", "sparse"),
    ("mobilenet-v1-cifar10/mixup", "12 more epochs behind those of 1.94x, distilled, mixed images", "sparse"),
    ("mobilenet-v1-cifar10/macs", "10 epochs", "sparse"),
    ("mobilenet-v1-cifar10/10epochs", "an earlier recipe, 10 epochs", "baseline"),
    ("cifar-resnet20-cifar10/sparsify", "12 epochs, penalty alone", "sparse"),
    ("cifar-resnet20-cifar10/sparsify", "the same, then thresholds", "thresholded"),
    ("cifar-resnet20-cifar10/bfloat16/sparsify", "the same in bfloat16, penalty alone", "sparse"),
    ("cifar-resnet20-cifar10/bfloat16/sparsify", "the same, then thresholds", "thresholded"),
    ("cifar-resnet20-cifar10/thresholds", "12 more epochs behind these thresholds, both distilled", "sparse"),
    ("cifar-resnet20-cifar10/bfloat16/thresholds", "the same in bfloat16, asked for 3.48x", "sparse"),
    ("cifar-resnet32-cifar10/sparsify", "12 epochs, penalty alone", "sparse"),
    ("cifar-resnet32-cifar10/sparsify", "the same, then thresholds", "thresholded"),
    ("cifar-resnet20-cifar10/4epochs", "an earlier recipe, 4 epochs", "sparse"),
)
NETWORKS = {
    "lenet5": "LeNet-5",
    "mobilenet": "MobileNet-V1",
    "cifar-resnet20": "ResNet-20",
    "cifar-resnet32": "ResNet-32",
}


def network_of(name: str) -> str:
    return next(network for start, network in NETWORKS.items() if name.startswith(start))


@table
def recipes() -> list[str]:
    rows = []
    for name, what, which in SPARSIFIED:
        result = load(f"recipes/{name}")
        s, control = stage(result, which), stage(result, "control")
        rows.append(
            (
                f"`{name}`",
                what,
                network_of(name),
                f"{s['theoretical_speedup']:.2f}x",
                f"{s['speedup_over_control']:.2f}x",
                f"{s['density']:.3f}",
                percent(s["accuracy"]),
                percent(control["accuracy"]),
                f"{100 * (s['accuracy'] - control['accuracy']):+.2f}",
            )
        )
    head = (
        "recipe | what | network | theoretical speed-up | over the control | density | test "
        "accuracy | control | points"
    )
    return grid(head, "lllrrrrrr", rows)


@table
def inception_thresholds() -> list[str]:
    first, second = load("sparsify/inception-thresholds"), load("sparsify/inception-distilled")
    rows = [
        (
            "original",
            f"{first['density_original']:.3f}",
            f"{first['theoretical_speedup_original']:.2f}",
            "",
            "",
        ),
        *(
            (
                what,
                f"{d['density']:.3f}",
                f"{d['theoretical_speedup']:.2f}",
                f"{100 * d['agreement']:.1f} %",
                f"{d['output_error']:.3f}",
            )
            for what, d in (
                ("thresholds, 24 photographs, no training", first),
                ("thresholds to 0.27, then distilled for 3 epochs on 200 photographs", second),
            )
        ),
    ]
    return grid(" | density | theoretical speed-up | agreement | output error", "lrrrr", rows)


@table
def demo() -> list[str]:
    result = load("recipes/lenet5-mnist/sparsify")
    coded = {(c["stage"], c["bits"]): c for c in result["coding"]}
    rows = []
    for s in result["stages"]:
        c = coded.get((s["stage"], s["bits"]))
        sizes = (
            [(c["bits_per_element"][k], c["gain_float32"][k]) for k in ("seg", "rans")]
            if c
            else [(32, 1)] * 2
        )
        rows.append(
            (
                s["stage"],
                "float32" if s["bits"] == 32 else s["bits"],
                percent(s["accuracy"]),
                f"{s['density']:.4f}",
                f"{s['theoretical_speedup']:.2f}x",
                f"{s['speedup_over_control']:.2f}x",
                *(
                    cell
                    for bits, gain in sizes
                    for cell in ((f"{bits:.3f}", f"{gain:.1f}x") if c else (bits, f"{gain}x"))
                ),
            )
        )
    head = (
        "stage | bits | test accuracy | density | theoretical speed-up | over control"
        " | SEG bits/element | gain on float32 | rANS bits/element | gain on float32"
    )
    return grid(head, "llrrrrrrrr", rows)
