"""Everything that PyTorch's users pass as a loader works, or is refused before the first step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import actzip
from actzip.errors import ActzipError, DataError, InputError
from actzip.quantize.train import finetune
from actzip.sparsify import calibrate_thresholds
from actzip.training.batches import arguments, batches_in, unpack

X = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
Pair = collections.namedtuple("Pair", "image label")
Odd = collections.namedtuple("Odd", "first second")


@dataclasses.dataclass
class Sample:
    images: Any
    labels: Any


class Encoding(collections.UserDict):
    """As tokenizers and image processors of transformers give."""


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from ((x, y) for x, y in zip(X, Y))


class Sequence:
    """The old protocol: no __iter__."""

    def __getitem__(self, i: int) -> Any:
        if i > 1:
            raise IndexError
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def halves(make: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    return [make(X[:4], Y[:4]), make(X[4:], Y[4:])]


LABELLED: dict[str, Callable[[], Any]] = {
    "list": lambda: halves(lambda x, y: (x, y)),
    "lists": lambda: halves(lambda x, y: [x, y]),
    "DataLoader": lambda: DataLoader(TensorDataset(X, Y), 4),
    "IterableDataset": lambda: DataLoader(Stream(), 4),
    "numpy": lambda: halves(lambda x, y: (x.numpy(), y.numpy())),
    "big-endian": lambda: halves(lambda x, y: (x.numpy().astype(">f4"), y.numpy())),
    "backwards": lambda: halves(lambda x, y: (x.flip(-1).numpy()[..., ::-1], y.tolist())),
    "dict": lambda: halves(lambda x, y: {"pixel_values": x, "labels": y}),
    "BatchEncoding": lambda: halves(lambda x, y: Encoding(pixel_values=x, labels=y)),
    "named tuple": lambda: halves(Pair),
    "named tuple of other names": lambda: halves(Odd),
    "dataclass": lambda: halves(Sample),
    "sequence": Sequence,
    "int32 labels": lambda: halves(lambda x, y: (x, y.int())),
    "empty one first": lambda: [(X[:0], Y[:0]), *halves(lambda x, y: (x, y))],
}
UNLABELLED: dict[str, Callable[[], Any]] = {
    **LABELLED,
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "one dict": lambda: {"input": X},
    "one named tuple": lambda: Pair(X, Y),
    "tensors": lambda: [X[:4], X[4:]],
    "one-tuples": lambda: halves(lambda x, y: (x,)),
    "generator": lambda: (b for b in halves(lambda x, y: (x, y))),
    "iterator": lambda: iter(halves(lambda x, y: x)),
    "iter(DataLoader)": lambda: iter(DataLoader(TensorDataset(X, Y), 4)),
}
NOTHING: dict[str, Callable[[], Any]] = {
    "no batch": list,
    "empty generator": lambda: (b for b in ()),
    "batches of nothing": lambda: [X[:0]],
    "number": lambda: 3,
    "text": lambda: ["a", "b"],
    "bytes": lambda: b"abc",
    "Nones": lambda: [None],
    "module": nn.ReLU,
    "a class": lambda: DataLoader,
    "wrong channels": lambda: [(X[:, :2], Y)],
    "other type": lambda: [(X.double(), Y)],
    "meta": lambda: [(X.to("meta"), Y)],
    "objects": lambda: [np.array([None, None])],
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()


def profiled(data: Any) -> Any:
    report = actzip.profile(net(), data, codecs=(), engine=False, whatif_images=0)
    return report.data["data"]["images"], report.data["maps"][0]["density"]


def quantized(data: Any) -> Any:
    q = actzip.quantize(net(), data, weights=8, observer="minmax")
    return torch.cat([p.detach().flatten() for p in actzip.quantize.quantization(q).parameters()])


def thresholds(data: Any) -> Any:
    return calibrate_thresholds(net(), data, density=0.2, samples=4, steps=2).thresholds


def accelerated(data: Any) -> Any:
    found = actzip.accelerate(
        net(), data, by="macs", compile=False, attempts=1, distil_steps=0, max_error=0.9
    )
    return found.thresholds


def tuned(data: Any) -> Any:
    torch.manual_seed(0)
    q = actzip.quantize(net(), [X], observer="minmax")
    return finetune(q, data, epochs=2, lr=1e-4)[-1]["accuracy"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(torch.allclose(torch.as_tensor(a), torch.as_tensor(b)))


@pytest.mark.parametrize("verb", [profiled, quantized, thresholds, accelerated])
def test_loaders_of_every_kind_give_the_same(verb: Callable[[Any], Any]) -> None:
    want = verb(halves(lambda x, y: (x, y)))
    for name, make in UNLABELLED.items():
        assert same(verb(make()), want), name


@pytest.mark.parametrize("verb", [profiled, quantized, thresholds, accelerated, tuned])
def test_what_is_no_loader_is_refused(verb: Callable[[Any], Any]) -> None:
    for name, make in NOTHING.items():
        with pytest.raises(ActzipError):
            pytest.fail(f"{name}: {verb(make())}")


def test_labelled_loaders_of_every_kind_train() -> None:
    for name, make in LABELLED.items():
        if name != "empty one first":
            assert 0 <= tuned(make()) <= 1, name


def test_iterators_are_refused_where_epochs_need_more() -> None:
    for loader in ((b for b in [(X, Y)]), iter([(X, Y)])):
        with pytest.raises(InputError, match="one pass uses up"):
            tuned(loader)
        assert next(iter(loader))[0] is X  # nothing was taken from it
    with pytest.raises(InputError, match="without labels"):
        tuned([X])
    with pytest.raises(InputError, match="labels run from"):
        tuned([(X, Y + 9)])


def test_no_batch_with_an_input_is_an_error_of_the_data() -> None:
    for verb in (profiled, quantized, thresholds, accelerated):
        with pytest.raises(DataError):
            verb([X[:0]])


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(a) + torch.relu(b)


Both = collections.namedtuple("Both", "b a")


@pytest.mark.parametrize(
    "batch", [(X, Y), (X, Y, X), [X, Y], ((X, Y), X), {"b": Y, "a": X}, Both(Y, X), ({"a": X, "b": Y}, X)]
)
def test_inputs_of_a_model_of_two(batch: Any) -> None:
    args, kwargs = arguments(Two(), batch)
    both = dict(zip("ab", args)) | kwargs
    assert both["a"] is X and both["b"] is Y and len(both) == 2


def test_one_batch_is_no_loader_of_its_parts() -> None:
    for batch in (X, X.numpy(), {"x": X}, Pair(X, Y), Sample(X, Y)):
        assert batches_in(batch) == [batch] if not isinstance(batch, (Tensor, np.ndarray)) else True
        assert unpack(next(iter(batches_in(batch))))[0].shape == X.shape
