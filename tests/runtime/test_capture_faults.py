"""Faults of capture, each by its name: nothing of the caller's is touched, and what the engine does
not repeat exactly is refused by name or left to PyTorch."""

import collections
import dataclasses
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip.errors import ActzipWarning, InputError, UnsupportedError
from actzip.runtime.dynamo import backend, last_report
from torches import needs_2_6

X = torch.linspace(-1, 1, 2 * 6 * 9 * 8).reshape(2, 6, 9, 8)
Pair = collections.namedtuple("Pair", "a b")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    """``f(self, x)`` with a convolution, a buffer and a counter at hand."""

    def __init__(self, f):
        super().__init__()
        self.c, self.d = nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3)
        self.register_buffer("n", torch.zeros(1))
        self.calls, self.seen, self.f = 0, [], f

    def forward(self, *args, **kwargs):
        return self.f(self, *args, **kwargs)


def net(f):
    return Net(f).eval()


def fast(f, x=X, **kwargs):
    model = f if isinstance(f, nn.Module) else net(f)
    return actzip.compile(model, x, tune=False, parts=False, **kwargs)


def leaves(out):
    return torch.utils._pytree.tree_leaves(out)


def same(a, b):
    a, b = leaves(a), leaves(b)
    assert [type(t) for t in a] == [type(t) for t in b]
    for s, t in zip(a, b, strict=True):
        if isinstance(s, torch.Tensor):
            assert s.dtype == t.dtype and s.shape == t.shape
            assert torch.allclose(s.double(), t.double(), rtol=1e-4, atol=1e-5)
        else:
            assert s == t


def grow(m, x):
    m.n += 1
    return m.c(x) * m.n


def write_input(m, x):
    y = m.c(x)
    x.add_(1)
    return y


def sorts_and_grows(m, x):
    m.n += 1
    return torch.sort(m.c(torch.relu(m.c(x).sum(1, keepdim=True).repeat(1, 6, 1, 1))), 1).values * m.n


@pytest.mark.parametrize("f", [grow, sorts_and_grows])
def test_a_buffer_that_outputs_read_cannot_change(f):
    with pytest.raises(UnsupportedError, match=r"changes n as it runs.*an input and an output"):
        actzip.compile(m := net(f), X, tune=False)
    assert float(m.n) == 0


def counts_alone(m, x):
    m.n += 1
    return m.c(x)


def normalizes_in_place(m, x):
    return m.c(F.relu_(x.sub_(0.1).mul_(3)))


def sorts_and_writes(m, x):
    x[:, :3] = 0
    return torch.sort(m.c(torch.relu(m.c(x).sum(1, keepdim=True).repeat(1, 6, 1, 1))), 1).values


@pytest.mark.parametrize(
    ("f", "what"),
    [
        (write_input, "args_0"),
        (counts_alone, "n"),
        (normalizes_in_place, "args_0"),
        (sorts_and_writes, "args_0"),
    ],
)
def test_what_no_output_reads_is_written_no_more(f, what):
    m = net(f)
    with pytest.warns(ActzipWarning, match=f"writes into {what} as it runs"):
        compiled = actzip.compile(m, X, tune=False)
    assert float(m.n) == 0
    for shape in [(2, 6, 9, 8), (1, 6, 9, 8), (3, 6, 12, 7)]:
        x = torch.randn(shape)
        given = x.clone()
        same(compiled(given), m(x.clone()))
        assert torch.equal(given, x)


@pytest.mark.parametrize("f", [grow, write_input, sorts_and_grows])
def test_buffer_mutation(f):
    m = net(f)
    eager = net(f)
    eager.load_state_dict(m.state_dict())
    compiled = torch.compile(m, backend=backend)
    for batch in (2, 2, 1, 2):
        x, y = X[:batch].clone(), X[:batch].clone()
        same(compiled(x), eager(y))
        assert torch.equal(x, y) and torch.equal(m.n, eager.n)
    assert last_report()["mode"] == "eager" and "in place" in last_report()["why"]


def test_batch_norm_in_training_counts_the_calls():
    m = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).train()
    compiled = torch.compile(m, backend=backend)
    for _ in range(3):
        compiled(X)
    assert int(m[1].num_batches_tracked) == 3
    actzip.compile(m, X, tune=False)
    assert int(m[1].num_batches_tracked) == 3 and m.training


COUNT = 0


