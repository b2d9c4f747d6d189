"""The verdict: what it says, that the report begins with it, and the verb's --quick."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from actzip.cli import build
from actzip.profile import cost, profile
from actzip.profile.verdict import quick_look, verdict_of

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Packed time is work, dense time is all MACs."""
    samples = []
    for channels in (4, 16, 64):
        for density in (1.0, 0.5, 0.1):
            conv = cost.Conv(channels, channels, 14, 14, (3, 3))
            ms = cost._work(conv, "packed", density) / 16e6
            samples.append(cost.Sample(conv, "packed", True, density, ms))
        samples.append(cost.Sample(conv, "dense", True, 1.0, conv.macs / 16e6))
    model = cost.CostModel(samples)
    monkeypatch.setattr(cost.CostModel, "of_this_machine", classmethod(lambda cls, *a, **k: model))
    monkeypatch.setattr(cost.CostModel, "quick", classmethod(lambda cls, *a: model))


def net(activation=nn.ReLU, shift=0.0):
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3), activation(), nn.Conv2d(16, 16, 3), activation(), nn.Conv2d(16, 16, 3)
    )
    with torch.no_grad():
        made[0].bias += shift
        made[2].bias += shift
    return made.eval()


def test_what_it_says_follows_from_the_zeros():
    half = quick_look(net(), [X], 1)
    assert half.relus == 2 and half.others == 0 and 1.3 < half.theoretical_speedup < 3
    assert half.predicted_speedup > 1.2 and half.line.startswith("Zeros pay here")
    none = quick_look(net(shift=500.0), [X], 1)
    assert none.density > 0.95 and none.predicted_speedup == pytest.approx(1.0, abs=0.02)
    assert none.line.startswith("Zeros gain next to nothing")
    smooth = quick_look(net(nn.SiLU), [X], 1)
    assert smooth.relus == 0 and smooth.others == 2 and smooth.line.startswith("Nothing to gain")


def test_the_report_begins_with_it(tmp_path):
    report = profile(net(), [X], codecs=(), whatif_images=0)
    line = verdict_of(report.to_dict())
    assert "theoretical speed-up" in line and "predicted" in line
    page = tmp_path / "report.html"
    report.to_html(page)
    text = page.read_text()
    assert '"verdict":"Zeros' in text and text.index('id="verdict"') < text.index('id="cards"')
    assert "What the columns say" in text and "tfoot" in text


def test_the_verb(tmp_path):
    pytest.importorskip("onnx")
    import numpy as np

    from actzip.runtime.onnx_export import export_onnx

    path = export_onnx(net(), X[:1], tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), np.uint8))
    args = ["profile", str(path), "--data", str(tmp_path / "x.npy"), "--quick"]
    result = CliRunner().invoke(build(), args)
    assert result.exit_code == 0 and result.stdout.startswith("Zeros"), result.output
    told = json.loads(CliRunner().invoke(build(), [*args, "--json"]).stdout)
    assert told["relus"] == 2 and told["line"] in result.stdout
