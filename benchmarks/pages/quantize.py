"""docs/results/quantize.md: bits and accuracy."""

from __future__ import annotations

from collections.abc import Iterable

from .common import grid, load, percent, stage, table


def coded_rows(name: str, wanted: Iterable[tuple[str, str, int]], digits: int) -> list[tuple[str, ...]]:
    """(what, bits, accuracy, density, seg, rans) of stages of a recipe's result; ``wanted``: what,
    stage, bits."""
    result = load(f"recipes/{name}")
    rows = []
    for what, which, bits in wanted:
        s = stage(result, which, bits)
        gain = next(c for c in result["coding"] if c["stage"] == which and c["bits"] == bits)["gain_float32"]
        sizes = (f"{gain[k]:.{digits}f}x" for k in ("seg", "rans"))
        rows.append((what, str(bits), percent(s["accuracy"]), f"{s['density']:.3f}", *sizes))
    return rows


CODED = "stage | bits | accuracy | density | seg | rans"


@table
def quantize_mobilenet_control() -> list[str]:
    d = load("quantize/mobilenet-control")
    how = {4: "mse, not trained"}
    rows = [
        (
            r["bits"],
            how.get(r["bits"], "minmax"),
            percent(r["accuracy"]),
            f"{r['density']:.3f}",
            f"{r['codecs']['seg']['gain_float32']:.2f}x",
            f"{r['codecs']['rans']['gain_float32']:.2f}x",
        )
        for r in d["rows"]
    ]
    return grid("bits | observer | accuracy | density | seg | rans", "rlrrrr", rows)


@table
def quantize_inception() -> list[str]:
    rows = [
        (
            r["bits"],
            "minmax",
            f"{100 * r['accuracy']:.1f} %",
            f"{r['density']:.3f}",
            f"{r['codecs']['seg']['gain_float32']:.2f}x",
            f"{r['codecs']['rans']['gain_float32']:.2f}x",
        )
        for r in sorted(load("quantize/inception")["rows"], key=lambda r: -r["bits"])
    ]
    return grid("bits | observer | agreement | density | seg | rans", "rlrrrr", rows)


@table
def quantize_engine() -> list[str]:
    rows = []
    for name, r in load("quantize/engine")["rows"].items():
        memory = ""
        if "peak_activation_bytes" in r:
            memory = f"{r['peak_activation_bytes'] / 1e6:.2f} MB ({r['memory_against_float32_packed']:.2f}x)"
        rows.append((name, memory, f"{r['median_ms']:.1f}", f"{r['latency_against_float32_packed']:.2f}x"))
    return grid("engine | activation memory | median ms | latency", "lrrr", rows)


@table
def quantize_files() -> list[str]:
    rows = [
        (
            r["network"],
            r["file"],
            f"{r['onnxruntime_ms']:.2f}",
            f"{r['actzip_ms']:.2f}",
            f"{r['onnxruntime_ms'] / r['actzip_ms']:.2f}x",
        )
        for r in load("quantize/files")["rows"]
    ]
    return grid("network | file | ONNX Runtime, ms | engine, ms | speed-up", "llrrr", rows)


@table
def quantize_lenet() -> list[str]:
    wanted = [(s, s, b) for s in ("control", "sparse") for b in (16, 8)]
    return grid(CODED, "lrrrrr", coded_rows("lenet5-mnist/long", wanted, 1))


@table
def quantize_mobilenet() -> list[str]:
    with_thresholds = [("with thresholds", "thresholded", b) for b in (16, 8)]
    alone = [("penalty alone, trained for 2 epochs (`4bit`)", "baseline", 4)]
    return grid(
        CODED,
        "lrrrrr",
        coded_rows("mobilenet-v1-cifar10/sparsify", with_thresholds, 2)
        + coded_rows("mobilenet-v1-cifar10/4bit", alone, 2),
    )


@table
def quantize_mobilenet_distilled() -> list[str]:
    with_thresholds = [("with thresholds", "thresholded", b) for b in (16, 8)]
    trained = (
        ("distilled-4bit", "penalty alone, trained for 3 epochs, `rate: 0.05`", 4),
        ("channel-4bit", "penalty alone, a scale a channel, trained for 2 epochs, `rate: 0.06`", 4),
        (
            "thresholds-channel-4bit",
            "with thresholds, a scale a channel, trained for 4 epochs, `rate: 0.08`",
            4,
        ),
        ("8bit", "thresholds for 1.94x, trained for 2 epochs, `rate: 0.06`", 8),
        ("thresholds-1.6x-8bit", "thresholds for 1.58x, trained for 4 epochs, `rate: 0.12`", 8),
    )
    rows = coded_rows("mobilenet-v1-cifar10/distilled", with_thresholds, 2)
    for name, what, bits in trained:
        rows += coded_rows(f"mobilenet-v1-cifar10/{name}", [(f"{what} (`{name}`)", "baseline", bits)], 2)
    return grid(CODED, "lrrrrr", rows)