def test_capture_puts_the_models_python_back():
    count, hooked, here = [0], [], {"last": None}

    def hook(module, args, out):
        global COUNT
        COUNT += 1
        count[0] += 1
        hooked.append(out)
        here["last"] = out

    m = net(lambda m, x: m.c(x))
    m.c.register_forward_hook(hook)
    same(actzip.compile(m, X, tune=False)(X), m.f(m, X))
    assert COUNT == 1 and count == [1] and len(hooked) == 1
    assert type(here["last"]) is torch.Tensor


def test_random_generators_are_as_they_were():
    plain, drawing = net(lambda m, x: m.c(x)), net(lambda m, x: m.c(x) + random.random())
    sorting = net(lambda m, x: torch.sort(m.c(x)))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    fast(plain)
    with pytest.raises(UnsupportedError, match="random"):
        fast(drawing)
    torch.compile(sorting, backend=backend)(X)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def counted(m, x):
    m.calls += 1
    return m.c(x) * m.calls


def listed(m, x):
    m.seen.append(tuple(x.shape))
    return m.c(x) * len(m.seen)


@needs_2_6
def test_attributes_that_count_are_refused_by_name():
    for f, name in ((counted, "calls"), (listed, "seen")):
        m = net(f)
        with pytest.raises(UnsupportedError, match=name):
            actzip.compile(m, X, tune=False)
        assert m.calls == 0 and m.seen == []


def test_an_attribute_that_caches_is_no_counter():
    def cached(m, x):
        m.calls = x.shape[2]
        return m.c(x)

    m = net(cached)
    same(actzip.compile(m, X, tune=False)(X), m.c(X))
    assert m.calls == 0


def test_none_indices():
    def indices(m, x):
        return F.max_pool2d(F.relu(m.c(x)), 2, return_indices=True)

    with pytest.raises(UnsupportedError, match="indices of a max pooling"):
        fast(indices)
    m = net(indices)
    same(torch.compile(m, backend=backend)(X), m(X))
    m = net(lambda m, x: F.adaptive_max_pool2d(m.c(x), 2, return_indices=True))
    same(torch.compile(m, backend=backend)(X), m(X))
    m = net(lambda m, x: m.c(x).max(1))
    same(actzip.compile(m, X, tune=False)(X), m(X))


def test_batch_of_one():
    def squeezed(m, x):
        return F.adaptive_avg_pool2d(F.relu(m.c(x)), 1).squeeze()

    def branch(m, x):
        return m.c(x) if x.shape[0] == 1 else m.d(x)

    def scaled(m, x):
        return m.c(x) * (3.0 if x.shape[0] == 1 else 2.0)

    for f in (squeezed, branch, scaled):
        m = net(f)
        for n in (1, 2):
            compiled = actzip.compile(m, X[:n], tune=False)
            for k in (1, 2):
                if n == k:
                    same(compiled(X[:k]), m(X[:k]))
                else:
                    with pytest.raises(InputError):
                        compiled(X[:k])
        same(actzip.compile(m, X, tune=False)(torch.cat([X, X])), m(torch.cat([X, X])))
        torch._dynamo.reset()
        traced = torch.compile(m, backend=backend)
        for k in (2, 1, 2, 1):
            same(traced(X[:k]), m(X[:k]))


@needs_2_6
def test_a_branch_on_the_batch_holds_for_its_side():
    m = net(lambda m, x: m.c(x) if x.shape[0] > 3 else m.d(x))
    many = torch.cat([X, X, X])
    compiled = actzip.compile(m, many, tune=False)
    same(compiled(many[:4]), m(many[:4]))
    with pytest.raises(InputError, match="4 or more"):
        compiled(X)
    few = actzip.compile(m, X, tune=False)
    same(few(X), m(X))
    same(few(many[:3]), m(many[:3]))
    with pytest.raises(InputError, match="to 3"):
        few(many)


def test_a_branch_on_even_batches_holds_for_the_examples_alone():
    m = net(lambda m, x: m.c(x) if x.shape[0] % 2 else m.d(x))
    compiled = actzip.compile(m, X, tune=False)
    same(compiled(X), m(X))
    with pytest.raises(InputError):
        compiled(torch.cat([X, X[:1]]))


@pytest.mark.parametrize(
    "f",
    [
        lambda y: F.dropout(y, 0.5),
        lambda y: F.dropout2d(y, 0.5),
        lambda y: F.alpha_dropout(y, 0.5, training=True),
        lambda y: F.rrelu(y, training=True),
        lambda y: torch.bernoulli(torch.sigmoid(y)),
        lambda y: y + torch.rand_like(y),
        lambda y: y * torch.randn(8, 1, 1),
        lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5),
    ],
)
def test_dropout_training_true(f):
    m = net(lambda m, x: f(m.c(x)))
    with pytest.raises(UnsupportedError):
        actzip.compile(m, X, tune=False)
    compiled = torch.compile(m, backend=backend)
    torch.manual_seed(3)
    a = [compiled(X), compiled(X), torch.rand(2)]
    torch.manual_seed(3)
    same(a, [m(X), m(X), torch.rand(2)])


