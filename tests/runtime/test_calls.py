"""Every way of calling a compiled model, and every wrong one: the right number or a typed error,
never a crash."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import InputError, UnsupportedError


def packed_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1)
    ).eval()


def compiled(model, example, **options):
    return actzip.compile(model, example, **{"tune": False, "cache": False, **options})


def close(y, want, tol=1e-5):
    y, want = torch.as_tensor(np.asarray(y)), want.detach()
    assert y.shape == want.shape
    assert float((y - want).abs().max()) <= tol * float(want.abs().max())


X = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fast():
    return compiled(packed_net(), X)


@torch.no_grad()
def test_packed_maps_of_a_fixed_batch():
    """Memory of a packed map is that of its own images, not of the run's batch (which is 1 here)."""
    model = packed_net()
    for n in (2, 5):
        x = torch.randn(n, 3, 40, 33)
        fixed = compiled(model, x, dynamic=False)
        assert any(v.storage == "packed" for v in fixed.graph.values.values())
        close(fixed(x), model(x))
        with pytest.raises(InputError, match=rf"\({n}, 3, 40, 33\)"):
            fixed(x[:1])


@torch.no_grad()
def test_packed_maps_with_several_images_for_each_of_the_batch():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = packed_net()

        def forward(self, x):
            n = x.shape[0]
            return self.net(x.reshape(n * 4, 3, 20, 10)).reshape(n, -1)

    model = Pieces().eval()
    fast = compiled(model, torch.randn(1, 12, 20, 10))
    assert any(v.storage == "packed" for v in fast.graph.values.values())
    for n in (1, 3):
        x = torch.randn(n, 12, 20, 10)
        close(fast(x), model(x))


class Named(nn.Module):
    def forward(self, x, left=None, right=None, scale=2.0, *, mode="sub"):
        y = left - right if mode == "sub" else left + right
        return x * scale + y


@torch.no_grad()
def test_arguments_are_bound_by_name_as_the_model_binds_them():
    model, (x, a, b) = Named(), torch.randn(3, 2, 5)
    for example in ((x, a, b), {"x": x, "left": a, "right": b}, {"right": b, "x": x, "left": a}):
        fast = compiled(model, example)
        for y in (
            fast(x, a, b),
            fast(x, a, right=b),
            fast(x, right=b, left=a),
            fast(right=b, left=a, x=x),
            fast((x, a, b)),
            fast({"right": b, "x": x, "left": a}),
            fast(x, a, b, 2.0),
            fast(x, a, b, mode="sub"),
        ):
            close(y, model(x, a, b))
        for args, kwargs in (
            ((x, a), {}),
            ((x, a), {"left": a, "right": b}),
            ((x, a, b), {"other": a}),
            ((x, a, b, 3.0), {}),
            ((x, a, b), {"mode": "add"}),
            ((x, a, b, a), {}),
            ((x, a, b), {"scale": torch.tensor(2.0)}),
            ((), {}),
        ):
            with pytest.raises(InputError):
                fast(*args, **kwargs)
    other = compiled(model, {"x": x, "left": a, "right": b, "mode": "add", "scale": 3.0})
    close(other(x, a, b, 3.0, mode="add"), model(x, a, b, 3.0, mode="add"))
    with pytest.raises(InputError, match=r"scale.* is missing"):
        other(x, a, b, mode="add")  # the model's own default is another
    with pytest.raises(InputError, match=r"scale.* was compiled with 3\.0"):
        other(x, a, b, 2.0, mode="add")


@torch.no_grad()
def test_nested_and_variable_arguments():
    a, b, c, d = torch.randn(4, 2, 5)

    class M(nn.Module):
        def forward(self, x, *more):
            return x - more[0] * 2 + more[1] * 3

    class N(nn.Module):
        def forward(self, maps, pair):
            return maps["a"] - maps["b"] * 2 + pair[0] * 3 - pair[1] * 4

    fast = compiled(N(), ({"a": a, "b": b}, (c, d)))
    close(fast({"a": a, "b": b}, (c, d)), N()({"a": a, "b": b}, (c, d)))
    close(fast({"b": b, "a": a}, pair=(c, d)), N()({"a": a, "b": b}, (c, d)))
    close(pickle.loads(pickle.dumps(fast))({"b": b, "a": a}, (c, d)), N()({"a": a, "b": b}, (c, d)))
    with pytest.raises(InputError):
        fast({"a": a, "c": b}, (c, d))
    fast = compiled(M(), (a, b, c))
    close(fast(a, b, c), M()(a, b, c))
    with pytest.raises(InputError):
        fast(a, b)
    with pytest.raises(InputError):
        fast(a, b, c, d)


