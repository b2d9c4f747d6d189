"""A network in two is the network, bit for bit, wherever it is cut; what cannot be cut is said."""

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.activations import set_thresholds
from actzip.errors import ActzipError, DataError, InputError, LayerError, UnsupportedError
from actzip.models import resolve
from actzip.runtime.graph import Sym
from actzip.split.api import open_network
from torches import needs_2_6


class Branches(nn.Module):
    """Two branches, a skip connection, a size that depends on the batch, outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.PReLU())
        self.join = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        a = self.stem(x)
        b = torch.cat([self.left(a), self.right(a)], 1)
        c = torch.relu(self.join(b)) + a
        pooled = nn.functional.adaptive_avg_pool2d(c, 4)
        return {"scores": self.head(pooled.reshape(x.shape[0], -1)), "map": c}


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return self.last(x)


class Constant(nn.Module):
    """A layer that works on a parameter alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.rand(4, 4))
        self.embed = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.conv(x).relu() + self.embed(self.table).sum())


class Two(nn.Module):
    def forward(self, x, y):
        return torch.relu(x) + y


class Fourier(nn.Module):
    def forward(self, x):
        return torch.fft.rfft2(x).abs()


def made(module):
    """With BatchNorms that have seen something."""
    torch.manual_seed(0)
    module.train()
    with torch.no_grad():
        for _ in range(2):
            module(torch.randn(4, 3, 32, 32))
    return module.eval()


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return torch.equal(a, b)


@pytest.mark.parametrize("name", ["branches", "cifar_resnet20", "mobilenet_v1"])
def test_head_and_tail_are_the_module_bit_for_bit_at_every_cut(name):
    model = made(Branches() if name == "branches" else resolve(name))
    network = open_network(model, torch.rand(2, 3, 32, 32))
    cuts = network.cuts()
    assert [c.index for c in cuts] == list(range(len(cuts)))
    assert any(len(c.values) > 1 for c in cuts) or name == "mobilenet_v1"
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        for cut in cuts:
            head, tail = network.parts(cut)
            maps = head(x)
            assert isinstance(maps, tuple) == (len(cut.values) > 1)
            assert equal(tail(maps), want), cut
            if isinstance(maps, tuple):
                assert equal(tail(*maps), want)
            every = maps if isinstance(maps, tuple) else (maps,)
            assert sum(m[0].numel() for m in every) == cut.elements


def test_at_is_a_name_or_a_number():
    model = made(Branches())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        head, tail = actzip.split(model, "stem", x)
        assert torch.equal(head(x), model.stem(x))
        assert equal(tail(head(x)), model(x))
        by_number = actzip.split(model, 0, x)
        assert torch.equal(by_number.head(x), model.stem(x))
        head, tail = actzip.split(model, "left", x)
        assert len(head(x)) == 2 and equal(tail(head(x)), model(x))


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenet_v1"])
def test_every_cut_is_found_by_its_own_name(name):
    network = open_network(resolve(name).eval(), torch.rand(1, 3, 32, 32))
    from actzip.split.cut import find_cut

    for cut in network.cuts():
        assert find_cut(network.graph, cut.name, network.layers).values == cut.values


def test_thresholds_count_and_the_model_stays_as_it_is():
    model = made(resolve("cifar_resnet20"))
    set_thresholds(model, {"layer1.0.relu1": 0.1})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    head, tail = actzip.split(model, "layer2", x)
    with torch.no_grad():
        assert torch.equal(tail(head(x)), model(x))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_parts_share_the_models_parameters_and_can_be_copied():
    import copy

    model = made(resolve("cifar_resnet20"))
    x = torch.randn(1, 3, 32, 32)
    head, tail = actzip.split(model, "layer2", x)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in head.parameters()} <= own
    again = copy.deepcopy(tail).train()
    with torch.no_grad():
        assert torch.equal(again(head(x)), model(x))


def test_compiled_parts_equal_the_compiled_whole_but_for_rounding():
    model = made(Branches())
    x = torch.randn(2, 3, 32, 32)
    want = model(x)["scores"].detach()
    for at in ("stem", "left"):
        head, tail = actzip.split(model, at, x, compile=True, threads=1)
        assert isinstance(head, actzip.runtime.CompiledModel)
        assert torch.allclose(tail(head(x))["scores"], want, atol=1e-5)
    whole = actzip.compile(made(resolve("cifar_resnet20")), x, tune=False)
    name = next(n.name for n in whole.graph.nodes if n.name.startswith("layer2"))
    head, tail = actzip.split(whole, name)
    assert torch.allclose(tail(head(x)), whole(x), atol=1e-4)


