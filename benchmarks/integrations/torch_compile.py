"""torch.compile(model, backend="actzip") over timm's and torchvision's CNNs: python
benchmarks/integrations/torch_compile.py [names ...]

Every model with seeded random weights (statistics of BatchNorm and parameters that are zero at
first drawn too) is compiled for a batch of two and called with that and with a batch of three;
outputs are compared with eager PyTorch, the difference relative to the largest output. A model
counts where torch.compile found at least one graph, the engine runs a part of each one with
operators in it, none is left to PyTorch whole, and the difference is below 1e-4; ``agree_distinct``
counts those whose answers on two images differ by ten times that at least (``differs``). Each model
is a process with a time limit, so memory goes back. What is in
benchmarks/results/integrations/torch-compile-models.json already is not run again (--again runs
it).

Names are timm's, or torchvision's with ``torchvision:`` before them. Models that share all shapes
of parameters, in order, count once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actzip.files import write_text
from actzip.models._torchvision import import_timm, import_torchvision

RESULTS = Path(__file__).resolve().parent.parent / "results" / "integrations" / "torch-compile-models.json"
LIMIT = 1e-4
WEAK = 1e-2  # two images whose answers are less far apart test little
#: timm's files of convolutional networks.
FAMILIES = [
    "byobnet",
    "convmixer",
    "convnext",
    "cspnet",
    "cspnext",
    "densenet",
    "dla",
    "dpn",
    "efficientnet",
    "fasternet",
    "ghostnet",
    "hardcorenas",
    "hgnet",
    "hrnet",
    "inception_next",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2",
    "metaformer",
    "mobilenetv3",
    "mobilenetv5",
    "nfnet",
    "rdnet",
    "regnet",
    "repghost",
    "repvit",
    "res2net",
    "resnest",
    "resnet",
    "resnetv2",
    "rexnet",
    "selecsls",
    "senet",
    "sknet",
    "starnet",
    "tresnet",
    "vgg",
    "vovnet",
    "xception",
    "xception_aligned",
]
#: torchvision's, by how names begin; the rest of its list are transformers, detection and video.
TORCHVISION = [
    "alexnet",
    "convnext",
    "densenet",
    "efficientnet",
    "googlenet",
    "inception",
    "mnasnet",
    "mobilenet",
    "regnet",
    "resnet",
    "resnext",
    "shufflenet",
    "squeezenet",
    "vgg",
    "wide_resnet",
    "lraspp",
    "deeplabv3",
    "fcn",
]


def names() -> list[str]:
    """Every CNN of both packages."""
    timm, torchvision = import_timm(), import_torchvision()
    module = {n: timm.models.model_entrypoint(n).__module__.rsplit(".", 1)[-1] for n in timm.list_models()}
    found = [
        n for n, m in module.items() if m in FAMILIES and not n.startswith("test_") and "former" not in n
    ]
    found += [
        f"torchvision:{n}"
        for n in torchvision.models.list_models(module=torchvision.models)
        if n.startswith(tuple(TORCHVISION))
    ]
    found += [
        f"torchvision:{n}" for n in torchvision.models.list_models(module=torchvision.models.segmentation)
    ]
    return found


def make(name: str) -> nn.Module:
    """The model as its package makes it."""
    if not name.startswith("torchvision:"):
        return import_timm().create_model(name, pretrained=False)  # type: ignore[no-any-return]
    short = name.split(":")[1]
    kw: dict[str, Any] = {"init_weights": False} if short in ("inception_v3", "googlenet") else {}
    if short.startswith(("deeplabv3", "fcn", "lraspp")):
        kw["weights_backbone"] = None
    return import_torchvision().models.get_model(short, weights=None, **kw)  # type: ignore[no-any-return]


def build(name: str) -> tuple[nn.Module, int]:
    """The model in eval mode, and the side of its input."""
    torch.manual_seed(0)
    net, side = make(name), 139 if name == "torchvision:inception_v3" else 64
    cfg = getattr(net, "default_cfg", {})
    side = max(side, *(cfg.get("min_input_size") or (3, 0, 0))[1:])
    if cfg.get("fixed_input_size"):
        side = cfg["input_size"][-1]
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return net.eval(), side


def differs(net: nn.Module, x: torch.Tensor) -> float:
    """How far the answers on the first two images are apart, relative to the largest."""
    first = outputs(net(x))[0]
    return float((first[0] - first[1]).abs().max() / first.abs().max())


def calibrate(net: nn.Module, x: torch.Tensor) -> None:
    """Where random statistics make answers that hardly depend on the image, BatchNorms get those of
    random images."""
    if differs(net, x) >= WEAK:
        return
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    for _ in range(2):
        net(torch.randn(8, *x.shape[1:]))
    for m in norms:
        m.eval()


def outputs(found: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    return [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


@torch.no_grad()
def check(name: str) -> dict[str, Any]:
    """One model, in this process."""
    from actzip.runtime import dynamo

    warnings.simplefilter("ignore")
    start = time.time()
    net, side = build(name)
    shapes = [list(p.shape) for p in net.parameters()]
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
    }
    torch.manual_seed(1)
    for tried in (side, 96, 128, 224, 256):  # the first that the model takes
        try:
            images = [torch.randn(n, 3, tried, tried) for n in (2, 3)]
            calibrate(net, images[0])
            wants = [outputs(net(x)) for x in images]
            break
        except (RuntimeError, AssertionError, ValueError) as error:
            failed = error
    else:
        return {**row, "ok": False, "why": f"eager: {failed}"}
    fast = torch.compile(net, backend="actzip", options={"tune": False})
    gots = [outputs(fast(x)) for x in images]
    errors = [
        float((a - b).abs().max() / a.abs().max()) if a.shape == b.shape else float("inf")
        for want, got in zip(wants, gots, strict=True)
        for a, b in zip(want, got, strict=True)
    ]
    found = dynamo.reports()
    modes = sorted({r["mode"] for r in found})
    error = max(errors, key=lambda e: (e != e, e))
    row |= {
        "ok": bool(error < LIMIT) and bool(modes) and "eager" not in modes,
        "error": error,
        "modes": modes,
        "graphs": len(found),
        "side": tried,
        "differs": differs(net, images[0]),
        "seconds": round(time.time() - start, 1),
    }
    why = next((r["why"] for r in found if r["why"]), "")
    return {**row, "why": why[:300]} if why else row


def apart(name: str, seconds: float) -> dict[str, Any]:
    """:func:`check` in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "why": f"no result in {seconds:g} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"ok": False, "why": f"exit status {done.returncode}: {last[:300]}"}