@torch.no_grad()
def test_every_kind_of_memory(fast):
    want = packed_net()(X)
    a = X.numpy().copy()
    a.flags.writeable = False
    close(fast(a), want)
    raw = np.zeros(a.nbytes + 1, np.uint8)
    odd = np.frombuffer(raw.data, np.float32, a.size, 1).reshape(a.shape)
    odd[...] = a
    assert not odd.flags.aligned
    close(fast(odd), want)
    close(fast(np.ma.masked_array(a, mask=False)), want)
    close(fast(a[::-1][..., ::-1]), packed_net()(X.flip(0, 3)))
    close(fast(X[:1].expand(3, -1, -1, -1)), packed_net()(X[:1].expand(3, -1, -1, -1)))
    close(fast(torch._neg_view(-X)), want)
    close(fast(nn.Parameter(X)), want)
    close(copy.deepcopy(fast)(X), want)
    close(compiled(packed_net(), a)(X), want)  # a read-only example


@pytest.mark.parametrize(
    "bad",
    [
        X.to_sparse(),
        X.to("meta"),
        X.half(),
        X.numpy().astype(">f4"),
        X.to(torch.complex64),
        X[:0],
        X[:0].numpy(),
        X[0],
        "x",
    ],
    ids=["sparse", "meta", "half", "big-endian", "complex", "no image", "no image (array)", "rank", "text"],
)
def test_inputs_that_cannot_be_read(fast, bad):
    with pytest.raises(InputError):
        fast(bad)
    with pytest.raises(InputError):
        fast.explain(bad)


def test_out_of_memory_is_a_typed_error_and_the_model_goes_on(fast):
    many = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1 << 40, 3, 9, 7), (0, 0, 0, 0))
    for bad in (many, torch.zeros(1).expand(1 << 40, 3, 9, 7)):
        with pytest.raises(InputError, match="memory"):
            fast(bad)
        with pytest.raises(InputError, match="memory"):
            fast(input=bad)
    close(fast(X), packed_net()(X))


@pytest.mark.parametrize("threads", [-1, 1.5, "2", 10**6])
def test_threads_that_cannot_be(threads):
    with pytest.raises(InputError, match="threads"):
        compiled(packed_net(), X, threads=threads)


@torch.no_grad()
def test_more_threads_than_work(fast):
    close(compiled(packed_net(), X, threads=300)(X), packed_net()(X))


def test_a_model_that_does_not_run_on_the_example_is_an_input_error():
    with pytest.raises(InputError, match="expected input"):
        compiled(packed_net(), torch.randn(1, 4, 9, 7))
    with pytest.raises(InputError, match="does not run"):
        compiled(packed_net().half(), X)
    with pytest.raises(InputError, match="does not take"):
        compiled(packed_net(), (X, X))


@torch.no_grad()
def test_the_module_of_an_exported_program_compiles():
    model = packed_net()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    close(compiled(program.module(), X)(X), model(X))


def test_a_scripted_module_is_a_typed_error():
    with pytest.raises((InputError, UnsupportedError)):
        compiled(torch.jit.trace(packed_net(), X), X)


@torch.no_grad()
def test_a_place_within_an_argument_is_named_as_people_write_it():
    fast = actzip.compile(torch.nn.Conv2d(3, 4, 1).eval(), torch.rand(1, 3, 5, 5), tune=False, cache=False)
    with pytest.raises(InputError, match=r"^'input\[0\]' is 1.0: this model was compiled without it"):
        fast(input=[1.0, 2.0])
    with pytest.raises(InputError, match=r"^'scale' is 3: this model was compiled without it"):
        fast(torch.rand(1, 3, 5, 5), scale=3)
