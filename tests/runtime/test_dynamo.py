"""torch.compile(model, backend="actzip")."""

import importlib.metadata
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actzip.errors import ActzipWarning
from actzip.models import resolve
from actzip.runtime.dynamo import backend, last_report, reports
from torches import needs_2_5


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset leaves the counts of earlier tests
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(model, **kw):
    return torch.compile(model, backend=backend, **kw)


def agree(a, b):
    return float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


class Sorted(nn.Module):
    """An operator that the engine lacks in the middle."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        v, i = torch.sort(x.flatten(2), -1)
        return self.f(torch.relu(self.b(v.view_as(x))).mean((2, 3))), i


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))


@torch.no_grad()
@needs_2_5
def test_whole_graph_with_changing_batch():
    model = resolve("lenet5").eval()
    before = len(reports())
    fast = compiled(model, fullgraph=True)
    for n in (2, 5, 7, 1):
        x = torch.rand(n, 1, 28, 28)
        assert agree(fast(x), model(x))
        assert last_report()["mode"] == "whole"
    # one graph for the first batch, one for any batch after it, one for a batch of one:
    # torch.compile's own rule
    found = reports()[before:]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(found) <= 3
    assert [r.get("reused", False) for r in found] == [False] + [True] * (
        len(found) - 1
    )  # one engine for all


@torch.no_grad()
def test_a_batch_marked_dynamic_is_one_graph():
    model = Tiny().eval()
    fast = compiled(model, fullgraph=True, dynamic=True)
    for n in (2, 9, 4, 3):
        x = torch.rand(n, 3, 8, 8)
        assert agree(fast(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
@needs_2_5
def test_other_sizes_of_images():
    model = Tiny().eval()
    fast = compiled(model)
    for side in (8, 12, 16, 20, 12, 8):  # from the second on torch.compile has symbols for height and width
        x = torch.rand(2, 3, side, side)
        assert agree(fast(x), model(x))
    assert {r["mode"] for r in reports()[-2:]} == {"whole"}


@torch.no_grad()
def test_two_instances_of_a_module_keep_their_weights():
    one, two = Tiny().eval(), Tiny().eval()
    first, second = compiled(one), compiled(two)
    x = torch.rand(2, 3, 8, 8)
    for _ in range(2):  # torch.compile gives both the same graph
        assert agree(first(x), one(x)) and agree(second(x), two(x))


@torch.inference_mode()
@needs_2_5
def test_weights_made_in_inference_mode():
    model, x = Tiny().eval(), torch.rand(2, 3, 8, 8)
    assert agree(compiled(model)(x), model(x)) and last_report()["mode"] == "whole"


@torch.no_grad()
@needs_2_5
def test_parts_run_where_an_operator_is_unknown():
    model = Sorted().eval()
    fast = compiled(model)
    with pytest.warns(ActzipWarning, match="sort"):
        out = fast(torch.ones(2, 3, 16, 16))
    assert last_report()["mode"] == "parts" and last_report()["parts"] == 2
    for n in (2, 3, 6):
        x = torch.rand(n, 3, 16, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = fast(x)
        want = model(x)
        assert agree(out[0], want[0])
        assert out[1].shape == want[1].shape and out[1].dtype == want[1].dtype


@torch.no_grad()
def test_a_graph_that_holds_weights_is_left_to_pytorch():
    model = resolve("lenet5").eval()
    x = torch.rand(2, 1, 28, 28)
    with pytest.warns(ActzipWarning, match="weights lie inside the graph"):
        run = backend(torch.fx.symbolic_trace(model), [x])
    for _ in range(2):
        assert agree(run(x), model(x))
        next(model.parameters()).mul_(2)


@torch.no_grad()
@needs_2_5
def test_changed_weights_are_noticed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    fast, x = compiled(model), torch.rand(1, 3, 8, 8)
    assert agree(fast(x), model(x))
    model[0].weight.mul_(-1.5)
    assert agree(fast(x), model(x))
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    assert agree(fast(x), model(x))
    model[2].weight.data = torch.randn_like(model[2].weight)
    assert agree(fast(x), model(x))
    model[2].weight = nn.Parameter(torch.randn_like(model[2].weight))
    assert agree(fast(x), model(x))
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)
    assert agree(fast(x), model(x))


@needs_2_5
def test_training_is_left_to_pytorch_and_gives_gradients():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    fast = compiled(model)
    fast(torch.rand(2, 3, 8, 8)).sum().backward()
    assert last_report()["mode"] == "eager" and model[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch._dynamo.reset()
        before = model[1].running_mean.clone()
        compiled(model)(torch.rand(2, 3, 8, 8))
    assert last_report()["why"] == "the model is in training mode"
    assert not torch.equal(model[1].running_mean, before)


@needs_2_5
def test_an_input_that_wants_gradients_gets_them():
    model = Tiny().eval().requires_grad_(False)
    fast, x = compiled(model), torch.rand(2, 3, 8, 8)
    assert agree(fast(x), model(x)) and last_report()["mode"] == "whole"  # nothing wants a gradient
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    fast(inputs[0]).sum().backward()
    model(inputs[1]).sum().backward()
    assert last_report()["mode"] == "eager"
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-6)
    assert agree(fast(x), model(x))


@needs_2_5
def test_a_forgotten_no_grad_is_said():
    model = Tiny().eval()
    with pytest.warns(ActzipWarning, match="no_grad"):
        y = compiled(model)(torch.rand(2, 3, 8, 8))
    assert y.requires_grad


@torch.no_grad()
@needs_2_5
def test_eval_after_train_runs_on_the_engine():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    fast, x = compiled(model), torch.rand(2, 3, 8, 8)
    fast(x)
    model.eval()
    assert agree(fast(x), model(x)) and last_report()["mode"] == "whole"


@torch.no_grad()
def test_other_types_fall_back_and_are_right():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double().eval()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    with pytest.warns(ActzipWarning):
        assert torch.equal(compiled(model)(x), model(x))
    assert last_report()["mode"] == "eager"


@torch.no_grad()
def test_functional_and_several_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 6, 3, stride=2, padding=1)

        def forward(self, x, scale):
            y = F.relu(self.c(x))
            return {"a": y, "b": (F.max_pool2d(y, 2), y.mean((2, 3)) * scale)}

    model = Net().eval()
    x, s = torch.rand(2, 3, 16, 16), torch.rand(2, 6)
    got, want = compiled(model)(x, s), model(x, s)
    assert (
        agree(got["a"], want["a"]) and agree(got["b"][0], want["b"][0]) and agree(got["b"][1], want["b"][1])
    )


@torch.no_grad()
def test_numbers_that_are_not_finite_come_out_as_in_pytorch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    x = torch.rand(1, 3, 8, 8)
    x[0, 1, 4, 4] = float("nan")
    got, want = compiled(model)(x), model(x)
    assert torch.equal(got.isnan(), want.isnan())


_PROGRAM = """
import torch
from torch import nn

torch.manual_seed(0)
first, second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU()).eval()
x = torch.relu(torch.randn(1, 3, 24, 24))
with torch.no_grad():
    got, want = torch.compile(net, backend="actzip")(x), net(x)
assert (got - want).abs().max() <= 1e-4 * want.abs().max()

from actzip.runtime.dynamo import last_report

assert last_report()["mode"] == "whole", last_report()
"""


@needs_2_5
def test_by_name_alone_and_warm_from_the_cache(tmp_path):
    try:
        importlib.metadata.distribution("actzip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("actzip is not installed (run from the sources)")
    assert "actzip" in torch.compiler.list_backends()
    env = {**os.environ, "ACTZIP_CACHE": str(tmp_path), "ACTZIP_NUM_THREADS": "1"}
    written = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _PROGRAM], env=env, check=True)
        (file,) = tmp_path.glob("tuning-*.json")
        written.append((file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes()))
    assert written[0] == written[1]  # the second process found everything and timed nothing