def by_size(chosen: list[str], largest: float) -> list[str]:
    """``chosen`` with at most ``largest`` million parameters, small ones first."""
    sizes = {}
    for name in chosen:
        try:
            with torch.device("meta"):
                net = make(name)
        except Exception:  # initialises by values, which meta tensors have not: cannot be sized
            sizes[name] = largest
            continue
        sizes[name] = sum(p.numel() for p in net.parameters()) / 1e6
    return sorted((n for n in chosen if sizes[n] <= largest), key=lambda n: sizes[n])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="run what has a result too")
    parser.add_argument("--failed", action="store_true", help="run what failed again")
    parser.add_argument("--largest", type=float, default=40, help="million parameters that a model may have")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one model")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(check(options.one)))
        return
    warnings.simplefilter("ignore")
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found: dict[str, Any] = document.get("models", {})
    chosen = options.names or by_size(names(), options.largest)
    todo = [n for n in chosen if options.again or n not in found or (options.failed and not found[n]["ok"])]
    for name in todo:
        found[name] = apart(name, options.seconds)
        good = {r["shapes"] for r in found.values() if r["ok"] and r["differs"] >= 10 * LIMIT}
        timm, torchvision = import_timm(), import_torchvision()
        document = {
            "command": "python benchmarks/integrations/torch_compile.py",
            "limit": LIMIT,
            "versions": {
                "torch": torch.__version__,
                "timm": timm.__version__,
                "torchvision": torchvision.__version__,
            },
            "isa": os.environ.get("ACTZIP_ISA") or "default",
            "agree": sum(r["ok"] for r in found.values()),
            "agree_distinct": len(good),
            "run": len(found),
            "models": dict(sorted(found.items())),
        }
        write_text(RESULTS, json.dumps(document, indent=1) + "\n")
        print(name, json.dumps(found[name]), flush=True)
    good = sum(r["ok"] for r in found.values())
    print(f"{good} of {len(found)} models agree within {LIMIT:g}; {document.get('agree_distinct')} distinct")


if __name__ == "__main__":
    main()