def test_dropout_that_draws_nothing_is_left_out():
    m = net(lambda m, x: F.dropout(F.dropout(m.c(x), 0.5, training=False), 0.0))
    same(actzip.compile(m, X, tune=False)(X), m.c(X))


@dataclasses.dataclass
class Dense:
    y: torch.Tensor


def test_namedtuple_output(tmp_path):
    m = net(lambda m, x: Pair({"y": m.c(x)}, [x * 2, (m.c(x).max(1),)]))
    compiled = actzip.compile(m, X, tune=False)
    for f in (compiled, pickle.loads(pickle.dumps(compiled))):
        out = f(X)
        same(out, m(X))
        assert type(out) is Pair and type(out.b[1][0]) is torch.return_types.max
    with pytest.warns(ActzipWarning, match="Pair"):
        compiled.save(tmp_path / "m.actzip")
    out = actzip.runtime.load(tmp_path / "m.actzip")(X)
    same(out, m(X))
    assert type(out) is tuple and type(out[1][1]) is tuple
    traced = torch.compile(m, backend=backend)(X)
    assert type(traced) is Pair
    same(traced, m(X))


@needs_2_6
def test_other_outputs():
    def every(m, x):
        y = m.c(x)
        return {"y": y, "none": None, "deep": [y, (y * 2, None, 3, "text")], "again": y}

    out = fast(every)(X)
    assert out["again"] is out["y"] is out["deep"][0] and out["deep"][1][1:] == (None, 3, "text")
    ordered = net(lambda m, x: collections.OrderedDict(b=m.c(x), a=x.relu()))
    assert type(actzip.compile(ordered, X, tune=False)(X)) is collections.OrderedDict
    constants = net(lambda m, x: (m.c(x), torch.arange(3), torch.tensor([True]), torch.ones(2).double()))
    same(actzip.compile(constants, X, tune=False)(X), constants(X))


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.c(x).int(),
        lambda m, x: m.c(x).double(),
        lambda m, x: m.c(x).half(),
        lambda m, x: m.c(x).bfloat16().float(),
        lambda m, x: m.c(x).nonzero(),
        lambda m, x: (m.c(x), x.shape[0]),
        lambda m, x: m.c(x)[m.c(x) > 0],
        lambda m, x: m.c(x) if x.sum() > 0 else m.d(x),
        lambda m, x: Dense(m.c(x)),
        lambda m, x: torch.view_as_complex(m.c(x)[..., :2].contiguous()),
    ],
)
def test_what_is_no_float32_tensor_is_refused_or_left_to_pytorch(f):
    m = net(f)
    with pytest.raises(UnsupportedError):
        actzip.compile(m, X, tune=False, parts=False)
    traced, plain = torch.compile(m, backend=backend)(X), m(X)
    if isinstance(plain, Dense):
        traced, plain = traced.y, plain.y
    same(traced, plain) if not leaves(plain)[0].is_complex() else None


def test_a_refusal_names_every_operator():
    with pytest.raises(UnsupportedError, match=r"(?s)sort.*cumsum"):
        fast(lambda m, x: (torch.sort(m.c(x)).values, torch.cumsum(m.d(x), 1)))


def test_outputs_of_torch_compile_share_memory_as_in_pytorch():
    def views(m, x):
        y = m.c(torch.relu(m.c(x).repeat(1, 1, 2, 2)[:, :6]))
        return y, y.flatten(1), x.view(-1)

    compiled, x = torch.compile(net(views), backend=backend), X.clone()
    y, flat, own = compiled(x)
    y.zero_()
    assert not flat.any()
    own.zero_()
    assert not x.any()


def test_inputs_of_every_kind():
    m = net(lambda m, x: m.c(x))
    compiled, traced = actzip.compile(m, X, tune=False), torch.compile(m, backend=backend)
    for x in (
        X.transpose(2, 3).contiguous().transpose(2, 3),
        X.to(memory_format=torch.channels_last),
        X.expand(2, 6, 9, 8),
        X[:1].expand(3, 6, 9, 8),
        X.clone().requires_grad_(),
    ):
        same(compiled(x), m(x))
        same(traced(x), m(x))
    for bad, words in (
        (X.bfloat16(), r"bfloat16.*x\.to\(torch\.float32\)"),
        (X.double(), r"float64.*x\.to\(torch\.float32\)"),
        (X.double().numpy(), r"float64.*astype"),
        (X.to("meta"), "meta"),
        (X[:0], "at least 1"),
    ):
        with pytest.raises(InputError, match=words):
            compiled(bad)
    same(traced(X[:0]), m(X[:0]))


