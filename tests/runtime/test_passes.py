"""Every pass keeps the meaning of the graph, and does what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import InputError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime import passes as P
from actzip.runtime.acts import Act
from actzip.runtime.interpret import interpret
from actzip.runtime.tracing import capture
from actzip.runtime.tune import calibrate, nonfinite_parameters
from torches import needs_2_6


def inputs_for(graph, batch=3, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {v: torch.randn(g.concrete(graph.shape(v), batch), generator=gen) for v in graph.inputs}


def check(before, after, tol=1e-5):
    """Same outputs; the graph given to the pass is as it was."""
    after.validate()
    before.validate()
    x = inputs_for(before)
    a, _ = interpret(before, x)
    b, _ = interpret(after, x)
    assert len(a) == len(b)
    for p, q in zip(a, b, strict=True):
        assert p.shape == q.shape
        scale = p.abs().max().item() or 1.0
        assert (p - q).abs().max().item() <= tol * scale


def graph_of(model, *shape):
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return capture(model.eval(), torch.randn(2, *shape))


def op_names(graph):
    return [n.op for n in graph.nodes]


class Two(nn.Module):
    """A residual block: two convolutions, a projected shortcut, an addition, a ReLU."""

    def __init__(self, project=True):
        super().__init__()
        self.a = nn.Conv2d(8, 16 if project else 8, 3, padding=1, bias=False)
        self.abn = nn.BatchNorm2d(16 if project else 8)
        self.b = nn.Conv2d(16 if project else 8, 16 if project else 8, 3, padding=1)
        self.bbn = nn.BatchNorm2d(16 if project else 8)
        self.s = nn.Conv2d(8, 16, 1) if project else nn.Identity()

    def forward(self, x):
        y = torch.relu(self.abn(self.a(x)))
        return torch.relu(self.bbn(self.b(y)) + self.s(x))


@pytest.mark.parametrize("p", P.PASSES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("model", ["residual", "mixed"])
def test_each_pass_alone_keeps_the_meaning(p, model):
    if model == "residual":
        graph = graph_of(Two(), 8, 7, 6)
    else:
        graph = graph_of(
            nn.Sequential(
                nn.ZeroPad2d(1),
                nn.Conv2d(3, 6, 3),
                nn.Hardswish(),
                nn.BatchNorm2d(6),
                nn.ReLU6(),
                nn.AvgPool2d(2, 2, 1),
                nn.Conv2d(6, 12, 1, groups=2),
                nn.GELU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(48, 5),
                nn.Softmax(1),
            ),
            3,
            9,
            9,
        )
    check(graph, p(graph))


def test_residual_block_becomes_three_convolutions():
    graph = graph_of(Two(), 8, 7, 6)
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["conv2d"] * 3
    last = after.nodes[-1]
    assert len(last.inputs) == 2 and last.act.kind == "relu"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_folds(transposed, groups):
    conv = nn.ConvTranspose2d if transposed else nn.Conv2d
    graph = graph_of(nn.Sequential(conv(4, 6, 3, groups=groups, bias=False), nn.BatchNorm2d(6)), 4, 6, 6)
    after = P.fold_batch_norm(graph)
    check(graph, after)
    assert len(after.nodes) == 1 and after.nodes[0].bias is not None


def test_batch_norm_stays_where_the_convolution_has_another_reader():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.c(x)
            return self.b(y) * y

    graph = graph_of(M(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    assert "batch_norm" in op_names(after)


def test_linear_and_batch_norm_1d():
    graph = graph_of(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU()), 5)
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["linear"] and after.nodes[0].act.kind == "relu"


def test_channel_constants_fold():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 1)
            self.register_buffer("k", torch.randn(1, 4, 1, 1))

        def forward(self, x):
            return (2.0 - self.c(x) * self.k) / 3.0 + 1.0

    graph = graph_of(M(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["conv2d"] and not after.constants


@pytest.mark.parametrize(
    ("acts", "want"),
    [
        ([("relu", {}), ("threshold", {"param": [0.3]})], "threshold"),
        ([("clip", {"lo": 0.0, "hi": 1.0}), ("threshold", {"param": [0.3]})], "threshold"),
        ([("threshold", {"param": [0.3]}), ("clip", {"lo": 0.0, "hi": 1.0})], "threshold"),
        ([("threshold", {"param": [0.3]}), ("threshold", {"param": [0.1, 0.5, 0.2]})], "threshold"),
        ([("relu", {}), ("clip", {"lo": -1.0, "hi": 1.0})], "clip"),
        ([("relu", {}), ("relu", {})], "relu"),
        ([("clip", {"lo": 0.5, "hi": 2.0}), ("threshold", {"param": [0.3]})], None),
        ([("clip", {"lo": -2.0, "hi": -1.0}), ("clip", {"lo": 0.0, "hi": 1.0})], None),
        ([("relu", {}), ("threshold", {"param": [-0.3]})], None),
        ([("gelu", {}), ("relu", {})], None),
    ],
)
def test_two_activations_become_one(acts, want):
    made = []
    for kind, kw in acts:
        kw = {k: np.array(v, np.float32) if k == "param" else v for k, v in kw.items()}
        made.append(Act.of(kind, **kw))
    merged = P.merge_acts(*made)
    assert (merged.kind if merged else None) == want
    graph = g.Graph()
    graph.add_input("x", (g.Sym(), 3, 4, 4))
    graph.add(ops.Activation("a", ("x",), "y", act=made[0]))
    graph.add(ops.Activation("b", ("y",), "z", act=made[1]))
    graph.outputs = ["z"]
    after = P.fuse_activations(graph)
    check(graph, after)
    assert len(after.nodes) == (1 if want else 2)
    if want:
        x = {
            "x": torch.tensor([math.nan, -1.0, 0.2, 0.3, 0.30001, 5.0])
            .repeat(3, 3, 1, 1)
            .expand(3, 3, 4, 6)[..., :4]
        }
        x["x"] = x["x"].contiguous()
        (p,), (q,) = interpret(graph, x)[0], interpret(after, x)[0]
        torch.testing.assert_close(p, q, equal_nan=True, rtol=0, atol=0)


def test_activations_written_out_are_recognised():
    class M(nn.Module):
        def forward(self, x):
            a = x * torch.sigmoid(x)
            b = x * nn.functional.relu6(x + 3.0) / 6.0
            c = x * (nn.functional.relu6(x + 3.0) / 6.0)
            d = torch.clamp(0.2 * x + 0.5, 0, 1)
            e = x * (1.0 + torch.erf(x / math.sqrt(2.0))) * 0.5
            f = x * (0.5 * torch.erf(x * math.sqrt(0.5)) + 0.5)
            return a, b, c, d, e, f

    graph = graph_of(M(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    kinds = ["silu", "hardswish", "hardswish", "hardsigmoid", "gelu", "gelu"]
    assert [n.act.kind for n in after.nodes] == kinds


def test_activations_written_out_behind_scalar_arithmetic_are_recognised():
    class M(nn.Module):
        def forward(self, x):
            y = 0.7 * x + 0.1
            return y * nn.functional.relu6(y + 3.0) / 6.0, y * torch.sigmoid(y)

    graph = graph_of(M(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    assert [n.act.kind for n in after.nodes if isinstance(n, ops.Activation)] == ["hardswish", "silu"]


def test_one_scale_and_shift_go_into_the_h_swish_before():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)

        def forward(self, x):
            return self.b(nn.functional.hardswish(self.a(x)) * 1.5 + 0.25)

    graph = graph_of(M(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    assert [(n.op, str(n.act)) for n in after.nodes] == [
        ("conv2d", "scaled_hardswish(alpha=1.5, beta=0.25)"),
        ("conv2d", "None"),
    ]


def test_what_is_nearly_an_activation_stays():
    class M(nn.Module):
        def forward(self, x):
            a = x * nn.functional.relu6(x + 3.0) / 5.0
            b = x * torch.sigmoid(x + 0.5)
            c = x * (1.0 + torch.erf(x)) * 0.5
            return a, b, c

    graph = graph_of(M(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    kinds = {n.act.kind for n in after.nodes if getattr(n, "act", None) is not None}
    assert not kinds & {"silu", "hardswish", "gelu"}


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_batch_norms_behind_an_activation_go_into_the_next_convolutions(groups):
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
            self.a, self.b = nn.Conv2d(6, 12, 3, groups=groups), nn.Conv2d(6, 4, 1, bias=False)

        def forward(self, x):
            x = self.norm(torch.relu(x))
            return self.a(x), self.b(x)

    graph = graph_of(M(), 6, 5, 7)
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["activation", "conv2d", "conv2d"]


def test_batch_norms_stay_before_padding_without_zeros_and_before_other_readers():
    class M(nn.Module):
        def __init__(self, zeros):
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)
            self.act = nn.ReLU() if zeros else nn.SiLU()
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            x = self.norm(self.act(x))
            return self.a(x), self.b(x)

    class Seen(M):
        def forward(self, x):
            x = self.norm(self.act(x))
            return self.a(x), self.b(x), x

    for net, stays in ((M(False), True), (Seen(True), True), (M(True), False)):
        graph = graph_of(net, 6, 5, 7)
        after = P.optimize(graph)
        check(graph, after)
        assert ("batch_norm" in op_names(after)) == stays


@pytest.mark.parametrize("act", [None, "relu", "prelu", "sigmoid"])
@pytest.mark.parametrize("block", [(2, 2), (1, 3), (3, 2)])
def test_transposed_convolutions_without_overlap_become_pointwise(block, act):
    acts = {"relu": nn.ReLU, "prelu": lambda: nn.PReLU(5), "sigmoid": nn.Sigmoid}
    layers = [nn.ConvTranspose2d(6, 5, block, block), nn.BatchNorm2d(5)]
    graph = graph_of(nn.Sequential(*layers, *([acts[act]()] if act else [])), 6, 5, 7)
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["conv2d", "depth_to_space"]
    grouped = graph_of(nn.ConvTranspose2d(6, 4, 3, 2, groups=2), 6, 5, 7)
    assert op_names(P.optimize(grouped)) == ["conv_transpose2d"]


def test_padding_folds_into_convolution_but_not_into_counted_average():
    graph = graph_of(nn.Sequential(nn.ZeroPad2d((1, 2, 3, 0)), nn.Conv2d(3, 4, 3, padding=1)), 3, 5, 5)
    after = P.fold_padding(graph)
    check(graph, after)
    assert op_names(after) == ["conv2d"] and after.nodes[0].padding == (4, 2, 1, 3)
    graph = graph_of(nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)), 3, 5, 5)
    check(graph, P.fold_padding(graph))
    graph = graph_of(nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 4, 3)), 3, 5, 5)
    after = P.fold_padding(graph)
    check(graph, after)
    assert "pad" in op_names(after)


def test_average_pool_moves_behind_a_pointwise_convolution():
    for include in (True, False):
        pool = nn.AvgPool2d(3, 1, 1, count_include_pad=include)
        graph = graph_of(nn.Sequential(pool, nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), 8, 6, 6)
        after = P.optimize(graph)
        check(graph, after)
        assert op_names(after) == ["conv2d", "pool"]
        assert after.nodes[0].bias is None and after.nodes[0].act is None
        assert after.nodes[1].act.kind == "relu" and after.nodes[1].bias.shape == (4,)
    # not where the convolution widens the map, nor with a stride that the pool does not have
    graph = graph_of(nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 8, 1)), 4, 6, 6)
    assert op_names(P.optimize(graph)) == ["pool", "conv2d"]
    graph = graph_of(nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1, stride=2)), 8, 6, 6)
    assert op_names(P.optimize(graph)) == ["pool", "conv2d"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, k, 1) for k in (4, 5, 6, 7))

    def forward(self, x):
        inner = torch.cat([torch.relu(self.b(x)), torch.relu(self.c(x))], 1)
        return torch.relu(torch.cat([torch.relu(self.a(x)), inner, x, self.d(x)], 1))


def test_branches_are_placed_nested_too():
    graph = graph_of(Branches(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    outer = next(n for n in after.nodes if n.op == "concat" and len(n.inputs) == 4)
    inner = next(n for n in after.nodes if n.op == "concat" and len(n.inputs) == 2)
    assert inner.placed and not outer.placed  # the graph's input has to be copied
    where = {v.name: g.root_of(after, v.name) for v in after.values.values() if v.place}
    starts = sorted(start for root, start in where.values() if root == outer.output)
    assert starts == [0, 4, 4, 9, 18]


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 + 2 * i, 2, 1) for i in range(4)])
        self.stem = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        maps = [self.stem(x)]
        for layer in self.layers:
            maps.append(torch.relu(layer(torch.cat(maps, 1) if len(maps) > 1 else maps[0])))
        return torch.cat(maps, 1) * 2.0


def test_dense_blocks_store_every_map_once():
    graph = graph_of(Dense(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    concats = [n for n in after.nodes if n.op == "concat"]
    assert all(n.placed for n in concats)
    roots = {g.root_of(after, v)[0] for n in concats for v in n.inputs}
    assert roots == {concats[-1].output}


def test_concat_of_the_same_value_twice():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.c(x)
            return torch.cat([y, y], 1) + 1.0, torch.cat([y, torch.relu(x)], 1)

    graph = graph_of(M(), 3, 5, 5)
    after = P.optimize(graph)
    check(graph, after)
    assert not next(n for n in after.nodes if n.op == "concat").placed


def test_flattened_linear_is_a_convolution():
    graph = graph_of(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30, 9)), 3, 5, 6
    )
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["conv2d", "conv2d", "reshape"]
    assert after.nodes[1].weight.shape == (9, 4, 5, 6)


@needs_2_6
def test_channels_last_arithmetic_has_no_transposes_left():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw = nn.Conv2d(8, 8, 7, padding=3, groups=8)
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
            self.gamma = nn.Parameter(torch.randn(8))

        def forward(self, x):
            y = self.dw(x).permute(0, 2, 3, 1)
            y = self.gamma * self.down(torch.nn.functional.gelu(self.up(self.norm(y))))
            return x + y.permute(0, 3, 1, 2)

    graph = graph_of(Block(), 8, 6, 5)
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["conv2d", "layer_norm", "conv2d", "conv2d"]


def test_constants_fold_and_dead_code_goes():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.randn(4, 4))
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            self.unused(x)
            return x @ torch.softmax(self.p * 2 + 1, 1).t()

    graph = graph_of(M(), 4)
    after = P.optimize(graph)
    check(graph, after)
    assert op_names(after) == ["linear"]
    built = g.Graph()
    built.add_input("x", (g.Sym(), 4))
    k = built.add_constant(np.arange(4, dtype=np.float32))
    built.add(ops.Activation("a", (k,), "kk", act=Act.of("square")))
    built.add(ops.Binary("b", ("x", "kk"), "y", kind="mul"))
    built.add(ops.Activation("dead", ("y",), "z", act=Act.of("exp")))
    built.outputs = ["y"]
    after = P.drop_dead(P.fold_constants(built))
    check(built, after)
    assert op_names(after) == ["binary"] and list(after.constants) == ["kk"]


def test_nonfinite_parameters_are_found():
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), 3, 5, 5)
    assert not nonfinite_parameters(graph)
    weight = graph.nodes[1].weight.copy()
    weight[2, 1] = np.inf
    graph.nodes[1].weight = weight
    assert nonfinite_parameters(graph) == [graph.nodes[1]]


def test_calibration_counts_zeros():
    graph = P.optimize(graph_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), 3, 5, 5))
    x = inputs_for(graph)
    after = calibrate(graph, x)
    _, kept = interpret(graph, x, [graph.nodes[0].output])
    v = kept[graph.nodes[0].output]
    assert after.values[graph.nodes[0].output].density == pytest.approx((v != 0).float().mean().item())
    with pytest.raises(InputError):
        calibrate(graph, {"x": torch.zeros(1, 3, 4, 4)})


class Norms(nn.Module):
    """ReLU, BatchNorm, convolution, as Keras users write it: padded, pooled between, one BatchNorm
    read by two convolutions, one with a residual behind."""

    def __init__(self, positive):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.m = nn.Conv2d(16, 16, 5, padding=2, stride=2), nn.BatchNorm2d(16)
        self.c, self.d = nn.Conv2d(16, 8, (3, 1), padding=(1, 0)), nn.Conv2d(16, 8, 3, dilation=2, padding=2)
        self.positive = positive

    def forward(self, x):
        y = nn.functional.max_pool2d(self.n(torch.relu(self.a(x))), 2)
        y = self.m(torch.relu(self.b(y)))
        return torch.relu(self.c(y)) + self.d(y)


@pytest.mark.parametrize("positive", [True, False])
def test_batch_norm_between_relu_and_padded_convolutions_is_folded(positive):
    graph = graph_of(Norms(positive), 3, 21, 18)
    if positive:
        for n in graph.nodes:
            if isinstance(n, ops.BatchNorm):
                n.scale = np.abs(n.scale)
    after = P.optimize(graph)
    check(graph, after)
    left = [n for n in after.nodes if isinstance(n, ops.BatchNorm)]
    assert len(left) == (0 if positive else 1)  # a negative scale does not go through a max pool
    maps = {n.name: n.inputs[0] for n in after.nodes if isinstance(n, ops.Conv2d) and n.name in ("c", "d")}
    acts = {n.output: getattr(n, "act", None) for n in after.nodes}
    assert all(acts[v] is not None and acts[v].sparsifies for v in maps.values())


class Skip(nn.Module):
    """A map that was enlarged, beside others, read by a 1x1 convolution, as in a U-Net."""

    def __init__(self, mode="bilinear", outputs=9, kernel=1):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(3, 5, 1)
        self.join = nn.Conv2d(6 + 2 * 5, outputs, kernel, padding=kernel // 2)
        self.mode = mode

    def forward(self, x):
        y, low = self.high(x).relu(), self.low(x).relu()
        up = nn.functional.interpolate(low, size=x.shape[2:], mode=self.mode)
        return self.join(torch.cat([y, up, -y], 1)).relu()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_pointwise_convolutions_of_enlarged_maps_come_before_they_are_enlarged(mode):
    before = graph_of(Skip(mode), 3, 10, 14)
    after = P.split_upsampled(before)
    check(before, after)
    convs = [n for n in after.nodes if isinstance(n, ops.Conv2d)]
    assert sorted(n.weight.shape[1] for n in convs) == [3, 3, 6, 10]  # low, high, before, the rest
    resize = next(n for n in after.nodes if isinstance(n, ops.Resize))
    assert after.shape(resize.output)[1] == 9
    check(before, P.optimize(before))


@pytest.mark.parametrize("other", [{"kernel": 3}, {"outputs": 13}])
def test_other_convolutions_of_enlarged_maps_stay(other):
    """Larger kernels do not commute with it; many outputs cost more to enlarge than inputs do."""
    before = graph_of(Skip(**other), 3, 10, 14)
    assert op_names(P.split_upsampled(before)) == op_names(before)


class Linear(nn.Module):
    """Convolutions without an activation between, the last over a concatenation."""

    def __init__(self, middle=40, outputs=6, bias=True):
        super().__init__()
        self.first = nn.Conv2d(5, middle, 3, padding=(4, 2), dilation=(4, 2), stride=(1, 2), bias=bias)
        self.second = nn.Conv2d(middle, middle, 1, bias=bias)
        self.other = nn.Conv2d(5, 3, 1, stride=(1, 2))
        self.last = nn.Conv2d(middle + 6, outputs, 1, bias=bias)

    def forward(self, x):
        other = self.other(x)
        return self.last(torch.cat([other, self.second(self.first(x)), other.relu()], 1)).relu()


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolutions_of_convolutions_become_one(bias):
    before = graph_of(Linear(bias=bias), 5, 9, 12)
    after = P.merge_pointwise(before)
    check(before, after)
    convs = [n for n in after.nodes if isinstance(n, ops.Conv2d)]
    assert sorted(n.weight.shape for n in convs) == [(3, 5, 1, 1), (6, 5, 3, 3), (6, 6, 1, 1)]
    check(before, P.optimize(before))


def test_convolutions_that_would_multiply_more_stay_two():
    """A bottleneck: few channels between many."""
    before = graph_of(Linear(middle=2, outputs=30), 5, 9, 12)
    convs = [n.weight.shape[:2] for n in P.merge_pointwise(before).nodes if isinstance(n, ops.Conv2d)]
    assert (30, 8) in convs


def test_what_others_read_between_convolutions_stays():
    class Both(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y), y

    before = graph_of(Both(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), 3, 7, 7)
    assert op_names(P.merge_pointwise(before)) == op_names(before)


class Lines(nn.Module):
    """One-dimensional convolutions with what stands between them: a circular pad, GELU, a skip, a
    BatchNorm, constants, a concatenation over channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(16, 16, 5)
        self.c, self.n, self.d = nn.Conv1d(16, 16, 1), nn.BatchNorm1d(16), nn.Conv1d(32, 4, 3)
        self.scale = nn.Parameter(torch.rand(16, 1))

    def forward(self, x):
        y = nn.functional.gelu(self.a(x))
        z = self.b(torch.cat([y[:, :, -2:], y, y[:, :, :2]], 2))
        z = self.n(z.relu() * self.scale + y) + 0.5
        z = torch.cat([nn.functional.pad(self.c(z), (1, 2)), nn.functional.pad(y, (1, 2))], 1)
        return self.d(torch.sigmoid(z)), z.mean(2)


