"""Which models compile and agree with PyTorch: python benchmarks/engine/coverage.py [names ...]

torchvision's classification, segmentation and detection-backbone models and one or two of many of
timm's families, with seeded random weights, compiled without trials and run at batch 2. Writes
benchmarks/results/engine/coverage.json (for each the largest error relative to the largest output,
or the reason why not; what was there of other models stays) and the table docs/results/coverage.md
from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import actzip
from actzip.errors import ActzipError
from actzip.models._torchvision import import_timm, import_torchvision

RESULTS = Path(__file__).resolve().parent.parent / "results" / "engine"
LIMIT = 1e-4
SIDES = {"inception_v3": 139, "vit": 224, "swin": 224, "maxvit": 224}
WHOLE = {"sequencer2d_s", "crossvit_tiny_240"}  # that do not run at 96
SKIPPED = (
    "_l_",
    "_h_",
    "128gf",
    "32gf",
    "b7",
    "b6",
    "swin_b",
    "swin_v2_b",
    "convnext_large",
    "efficientnet_v2_l",
)

TIMM = """
coat_tiny crossvit_tiny_240 cspresnet50 densenetblur121d dla34 dpn48b ecaresnet50t edgenext_xx_small
efficientformerv2_s0 efficientvit_b0 ese_vovnet19b_dw fastvit_t8 fbnetc_100 focalnet_tiny_srf gernet_s
ghostnet_050 ghostnetv2_100 hardcorenas_a hgnet_tiny hrnet_w18_small inception_next_atto inception_v4
lcnet_035 legacy_xception levit_128s mambaout_femto maxvit_rmlp_nano_rw_256 mixnet_s mobilenetv4_conv_small
mobileone_s0 mobilevit_xxs nasnetalarge nextvit_small pnasnet5large poolformer_s12 pvt_v2_b0 rdnet_tiny
regnetx_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnet18d resnetblur18
rexnet_100 selecsls42 semnasnet_075 sequencer2d_s seresnet18 skresnet18 starnet_s1 tinynet_e tresnet_m
""".split()  # noqa: SIM905


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = import_timm().create_model(name[5:]) if name.startswith("timm:") else _torchvision(name)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return net.eval()


def _torchvision(name: str) -> nn.Module:
    models = import_torchvision().models
    if name.endswith("_fpn"):
        net = models.detection.backbone_utils.resnet_fpn_backbone(backbone_name=name[:-4], weights=None)
    else:
        kw: dict[str, Any] = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        if name.startswith(("deeplabv3", "fcn", "lraspp")):
            kw["weights_backbone"] = None
        net = models.get_model(name, weights=None, **kw)
    return net


def side_of(name: str) -> int:
    if not name.startswith("timm:"):
        return next((s for k, s in SIDES.items() if name.startswith(k)), 64)
    found = import_timm().get_pretrained_cfg(name[5:])
    return int(found.input_size[1]) if found.fixed_input_size or name[5:] in WHOLE else 96


def check(name: str) -> dict[str, Any]:
    start = time.time()
    side = side_of(name)
    try:
        net = build(name)
        fast = actzip.compile(net, torch.randn(1, 3, side, side), tune=False)
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            want, got = net(x), fast(x)
        pairs = (
            list(zip(want.values(), got.values(), strict=True)) if isinstance(want, dict) else [(want, got)]
        )
        error = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        graph = getattr(fast, "graph", None)  # none where it runs in parts
        packed = sum(v.storage == "packed" for v in graph.values.values()) if graph else None
        return {
            "ok": bool(np.isfinite(error) and error < LIMIT),
            "error": error,
            "side": side,
            "packed_maps": packed,
            "seconds": round(time.time() - start, 1),
        }
    except ActzipError as error:
        return {"ok": False, "why": f"{type(error).__name__}: {error}"}


def main() -> None:
    warnings.simplefilter("ignore")
    models = import_torchvision().models
    names = sys.argv[1:]
    if not names:
        names = [n for n in models.list_models(module=models) if not any(s in n for s in SKIPPED)]
        names += ["deeplabv3_resnet50", "fcn_resnet50", "resnet18_fpn", "resnet50_fpn"]
        names += [f"timm:{n}" for n in TIMM]
    path = RESULTS / "coverage.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        found[name] = check(name)
        print(name, found[name], flush=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)
    subprocess.run([sys.executable, str(RESULTS.parents[1] / "tables.py")], check=True)
    print(f"{sum(r['ok'] for r in found.values())} of {len(found)} models agree within {LIMIT:g}")


if __name__ == "__main__":
    main()