def test_the_same_tensor_twice_and_an_empty_batch():
    m = net(lambda m, x, y: (m.c(x) + m.d(y), y))
    compiled = actzip.compile(m, (X, X), tune=False)
    same(compiled(X, X), m(X, X))
    same(compiled(X, X * 2), m(X, X * 2))
    traced = torch.compile(m, backend=backend)
    for x, y in ((X, X), (X, X * 2), (X[:0], X[:0]), (X[:1], X[:1])):
        same(traced(x, y), m(x, y))
    with pytest.raises(InputError, match="no image"):
        actzip.compile(m, (X[:0], X[:0]), tune=False)
    with pytest.raises(InputError):
        compiled(X, X[:0])


def test_an_interrupt_in_capture_leaves_the_model_as_it_was():
    def stopped(m, x):
        m.calls += 1
        raise KeyboardInterrupt

    m = net(stopped).train()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyboardInterrupt):
        actzip.compile(m, X, tune=False)
    assert m.training and m.calls == 0 and torch.backends.mha.get_fastpath_enabled() == fast_path


def test_float16_keeps_maps_that_it_cannot_hold():
    m = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    m[0].weight.mul_(1e6)
    with pytest.warns(ActzipWarning, match="65504"):
        compiled = actzip.compile(m, X, tune=False, storage="float16", pack="always")
    got, wanted = compiled(X), m(X)
    assert torch.isfinite(got).all() and float((got - wanted).abs().max() / wanted.abs().max()) < 1e-3


def test_a_read_only_array_of_the_model_is_no_obstacle():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.table = nn.Conv2d(3, 8, 3), np.arange(4.0)
            self.table.flags.writeable = False

        def forward(self, x):
            return self.c(x) * float(self.table[2])

    model, x = Model().eval(), torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(
        actzip.compile(model, x, tune=False)(x), model(x).detach(), atol=1e-5, rtol=1e-4
    )


def attention_kept(m, x):
    m.seen = m.c(x).softmax(1)
    return m.seen * 2


def with_weight_norm():
    from torch.nn.utils import weight_norm

    return nn.Sequential(weight_norm(nn.Conv2d(6, 64, 3)), nn.ReLU(), weight_norm(nn.Conv2d(64, 64, 3)))


def with_spectral_norm():
    from torch.nn.utils import spectral_norm

    m = nn.Sequential(spectral_norm(nn.Conv2d(6, 64, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(64, 64, 3)))
    m(X)
    return m


def with_pruning():
    from torch.nn.utils import prune

    m = nn.Sequential(nn.Conv2d(6, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    prune.l1_unstructured(m[0], "weight", 0.5)
    prune.ln_structured(m[2], "weight", 0.5, 2, 0)
    return m


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [with_weight_norm, with_spectral_norm, with_pruning])
def test_weights_that_a_hook_sets_before_each_run_are_no_change(make, tmp_path):
    m = make().eval()
    compiled = fast(m, torch.randn(2, 6, 8, 16))
    compiled.save(tmp_path / "a.actzip")
    saved = actzip.runtime.load(tmp_path / "a.actzip")
    for shape in [(2, 6, 8, 16), (3, 6, 16, 24)]:
        x = torch.randn(shape)
        same(compiled(x), m(x))
        same(saved(x), m(x))


def test_a_tensor_kept_to_be_looked_at_is_no_change_but_one_that_is_read_is():
    m = net(attention_kept)
    compiled = fast(m)
    assert m.seen == []
    x = torch.randn(3, 6, 9, 8)
    same(compiled(x), m(x))
    with pytest.raises(UnsupportedError, match="changes its attribute 'seen'"):
        fast(net(frame_differences))


def frame_differences(m, x):
    before = m.seen if isinstance(m.seen, torch.Tensor) else torch.zeros_like(x)
    m.seen = x.clone()
    return m.c(x - before)


def scripted():
    return torch.jit.trace(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU()).eval(), X)


def converted():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(432, 4)).eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "said"), [(scripted, "ScriptModule"), (converted, "quantized kernels")])
def test_modules_that_hide_what_they_compute_say_what_to_give(make, said):
    with pytest.raises(UnsupportedError, match=f"{said}.*ONNX file"):
        actzip.compile(make(), X, tune=False)
