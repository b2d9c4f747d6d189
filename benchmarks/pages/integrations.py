"""docs/results/integrations.md: the engine within other libraries."""

from __future__ import annotations

from .common import grid, load, table


@table
def torch_compile() -> list[str]:
    d = load("integrations/torch-compile-models")
    whole = sum(m["ok"] and set(m["modes"]) == {"whole"} for m in d["models"].values())
    worst = max(m["error"] for m in d["models"].values() if m["ok"])
    return grid(
        "models | agree | as whole graphs | distinct | worst difference",
        "rrrrr",
        [(d["run"], d["agree"], whole, d["agree_distinct"], f"{worst:.1e}")],
    )


@table
def onnx_backend() -> list[str]:
    d = load("integrations/onnx-backend")
    row = (d["onnx"], d["opset"], d["cases"], d["passed"], d["unsupported"], d["failed"])
    return grid("onnx | opset | cases | passed | unsupported | failed", "lrrrrr", [row])


@table
def call_overhead() -> list[str]:
    d = load("integrations/call-overhead")
    rows = [
        (network, way, f"{t['median']:.2f}", f"{t['least']:.2f}")
        for network, ways in d["networks"].items()
        for way, t in ways.items()
    ]
    return grid("network | call | median, us | least, us", "llrr", rows)