def test_onnx_files_and_exported_programs_are_cut_at_the_names_of_their_nodes(tmp_path):
    pytest.importorskip("onnx")
    model = made(resolve("cifar_resnet20"))
    x = torch.randn(2, 3, 32, 32)
    torch.onnx.export(
        model,
        x,
        str(tmp_path / "m.onnx"),
        dynamo=False,
        dynamic_axes={"input": {0: "n"}},
        input_names=["input"],
    )
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    for file, options in (("m.onnx", {}), ("m.pt2", {"trust": True})):
        net = actzip.load(tmp_path / file, **options)
        cuts = open_network(net).cuts()
        assert len(cuts) > 15
        with torch.no_grad():
            for cut in cuts[::4]:
                head, tail = actzip.split(str(tmp_path / file), cut.name, **options)
                assert torch.equal(tail(head(x)), net(x)), (file, cut)


def test_a_name_of_a_network_needs_no_example():
    head, _ = actzip.split("lenet5", "pool1")
    assert head(torch.rand(1, 1, 28, 28)).shape[0] == 1


@needs_2_6
@pytest.mark.parametrize("at", ["block", "block.0"])
def test_a_cut_inside_a_loop_is_refused(at):
    with pytest.raises(LayerError, match=r"runs 3 times.*loop"):
        actzip.split(Loop().eval(), at, torch.rand(1, 3, 8, 8))


def test_places_of_an_unrolled_loop_can_be_cut_by_number():
    model, x = Loop().eval(), torch.rand(1, 3, 8, 8)
    network = open_network(model, x)
    for cut in network.cuts():
        head, tail = network.parts(cut)
        assert torch.equal(tail(head(x)), model(x))


def test_a_cut_over_a_constant_is_refused():
    x = torch.rand(1, 4, 5, 5)
    with pytest.raises(InputError, match="constant"):
        actzip.split(Constant().eval(), "embed", x)
    head, _ = actzip.split(Constant().eval(), "conv", x)
    assert head(x).shape == (1, 4, 5, 5)


@pytest.mark.parametrize(
    "model, at, example, error, said",
    [
        (Branches(), "stemm", torch.rand(1, 3, 32, 32), LayerError, "no layer 'stemm'; near: stem"),
        (Branches(), "unused", torch.rand(1, 3, 32, 32), InputError, "constant"),
        (Branches(), 99, torch.rand(1, 3, 32, 32), InputError, "from 0 to"),
        (Branches(), -1, torch.rand(1, 3, 32, 32), InputError, "from 0 to"),
        (Branches(), 1.5, torch.rand(1, 3, 32, 32), InputError, "name or a cut's number"),
        (Branches(), True, torch.rand(1, 3, 32, 32), InputError, "name or a cut's number"),
        (Branches(), None, torch.rand(1, 3, 32, 32), InputError, "name or a cut's number"),
        (Branches(), "head", torch.rand(1, 3, 32, 32), InputError, "nothing is left"),
        (Branches(), "x", torch.rand(1, 3, 32, 32), InputError, "network's input"),
        (Branches(), "stem", None, InputError, "needs an example"),
        (Branches(), "stem", "x", InputError, "tensor or an array"),
        (Branches(), "stem", torch.rand(1, 3, 32, 32).double(), InputError, "float32"),
        (Branches(), "stem", np.zeros((1, 4, 32, 32), np.float32), InputError, "does not run"),
        (Two(), 0, (torch.rand(1, 3, 4, 4),) * 2, InputError, "takes one input"),
        (nn.Linear(3, 2), 0, torch.rand(1, 3), InputError, "no place to cut"),
        (5, 0, None, InputError, "model must be"),
        ("cifar_resnet2", 0, None, InputError, "cifar_resnet20"),
        ("nowhere.onnx", 0, None, DataError, "nowhere.onnx"),
        ("a.pt2", 0, None, DataError, "a.pt2"),
        pytest.param(Fourier(), 0, torch.rand(1, 3, 8, 8), UnsupportedError, "fft", marks=needs_2_6),
    ],
)
def test_what_cannot_be_cut_is_said_in_one_line(model, at, example, error, said):
    with pytest.raises(error, match=said) as caught:
        actzip.split(model, at, example)
    assert isinstance(caught.value, ActzipError) and "\n" not in str(caught.value)


def test_a_file_with_several_inputs_is_refused(tmp_path):
    pytest.importorskip("onnx")
    x = torch.rand(1, 3, 8, 8)
    torch.onnx.export(Two(), (x, x), str(tmp_path / "two.onnx"), dynamo=False)
    with pytest.raises(InputError, match="2 inputs"):
        actzip.split(tmp_path / "two.onnx", 0)


class Reader(nn.Module):
    """Time before the batch within, as recurrent layers have it."""

    def __init__(self):
        super().__init__()
        self.a, self.r, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.GRU(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.r(self.a(x).relu().permute(2, 0, 1))[0].permute(1, 0, 2).mean(1))


def test_no_cut_is_made_where_the_batch_is_not_the_first_dimension():
    net, x = Reader().eval(), torch.rand(2, 3, 12)
    cuts = open_network(net, x).cuts()
    assert cuts and all(s[0] == Sym() for c in cuts for s in c.shapes)
    with pytest.raises(InputError, match="behind 'r' the batch is not the first dimension"):
        actzip.split(net, "r", x)
