"""The accuracy x bits x codec table: sizes are real blobs, totals are sums, every element is counted once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.codec import encode
from actzip.errors import DataError, InputError
from actzip.profile.rates import BEST, measure_rates
from actzip.quantize import integers


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(n, 3, 11, 11, generator=g), torch.arange(n) % 5) for n in (10, 10, 7)]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_sizes_are_those_of_the_blobs(net, batches, bits):
    q = actzip.quantize(net, batches, bits=bits)
    report = measure_rates(q, batches, codecs=["raw", "seg", "seg:per_channel=1"], verify=True)
    assert report.images == 27 and report.batch == 10
    sizes, nonzeros, right = dict.fromkeys(["1", "3"], 0), dict.fromkeys(["1", "3"], 0), 0
    values = {"1": [], "3": []}
    for x, y in batches:
        for name, m in integers(q, x).items():
            a = np.ascontiguousarray(m.numpy())
            sizes[name] += 8 * len(encode(a, codec="seg", bits=bits, scale=float(m.scale)))
            nonzeros[name] += np.count_nonzero(a)
            values[name].append(a.ravel())
        right += int((q(x).argmax(1) == y).sum())
    for row in report.layers:
        assert row.coded["seg"] == sizes[row.name] and row.nonzeros == nonzeros[row.name]
        p = np.unique(np.concatenate(values[row.name]), return_counts=True)[1] / row.elements
        assert row.entropy / row.elements == pytest.approx(-(p * np.log2(p)).sum())
        assert row.size(BEST) == min(row.coded.values())
    assert report.accuracy == right / 27
    assert report.elements == 27 * (8 * 81 + 4 * 16)
    for c in ("seg", BEST):
        assert report.gain(c) == pytest.approx(32 * report.elements / report.size(c))
        assert report.gain_q(c) == pytest.approx(report.gain(c) * bits / 32)
    data = report.to_dict()
    assert data["codecs"]["seg"]["bits_per_element"] == pytest.approx(sum(sizes.values()) / report.elements)
    assert data["elements_per_image"] == 8 * 81 + 4 * 16 and len(data["layers"]) == 2


def test_images_are_limited_and_labels_optional(net, batches):
    q = actzip.quantize(net, batches, bits=8)
    assert measure_rates(q, batches, codecs=["seg"], images=14).images == 14
    report = measure_rates(q, (x for x, _ in batches), codecs=["seg"])
    assert report.accuracy is None and report.images == 27


def test_bad_input(net, batches):
    with pytest.raises(InputError, match="not quantized"):
        measure_rates(net, batches)
    q = actzip.quantize(net, batches, bits=8)
    with pytest.raises(InputError, match="codecs"):
        measure_rates(q, batches, codecs=["gzip"])
    with pytest.raises(InputError, match="NAME=INTEGER"):
        measure_rates(q, batches, codecs=["seg:k=x"])
    with pytest.raises(DataError, match="no batch"):
        measure_rates(q, [], codecs=["seg"])
    bad = batches[0][0].clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="layer '1'"):
        measure_rates(q, [bad], codecs=["seg"])
