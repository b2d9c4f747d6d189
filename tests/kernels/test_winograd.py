"""Kernels `winograd-*` beside a float64 reference: small, odd, dense, empty maps; NaN and infinities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CLIP, F16, F32, NONE, RELU, THRESHOLD, U8, U16, Case, check, sparse_array

from actzip._native import _engine

kernels = _engine.kernels
ISAS = _engine.isas()
ROWS = [
    (isa, row["name"]) for isa in ISAS for row in kernels.table(isa) if row["name"].startswith("winograd-")
]


@pytest.fixture(autouse=True)
def _release():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    _engine.force_isa("")


def test_every_instruction_set_has_all_tile_sizes():
    assert {name for _, name in ROWS} >= {"winograd-2x2", "winograd-4x4", "winograd-6x6"}
    assert {isa for isa, _ in ROWS} == set(ISAS)


@pytest.mark.parametrize(("isa", "variant"), ROWS)
def test_shapes_at_the_edges(isa, variant):
    """Smaller than a tile, odd, asymmetric padding, one and 1,000 channels, all zero, all dense."""
    assert _engine.force_isa(isa)
    seed = 0
    for h, w, pad in [
        (1, 1, (1, 1, 1, 1)),
        (2, 3, (1, 1, 1, 1)),
        (3, 3, (0, 0, 0, 0)),
        (1, 9, (2, 0, 1, 3)),
        (5, 2, (1, 3, 0, 1)),
        (7, 7, (1, 1, 1, 1)),
        (4, 6, (3, 3, 3, 3)),
        (9, 13, (0, 2, 1, 0)),
        (17, 35, (1, 1, 1, 1)),
        (3, 260, (1, 1, 1, 1)),
    ]:
        for density in (0.0, 0.5, 1.0):
            for packed in (True, False):
                seed += 1
                ic, oc = [(1, 5), (70, 33), (16, 130), (64, 64)][seed % 4]
                check(
                    Case(h=h, w=w, ic=ic, oc=oc, pad=pad, density=density, in_packed=packed, seed=seed),
                    variant,
                )
    for ic, oc in ((1, 1), (1000, 20), (20, 1000)):
        for packed in (True, False):
            check(
                Case(n=2, h=5, w=6, ic=ic, oc=oc, in_packed=packed, out_packed=packed, residual="dense"),
                variant,
            )


@pytest.mark.parametrize(("isa", "variant"), ROWS)
def test_dilated_kernels_are_undilated_ones_over_the_phases_of_a_map(isa, variant):
    """Odd sizes, fewer rows than the dilation, asymmetric padding, packed and dense, long rows."""
    assert _engine.force_isa(isa)
    seed = 0
    for h, w, d, pad in [
        (30, 30, (6, 6), (6, 6, 6, 6)),
        (11, 13, (2, 2), (2, 2, 2, 2)),
        (9, 17, (3, 3), (1, 3, 4, 0)),
        (13, 5, (6, 2), (3, 0, 1, 7)),
        (5, 4, (3, 6), (5, 9, 2, 4)),
        (7, 8, (1, 2), (1, 2, 1, 2)),
        (8, 7, (2, 1), (0, 1, 0, 1)),
        (1, 2, (6, 6), (6, 6, 6, 6)),
        (5, 301, (2, 3), (2, 3, 2, 3)),
    ]:
        for packed in (True, False):
            seed += 1
            ic, oc = [(1, 5), (70, 33), (16, 130), (64, 64)][seed % 4]
            case = Case(
                n=1 + seed % 2,
                h=h,
                w=w,
                ic=ic,
                oc=oc,
                d=d,
                pad=pad,
                in_packed=packed,
                out_packed=seed % 3 == 0,
                in_type=(F32, F16, U8)[seed % 3] if packed else F32,
                residual=("", "dense", "packed")[seed % 3],
                threads=1 + seed % 2,
                seed=seed,
            )
            check(case, variant)


@pytest.mark.parametrize(("isa", "variant"), ROWS)
def test_pools_of_two_by_two_come_out_of_the_tiles(isa, variant):
    """Odd sizes, whose last row and column fall away; every storage and activation."""
    assert _engine.force_isa(isa)
    seed = 0
    for h, w, pad in [
        (2, 2, (1, 1, 1, 1)),
        (3, 5, (1, 1, 1, 1)),
        (16, 12, (1, 1, 1, 1)),
        (13, 19, (0, 2, 1, 0)),
        (9, 260, (1, 1, 1, 1)),
    ]:
        for act in (NONE, RELU, CLIP, THRESHOLD):
            seed += 1
            ic, oc = [(1, 5), (70, 33), (16, 130), (64, 64)][seed % 4]
            check(
                Case(
                    n=1 + seed % 3,
                    h=h,
                    w=w,
                    ic=ic,
                    oc=oc,
                    pad=pad,
                    pool=2,
                    act=act,
                    per_channel=seed % 2 == 0,
                    in_packed=seed % 2 == 0,
                    out_packed=seed % 3 != 0,
                    out_type=(F32, F16, U8)[seed % 3],
                    threads=1 + seed % 2,
                    seed=seed,
                ),
                variant,
            )


@pytest.mark.parametrize(("isa", "variant"), ROWS)
@pytest.mark.parametrize(("dilation", "pool"), [(1, 1), (1, 2), (2, 1)])
def test_batches_of_small_maps(isa, variant, dilation, pool):
    """Several images at once: the same numbers for every batch and number of threads."""
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(3)
    x = sparse_array(rng, (64, 6, 5, 40), 0.5)
    weight = rng.standard_normal((70, 40, 3, 3)).astype(np.float32)
    p = Case(ic=40, oc=70, d=(dilation, dilation), pad=(dilation,) * 4, pool=pool).problem()
    whole = kernels.conv(p, variant, x, weight, None)[0]
    for n in (0, 1, 2, 7, 33, 64):
        for threads in (1, 2, 3):
            y = kernels.conv(p, variant, x[:n].copy(), weight, None, threads=threads)[0]
            assert np.array_equal(y, whole[:n]), (n, threads)


@pytest.mark.parametrize(("isa", "variant"), ROWS)
def test_storages_and_epilogues(isa, variant):
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(sum(map(ord, isa + variant)))
    pick = lambda *v: v[rng.integers(len(v))]  # noqa: E731
    for in_type in (F32, F16, U8, U16):
        for act in (NONE, RELU, CLIP, THRESHOLD):
            check(
                Case(
                    n=int(pick(1, 2)),
                    h=int(pick(6, 11)),
                    w=int(pick(5, 14)),
                    ic=int(pick(3, 64, 100)),
                    oc=int(pick(8, 96, 190)),
                    act=act,
                    per_channel=bool(pick(0, 1)),
                    in_type=in_type,
                    out_type=int(pick(F32, F16, U8, U16)),
                    out_packed=bool(pick(0, 1)),
                    residual=pick("", "dense", "packed"),
                    capacity=pick(0.0, 1.0),
                    threads=int(pick(1, 2)),
                    seed=int(rng.integers(1 << 30)),
                ),
                variant,
            )


@pytest.mark.parametrize(("isa", "variant"), ROWS)
@pytest.mark.parametrize(("dilation", "pool"), [(1, 1), (3, 1), (1, 2)])
def test_what_is_not_finite_stays_where_it_belongs(isa, variant, dilation, pool):
    """A transform would spread NaN, infinities and overflows over a tile."""
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(1)
    for value in (np.nan, np.inf, -np.inf, 3e38):
        for packed in (False, True):
            x = sparse_array(rng, (2, 11, 13, 70), 0.3)
            x[0, 5, 6, 68] = x[1, 0, 12, 1] = value
            weight = (rng.standard_normal((33, 70, 3, 3)) / 30).astype(np.float32)
            weight[:, 68, 0, 0] = 0.0
            d = (dilation, dilation)
            c = Case(ic=70, oc=33, act=NONE, d=d, pad=d * 2, pool=pool, in_packed=packed, out_packed=packed)
            y, _ = kernels.conv(c.problem(), variant, x, weight, None)
            t = torch.from_numpy(x).permute(0, 3, 1, 2)
            want = torch.nn.functional.conv2d(t, torch.from_numpy(weight), None, 1, dilation, dilation)
            want = torch.nn.functional.max_pool2d(want, pool).permute(0, 2, 3, 1).numpy()
            assert np.array_equal(np.isnan(y), np.isnan(want)), value
            assert np.array_equal(np.isinf(y), np.isinf(want)), value
            some = np.isfinite(want)
            # Large values round their whole tile: errors are those of the layer's largest output.
            largest = np.abs(want[some]).max() if value == 3e38 else 1.0
            share = 4e-5 if variant == "winograd-6x6" else 1e-5
            assert np.allclose(y[some], want[some], rtol=1e-5, atol=share * largest), value


@pytest.mark.parametrize(("isa", "variant"), ROWS)
def test_error_stays_below_a_hundred_thousandth(isa, variant):
    """Of the layer's largest output, at 512 input channels."""
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(8)
    x = np.abs(sparse_array(rng, (1, 12, 12, 512), 0.7))
    weight = (rng.standard_normal((48, 512, 3, 3)) / 68).astype(np.float32)
    y, _ = kernels.conv(Case(ic=512, oc=48, act=NONE).problem(), variant, x, weight, None)
    t = torch.from_numpy(x.astype(np.float64)).permute(0, 3, 1, 2)
    want = torch.nn.functional.conv2d(t, torch.from_numpy(weight.astype(np.float64)), padding=1)
    error = np.abs(y - want.permute(0, 2, 3, 1).numpy()).max() / float(want.abs().max())
    assert error < {"winograd-2x2": 1e-6, "winograd-4x4": 3e-6, "winograd-6x6": 1e-5}[variant]


