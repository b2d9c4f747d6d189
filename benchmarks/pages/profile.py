"""docs/results/profile.md: what the profiler reads and predicts."""

from __future__ import annotations

from .common import grid, load, table


@table
def profile() -> list[str]:
    predicted, inception, overhead = (load(f"profile/{n}") for n in ("predicted", "inception", "overhead"))
    worst = max(predicted["networks"], key=lambda n: abs(n["error"]))
    passes = ", ".join(f"{n['ratio']:.2f}x ({n['network']})" for n in overhead["networks"])
    rows = [
        (
            f"predicted against measured time, one thread, {len(predicted['networks'])} networks "
            f"({predicted['layers']} layers)",
            f"median absolute error {100 * predicted['median_layer_error']:.1f} % a layer, "
            f"{100 * predicted['median_network_error']:.1f} % a network; the worst network is "
            f"{worst['network']}, {100 * abs(worst['error']):.0f} % too "
            f"{'fast' if worst['error'] < 0 else 'slow'}",
        ),
        (
            f"Inception-V3, trained weights, {inception['images']} photographs, all codecs at 8 "
            "and 16 bits, engine timed",
            f"{inception['seconds']:.0f} s, {inception['peak_bytes'] / 1e9:.2f} GB peak of the process "
            "(set-up included, cost model calibrated before)",
        ),
        (
            "its densities",
            f"{100 * inception['relu_density']:.1f} % of the ReLUs' outputs, "
            f"{100 * inception['conv_input_density_by_macs']:.1f} % of the convolutions' inputs "
            "weighted by MACs",
        ),
        ("one pass with statistics, no codec, over the plain forward pass", passes),
    ]
    return grid("what | measured", "ll", rows)


@table
def profile_predicted() -> list[str]:
    names = {None: "natural"}
    rows = [
        (
            r["network"],
            names.get(r["imposed"], f"imposed {r['imposed']}"),
            f"{r['latency_ms']:.2f}",
            f"{r['predicted_ms']:.2f}",
            f"{100 * r['error']:+.1f} %",
            f"{100 * r['median_layer_error']:.1f} %",
        )
        for r in load("profile/predicted")["networks"]
    ]
    head = "network | zeros | measured, ms | predicted, ms | error | median error of a layer"
    return grid(head, "llrrrr", rows)
