"""A promise is kept on inputs that chose nothing, or the network is unchanged and the result says so."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn
from toys import images, loader
from typer.testing import CliRunner

import actzip
from actzip.accelerate import Promise
from actzip.activations import get_thresholds
from actzip.cli import build
from actzip.errors import DataError, InputError
from actzip.sparsify import measure

QUICK = {"distil_steps": 4, "attempts": 3, "calibrate": 48, "images": 192, "compile": False}


@pytest.fixture(scope="module")
def found(trained):
    return actzip.accelerate(trained, loader(), keep=0.9, **QUICK)


def test_less_work_at_what_was_promised(trained, found):
    assert found.met and found.thresholds and found.note == ""
    assert found.after.effective_macs < 0.98 * found.before.effective_macs
    promised = found.judged["promised"]
    assert promised.kind == "agreement" and promised.value >= 0.9 and promised.low < promised.value
    assert promised.samples == found.images["prove"] and sum(found.images.values()) == 192
    assert found.proven == (promised.low >= 0.9)
    # it is what the result does, on all inputs
    batches = list(loader())
    with torch.no_grad():
        same = sum(int((found.model(x).argmax(1) == trained(x).argmax(1)).sum()) for x, _ in batches)
    assert same / 192 >= 0.85
    assert measure(found.model, batches).density < measure(trained, batches).density


def test_one_answer_for_all_inputs_proves_no_agreement(trained):
    """Where all inputs are of one class, a network that always answers it keeps every highest output."""
    x = torch.cat([x for x, _ in loader()])
    with torch.no_grad():
        answer = trained(x).argmax(1)
    of_one = [x[answer == answer.mode().values]]
    found = actzip.accelerate(trained, of_one * 5, keep=0.9, **QUICK)
    assert found.met and not found.proven and found.judged["promised"].chance == 1.0
    assert (
        "one answer for all inputs" in str(found) and "one answer for all inputs" in found.to_dict()["doubt"]
    )
    assert "one answer for all would reach 100.0%" in str(found)
    by_error = actzip.accelerate(trained, of_one * 5, keep=None, max_error=0.5, **QUICK)
    assert by_error.doubt == "" or "interval" in by_error.doubt


def test_labels_of_one_class_prove_no_accuracy(trained):
    x, y = (torch.cat(t) for t in zip(*loader(), strict=True))
    with torch.no_grad():
        right = trained(x).argmax(1) == y
    one = right & (y == y[right].mode().values)
    found = actzip.accelerate(trained, [(x[one], y[one])] * 5, keep=0.9, labels=True, **QUICK)
    assert not found.proven and found.judged["promised"].chance >= 1.0


def test_the_model_is_left_as_it_is(trained):
    before = copy.deepcopy(trained.state_dict())
    trained.train()
    actzip.accelerate(trained, loader(), keep=0.9, **QUICK)
    assert trained.training and get_thresholds(trained) == {}
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    trained.eval()


def test_an_interrupt_leaves_the_model_and_no_file(trained, tmp_path):
    before = copy.deepcopy(trained.state_dict())

    def stop(what, done, of):
        if what == "trying thresholds" and done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actzip.accelerate(trained, loader(), on_step=stop, **QUICK)
    assert get_thresholds(trained) == {} and not trained._forward_hooks and not trained._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_a_promise_that_nothing_keeps_leaves_the_network_unchanged(trained):
    found = actzip.accelerate(trained, loader(), keep=None, max_error=1e-9, **QUICK)
    assert not found.met and not found.proven and found.thresholds == {}
    assert "no thresholds keep the promise" in found.note and str(found).startswith("unchanged")
    assert found.model is trained and found.tried and not any(t.kept for t in found.tried)


def proof_that_fails(monkeypatch, when):
    """The proof says that half of the highest outputs are kept, where ``when`` is true of the model."""
    from actzip.accelerate import api

    class Split(api.Reference):
        made = 0

        def __init__(self, *args):
            super().__init__(*args)
            Split.made += 1
            self.proof = Split.made == 1  # the proof's is made first

        def judge(self, model):
            out = super().judge(model)
            if self.proof and get_thresholds(model) and when(model):
                out["promised"] = type(out["promised"])("agreement", 0.5, 0.4, 0.6, self.samples)
            return out

    monkeypatch.setattr(api, "Reference", Split)


def test_agreement_while_choosing_is_not_the_proof(trained, monkeypatch):
    """Candidates that do well where they were chosen, and badly where nothing was, are not met."""
    proof_that_fails(monkeypatch, lambda model: True)
    found = actzip.accelerate(trained, loader(), keep=0.9, **QUICK)
    assert not found.met and found.thresholds == {} and "inputs of the proof" in found.note


def test_where_all_that_were_kept_fail_in_the_proof_milder_ones_are_tried(trained, monkeypatch):
    seen = []

    def first_two(model):
        seen.append(measure(model, list(loader())).density)
        return len(seen) <= 2

    proof_that_fails(monkeypatch, first_two)
    found = actzip.accelerate(trained, loader(), keep=0.9, **(QUICK | {"attempts": 2}))
    assert found.met and len(found.tried) > 2 and len(seen) == 3 and seen[2] == max(seen)
    shares = [t.share for t in found.tried]
    assert all(later > max(shares[:2]) for later in shares[2:])
    proofs = [t.proof.value for t in found.tried if t.proof is not None]
    assert sum(p == 0.5 for p in proofs) == 2 and len(proofs) == 3


def test_max_error_of_outputs_that_are_no_scores(trained):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(trained)

        def forward(self, x):
            a = self.net.relu(self.net.bn(self.net.conv1(x)))
            return {"maps": torch.relu(self.net.conv2(a)), "sum": a.sum((2, 3))}

    with pytest.raises(InputError, match="max_error"):
        actzip.accelerate(Maps().eval(), loader(), keep=0.9, **QUICK)
    found = actzip.accelerate(Maps().eval(), loader(), max_error=0.2, **QUICK)
    assert found.met and found.judged["promised"].kind == "error" and found.judged["promised"].value <= 0.2


def test_labels_and_a_metric(trained):
    found = actzip.accelerate(trained, loader(), keep=0.9, labels=True, **QUICK)
    assert found.judged["promised"].kind == "accuracy"
    calls = []

    def metric(model, batches):
        calls.append(len(batches))
        return sum(float((model(x).argmax(1) == y).float().sum()) for x, y in batches)

    found = actzip.accelerate(trained, loader(), keep=0.8, metric=metric, **QUICK)
    promised = found.judged["promised"]
    assert calls and promised.kind == "metric" and promised.low < promised.value < promised.high

    def whole(model, batches):  # a metric that cannot do with less than all
        if len(batches) < max(calls):
            raise ValueError("too few")
        return metric(model, batches)

    found = actzip.accelerate(trained, loader(), keep=0.8, metric=whole, **QUICK)
    assert math.isinf(found.judged["promised"].high) and not found.proven
    with pytest.raises(InputError, match="metric raises ZeroDivisionError"):
        actzip.accelerate(trained, loader(), metric=lambda m, b: 1 / 0, **QUICK)
    with pytest.raises(InputError, match="labels are asked for"):
        actzip.accelerate(trained, [x for x, _ in loader()], labels=True, **QUICK)


def test_no_relu_is_said(trained):
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 4))
    found = actzip.accelerate(smooth, loader(), **QUICK)
    assert not found.met and "no ReLU" in found.note and found.thresholds == {}


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"keep": 1.5}, "keep must be"),
        ({"keep": 0}, "keep must be"),
        ({"max_error": -1.0}, "max_error must be"),
        ({"keep": 0.9, "max_error": 0.1}, "not both"),
        ({"max_error": 0.1, "labels": True}, "go with keep"),
        ({"per": "pixel"}, "per must be"),
        ({"by": "luck"}, "by must be"),
        ({"attempts": 0}, "attempts"),
    ],
)
def test_an_impossible_promise(trained, kwargs, match):
    with pytest.raises(InputError, match=match):
        actzip.accelerate(trained, loader(), **kwargs)


def test_inputs_that_cannot_prove_anything(trained):
    x = torch.randn(64, 3, 8, 8)
    with pytest.raises(DataError, match="too few"):
        actzip.accelerate(trained, [x[:4]])
    with pytest.raises(DataError, match="all inputs are the same"):
        actzip.accelerate(trained, [x[:1].expand(64, -1, -1, -1)])
    with pytest.raises(InputError, match="not finite"):
        actzip.accelerate(trained, [x / 0])
    with pytest.raises(InputError, match="float32"):
        actzip.accelerate(trained, [x.to(torch.uint8)])
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        broken.fc.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="outputs are not finite"):
        actzip.accelerate(broken, loader(), **QUICK)


def test_promises_say_themselves():
    assert str(Promise(0.99)) == "at least 0.99 of the highest outputs"
    assert "at most 0.05" in str(Promise(None, 0.05))


def test_compiled_exported_and_reported(trained, found, tmp_path):
    made = found.compiled_by(1, lambda *a: None)
    x = next(iter(loader()))[0]
    want = made.model(x).detach()
    torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-4)
    path = made.save(tmp_path / "fast.actzip")
    torch.testing.assert_close(actzip.runtime.load(path)(x), want, rtol=1e-4, atol=1e-4)
    pytest.importorskip("onnx")
    again = actzip.load(made.export(tmp_path / "fast.onnx"))
    torch.testing.assert_close(again(x).detach(), want, rtol=1e-4, atol=1e-4)
    clock = made.time(rounds=1, engines=False)
    assert set(clock["engines"]) == {"actzip, before", "actzip, after"} and clock["layers"]
    page = made.to_html(tmp_path / "report.html").read_text()
    assert "Promise met" in page and "conv2" in page and "http" not in page
    told = json.loads(made.to_json(tmp_path / "report.json").read_text())
    assert told["met"] and told["judged"]["promised"]["samples"] == found.images["prove"]


def test_onnx_files_and_the_verb(trained, tmp_path):
    pytest.importorskip("onnx")
    import numpy as np

    from actzip.runtime.onnx_export import export_onnx

    path = export_onnx(trained, torch.randn(1, 3, 8, 8), tmp_path / "toy.onnx")
    data = images()
    np.save(tmp_path / "x.npy", data.images)
    out, page = tmp_path / "fast.actzip", tmp_path / "page.html"
    args = [
        "accelerate",
        str(path),
        "--data",
        str(tmp_path / "x.npy"),
        "--keep",
        "0.8",
        "--distil-steps",
        "2",
        "--attempts",
        "2",
        "--no-clock",
        "--out",
        str(out),
        "--onnx",
        str(tmp_path / "fast.onnx"),
        "--html",
        str(page),
        "--json",
    ]
    result = CliRunner().invoke(build(), args)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["promise"].startswith("at least 0.8") and page.exists()
    assert out.exists() and (tmp_path / "fast.onnx").exists()


def test_the_verb_says_where_a_promise_is_not_kept(trained, tmp_path):
    pytest.importorskip("onnx")
    import numpy as np

    from actzip.runtime.onnx_export import export_onnx

    path = export_onnx(trained, torch.randn(1, 3, 8, 8), tmp_path / "toy.onnx")
    np.save(tmp_path / "x.npy", images().images)
    out = tmp_path / "fast.actzip"
    args = [
        "accelerate",
        str(path),
        "--data",
        str(tmp_path / "x.npy"),
        "--max-error",
        "1e-9",
        "--distil-steps",
        "0",
        "--attempts",
        "1",
        "--no-clock",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(build(), args)
    assert result.exit_code == 0 and result.stdout.startswith("unchanged: no thresholds keep")
    assert out.exists()  # the network as it is, compiled