def test_between_one_dimensional_convolutions_nothing_leaves_the_maps():
    graph = graph_of(Lines(), 3, 19)
    alone = P.lines_as_maps(graph)
    check(graph, alone)
    after = P.optimize(graph)
    check(graph, after)
    inner = [n for n in after.nodes if not isinstance(n, ops.Reshape)]
    shapes = {n.op: len(after.shape(n.output)) for n in inner}
    assert all(shapes[op] == 4 for op in ("conv2d", "concat", "slice")), shapes
    assert sum(isinstance(n, ops.Reshape) for n in after.nodes) <= 3


@needs_2_6
@torch.no_grad()
@pytest.mark.parametrize(
    ("taps", "stride", "padding", "outputs"),
    [(400, 160, 0, 402), (400, 160, 200, 402), (512, 160, 0, 32), (17, 8, 3, 16), (30, 11, 0, 20)],
)
@pytest.mark.parametrize("along", [2, 3])
def test_long_windows_of_a_signal_read_it_as_channels(taps, stride, padding, outputs, along):
    """A signal of one channel took a kernel over hundreds of taps at a tenth of the peak."""
    kernel, pads = ((taps, 1), (padding, 0)) if along == 2 else ((1, taps), (0, padding))
    steps = (stride, 1) if along == 2 else (1, stride)
    model = nn.Sequential(nn.Conv2d(1, outputs, kernel, steps, pads), nn.ReLU(), nn.Conv2d(outputs, 8, 1))
    model.eval()

    def signal(n, length):
        return torch.randn(n, 1, length, 1) if along == 2 else torch.randn(n, 1, 1, length)

    fast = actzip.compile(model, signal(1, 4001), tune=False, cache=False, parts=False)
    convs = [n for n in fast.graph.nodes if isinstance(n, ops.Conv2d)]
    assert convs[0].weight.shape[1] >= 8
    for n in (1, 3):
        x = signal(n, 4001)
        want = model(x)
        torch.testing.assert_close(fast(x), want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)


@pytest.mark.parametrize(("outputs", "stride", "groups"), [(8, 16, 1), (32, 4, 1), (32, 16, 32)])
@needs_2_6
def test_other_convolutions_of_signals_stay(outputs, stride, groups):
    model = nn.Conv1d(groups, outputs, 40, stride, groups=groups).eval()
    graph = P.optimize(capture(model, torch.randn(1, groups, 400)))
    (conv,) = [n for n in graph.nodes if isinstance(n, ops.Conv2d)]
    assert conv.weight.shape[1:] == (1, 1, 40)


@needs_2_6
@torch.no_grad()
def test_the_silence_that_a_signal_is_filled_up_with_is_skipped():
    """Speech models read thirty seconds, whatever was said."""

    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.windows = nn.Conv1d(1, 64, 400, 160)

        def forward(self, x):
            return self.windows(torch.nn.functional.pad(x, (0, 48000))).relu()

    model, x = Spectrum().eval(), torch.randn(1, 1, 8000)
    fast = actzip.compile(model, x, tune=False, cache=False)
    conv = next(r for r in fast.explain().rows if r.op == "conv2d")
    assert conv.input_storage == "packed" and conv.density < 0.2 and conv.kernel.startswith("sparse")
    torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