def test_other_kernels_than_three_by_three_are_refused():
    for change in (
        {"s": (2, 2)},
        {"k": (1, 3)},
        {"k": (5, 5)},
        {"groups": 2, "ic": 8, "oc": 8},
    ):
        p = Case(**change).problem()
        assert not any(v.startswith("winograd") for v in kernels.variants(p))
        weight = np.zeros((p.oc, p.ic // p.groups, p.kh, p.kw), np.float32)
        with pytest.raises(ValueError, match="winograd-4x4 cannot compute this problem"):
            kernels.conv(p, "winograd-4x4", np.zeros((1, 9, 9, p.ic), np.float32), weight, None)


def test_only_winograd_kernels_pool_and_without_residual():
    p = Case(pool=2).problem()
    assert kernels.variants(p) == [v for v in kernels.variants(Case().problem()) if v.startswith("winograd")]
    x, weight = np.zeros((1, 9, 9, p.ic), np.float32), np.zeros((p.oc, p.ic, 3, 3), np.float32)
    with pytest.raises(ValueError, match="no residual before a pool"):
        kernels.conv(p, "winograd-4x4", x, weight, None, np.zeros((1, 4, 4, p.oc), np.float32))
    with pytest.raises(ValueError, match="does not fit"):
        kernels.conv(Case(pool=2, h=1).problem(), "winograd-4x4", x[:, :1].copy(), weight, None)
    for change in ({"pool": 3}, {"pool": 2, "d": (2, 2)}):
        with pytest.raises(ValueError, match="pools of 2 x 2"):
            kernels.variants(Case(**change).problem())


def test_winograd_is_never_the_first_choice():
    """It is chosen by trial, after its error was measured."""
    for density in (0.1, 1.0):
        for packed in (False, True):
            p = Case(density=density, in_packed=packed).problem()
            assert not kernels.variants(p)[0].startswith("winograd")
