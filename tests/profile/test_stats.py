import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actzip.activations import Site
from actzip.profile.stats import CodedStats, MapStats, bin_edges, quantile_of_histogram

RELU = Site("a", "relu", "a", "ReLU")


def stats_of(x, site=RELU, **kw):
    s = MapStats.of(site, x)
    s.add(x, **kw)
    return s


def brute_runs(mask):
    zeros, ones = [0] * 24, [0] * 24
    for image in mask.reshape(mask.shape[0], -1).tolist():
        i = 0
        while i < len(image):
            j = i
            while j < len(image) and image[j] == image[i]:
                j += 1
            (ones if image[i] else zeros)[min(23, (j - i).bit_length() - 1)] += 1
            i = j
    return zeros, ones


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 11)),
    st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    st.integers(0, 2**31),
)
def test_every_count_against_brute_force(shape, density, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).abs() * (torch.rand(shape, generator=g) < density)
    s = stats_of(x)
    mask = (x != 0).numpy()
    assert s.nonzeros == mask.sum() and s.elements == x.numel() and s.images == shape[0]
    assert s.channel_nonzeros.tolist() == mask.sum((0, 2, 3)).tolist()
    assert s.position_nonzeros.tolist() == mask.sum((0, 1)).tolist()
    assert (s.zero_runs.tolist(), s.bursts.tolist()) == brute_runs(mask)
    assert s.hist.sum() == x.numel() and s.max_abs == float(x.max())
    per_image = mask.reshape(shape[0], -1).mean(1)
    assert s.density_min == per_image.min() and s.density_max == per_image.max()


def test_histogram_bins_hold_what_their_edges_say():
    x = torch.randn(2, 3, 40, 40).exp()
    s = stats_of(x)
    edges = bin_edges()
    counts, _ = np.histogram(x.numpy().astype(np.float64), bins=edges[: (0x7F800000 >> 20) + 1])
    assert s.hist[: counts.size].tolist() == counts.tolist()


def test_merging_equals_one_pass():
    x = torch.randn(6, 4, 7, 7).relu()
    whole = stats_of(x)
    parts = stats_of(x[:1])
    parts.add(x[1:3])
    parts.merge(stats_of(x[3:]))
    for name in ("images", "elements", "nonzeros", "density_min", "density_max", "max_abs", "negatives"):
        assert getattr(parts, name) == getattr(whole, name)
    for name in ("hist", "channel_nonzeros", "position_nonzeros", "zero_runs", "bursts", "density_hist"):
        assert (getattr(parts, name) == getattr(whole, name)).all()


def test_nan_and_infinity_are_counted_apart():
    x = torch.tensor([[[[0.0, float("nan")], [float("inf"), -2.0]]]])
    s = stats_of(x, Site("a", "silu", "a", "SiLU"))
    assert (s.nonzeros, s.nonfinite, s.max_abs) == (3, 2, 2.0)
    assert s.negatives >= 1


def test_threshold_what_if_is_density_of_the_cut_map():
    x = torch.randn(2, 8, 20, 20).relu()
    s = stats_of(x)
    edges = bin_edges()
    i = int(np.searchsorted(edges[:2040], 0.5))
    t = float(edges[i])
    assert s.density_at(t) == pytest.approx(float((x >= edges[i + 1]).float().mean()))
    t = s.threshold_for(0.25)
    assert s.density_at(t) <= 0.25 < s.density
    assert s.threshold_for(1.0) == 0.0


def test_entropy_is_close_to_that_of_the_quantized_map():
    x = torch.randn(4, 8, 64, 64).relu()
    s = stats_of(x)
    q = np.round(x.numpy() / (float(x.max()) / 255)).astype(int)
    p = np.bincount(q.ravel()) / q.size
    exact = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert s.entropy(8) == pytest.approx(exact, rel=0.03)
    assert stats_of(torch.zeros(1, 2, 3, 3)).entropy(8) == 0.0


def test_changing_shapes_and_vectors_are_counted():
    s = stats_of(torch.ones(1, 2, 4, 4))
    s.add(torch.zeros(1, 2, 3, 5))
    assert s.varying_shape and s.images == 2 and s.nonzeros == 32
    v = stats_of(torch.tensor([[0.0, 1.0, 2.0]]))
    assert v.channel_nonzeros.tolist() == [0, 1, 1] and v.dead_channels == [0]


def test_buffer_sizes_worst_and_percentile():
    c = CodedStats(8)
    for i in range(200):
        c.add(800 if i else 7000, 1000)
    out = c.summary(1000)
    assert out["buffer_bytes_worst"] == 875
    assert 100 <= out["buffer_bytes_p99"] <= 101
    assert quantile_of_histogram(np.array([0, 5, 5]), 0.5) == 1
