"""Every row of the kernel table, on every instruction set of this CPU, against a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CLIP, F16, F32, NONE, RELU, THRESHOLD, U8, U16, Case, check, sparse_array

from actzip._native import _engine

kernels = _engine.kernels
ISAS = _engine.isas()
ROWS = [(isa, row["name"]) for isa in ISAS for row in kernels.table(isa)]


@pytest.fixture(autouse=True)
def _release():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the reference: small problems
    yield
    torch.set_num_threads(threads)
    _engine.force_isa("")


def random_case(rng, in_packed=None, depthwise=False, taps=False, winograd=False, cook=False) -> Case:
    pick = lambda *v: v[rng.integers(len(v))]  # noqa: E731
    k = pick((1, 1), (3, 3), (3, 3), (1, 7), (7, 1), (5, 5), (2, 3))
    s = pick((1, 1), (1, 1), (2, 2), (2, 1), (3, 2))
    d = pick((1, 1), (1, 1), (1, 1), (2, 2), (1, 3))
    if taps:  # what these kernels are for
        k, s, d = pick((3, 3), (1, 3)), pick((1, 1), (2, 1)), (1, 1)
    if winograd:
        k, s = (3, 3), (1, 1)
    pad = tuple(int(v) for v in rng.integers(0, 4, 4))
    if cook:  # one column or one row
        long, before, after = int(rng.integers(12, 40)), *map(int, rng.integers(0, 20, 2))
        k, pad = pick(((long, 1), (before, 0, after, 0)), ((1, long), (0, before, 0, after)))
        s, d = (1, 1), (1, 1)
    h, w = int(rng.integers(1, 20)), int(pick(1, 3, 7, 8, 17, 35, 75, 150))
    h = max(h, d[0] * (k[0] - 1) + 1 - pad[0] - pad[2])
    w = max(w, d[1] * (k[1] - 1) + 1 - pad[1] - pad[3])
    if w > 40:
        h = min(h, max(4, d[0] * (k[0] - 1) + 1))
    groups = 1 if winograd or cook or rng.random() < 0.75 else int(pick(2, 3, 4, 8))
    icg, ocg = (
        int(pick(1, 3, 5, 16, 31, 64, 65, 130)),
        int(pick(1, 3, 8, 24, 48, 64, 80, 96, 130, 160, 192, 320)),
    )
    if groups > 1:
        icg, ocg = min(icg, 40), min(ocg, 40)
    ic, oc = icg * groups, ocg * groups
    if depthwise:
        groups = ic = oc = int(pick(2, 3, 16, 24, 64, 96, 130, 390))
        if rng.random() < 0.25:  # ConvNeXt's
            k, s, d, h, w = (7, 7), (1, 1), (1, 1), max(h, 7), max(w, 7)
    parts: list[int] = []
    if rng.random() < 0.4 and ic > 2:
        cut = int(rng.integers(1, ic))
        parts = [cut, ic - cut]
    packed = bool(rng.random() < 0.5) if in_packed is None else in_packed
    residual = pick("", "", "dense", "packed")
    return Case(
        n=int(pick(1, 1, 2, 3)),
        h=h,
        w=w,
        ic=ic,
        oc=oc,
        k=k,
        s=s,
        d=d,
        pad=pad,
        groups=groups,
        density=float(pick(0.0, 0.05, 0.3, 0.5, 0.8, 1.0)),
        in_packed=packed,
        out_packed=bool(rng.random() < 0.5),
        act=int(rng.integers(5)),
        per_channel=bool(rng.random() < 0.5),
        bias=bool(rng.random() < 0.8),
        residual=residual,
        pre=bool(residual) and bool(rng.random() < 0.5),
        parts=parts,
        in_type=int(pick(F32, F32, F16, U8, U16)),
        out_type=int(pick(F32, F32, F16, U8, U16)),
        capacity=float(pick(0.0, 0.3, 1.0)),
        threads=int(pick(1, 2, 3)),
        front=int(pick(0, 0, 2)),
        seed=int(rng.integers(1 << 30)),
    )


@pytest.mark.parametrize(("isa", "variant"), ROWS)
def test_random_problems(isa, variant):
    assert _engine.force_isa(isa)
    kind = next(r["kind"] for r in kernels.table(isa) if r["name"] == variant)
    rng = np.random.default_rng(sum(map(ord, isa + variant)))
    done = 0
    for _ in range(14):
        c = random_case(
            rng,
            in_packed=True if kind == "sparse" else None,
            depthwise=kind == "depthwise",
            taps="taps" in variant,
            winograd=kind == "winograd",
            cook="cook" in variant,
        )
        if variant in kernels.variants(c.problem()):
            check(c, variant)
            done += 1
    assert done > 0


@pytest.mark.parametrize(("isa", "variant"), ROWS)
def test_same_bits_for_every_thread_count_and_batch(isa, variant):
    assert _engine.force_isa(isa)
    kind = next(r["kind"] for r in kernels.table(isa) if r["name"] == variant)
    groups = {"depthwise": 64, "grouped": 16}.get(kind, 1)
    rng = np.random.default_rng(5)
    x = sparse_array(rng, (3, 19, 37, 64), 0.4)
    oc = 7 if "lines" in variant else 64
    k, pad = ((1, 17), (0, 5, 0, 9)) if "cook" in variant else ((3, 3), (1, 1, 1, 1))
    weight = rng.standard_normal((oc, 64 // groups, *k)).astype(np.float32)
    c = Case(ic=64, oc=oc, k=k, pad=pad, groups=groups, in_packed=kind == "sparse")
    outs = [
        kernels.conv(c.problem(), variant, x[:n].copy(), weight, None, threads=t)[0]
        for n, t in [(3, 1), (3, 2), (3, 5), (1, 1), (1, 2)]
    ]
    for y in outs[1:]:
        assert np.array_equal(y, outs[0][: len(y)])


@pytest.mark.parametrize("k", [(3, 3), (1, 14), (13, 1)])
@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_propagate(isa, k):
    """A NaN activation is not zero; an output is NaN exactly where the reference is."""
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(1)
    x = sparse_array(rng, (1, 6, 6, 70), 0.3)
    x[0, 2, 3, 68], x[0, 5, 0, 1] = np.nan, np.inf
    weight = rng.standard_normal((20, 70, *k)).astype(np.float32)
    pad = (k[0] // 2, k[1] // 2)
    for act in (NONE, RELU, CLIP, THRESHOLD):
        for packed in (False, True):
            c = Case(ic=70, oc=20, k=k, pad=(*pad, *pad), act=act, in_packed=packed, out_packed=packed)
            for variant in kernels.variants(c.problem()):
                y, _ = kernels.conv(c.problem(), variant, x, weight, None)
                t = torch.from_numpy(x).permute(0, 3, 1, 2)
                want = torch.nn.functional.conv2d(t, torch.from_numpy(weight), padding=pad)
                assert np.array_equal(np.isnan(y), np.isnan(want.permute(0, 2, 3, 1).numpy())), (act, variant)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_a_large_bias_costs_the_sums_no_precision(isa, residual):
    """It is added to them, bit for bit: were it their start, each product would be rounded to its size."""
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(2)
    x = sparse_array(rng, (1, 7, 9, 200), 0.4)
    for k, oc in (((1, 1), 70), ((3, 3), 96), ((3, 3), 5)):
        weight = (rng.standard_normal((oc, 200, *k)) / 100).astype(np.float32)
        bias = (rng.standard_normal(oc) * 100).astype(np.float32)
        more = sparse_array(rng, (1, 7, 9, oc), 1.0) if residual else None
        for packed, out_packed in ((False, False), (True, False), (True, True)):
            pad = (k[0] // 2,) * 4
            c = Case(ic=200, oc=oc, k=k, pad=pad, act=NONE, in_packed=packed, out_packed=out_packed)
            for variant in kernels.variants(c.problem()):
                if variant.startswith(("winograd", "cook")):
                    continue
                sums, _ = kernels.conv(c.problem(), variant, x, weight, None)
                y, _ = kernels.conv(c.problem(), variant, x, weight, bias, more)
                want = sums + bias if more is None else sums + bias + more
                assert np.array_equal(y, want), (variant, packed, out_packed)


@pytest.mark.parametrize("isa", ISAS)
def test_activations_make_nothing_of_lanes_beyond_the_channels(isa):
    """What a vector holds beyond the last channel is not stored, even where the activation of zero is not
    zero: all values that follow would be another channel's."""
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(4)
    x = sparse_array(rng, (1, 5, 9, 70), 0.4)
    for oc in (3, 20, 33, 81):
        weight = rng.standard_normal((oc, 70, 3, 3)).astype(np.float32)
        c = Case(ic=70, oc=oc, act=CLIP)
        p = c.problem()
        p.lo, p.hi = 0.25, 3.0
        t = torch.from_numpy(x).permute(0, 3, 1, 2)
        want = torch.nn.functional.conv2d(t, torch.from_numpy(weight), padding=1).clamp(0.25, 3.0)
        for variant in kernels.variants(p):
            y, _ = kernels.conv(p, variant, x, weight, None)
            np.testing.assert_allclose(y, want.permute(0, 2, 3, 1).numpy(), atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_pack_round_trip(isa):
    assert _engine.force_isa(isa)
    rng = np.random.default_rng(2)
    for channels, parts in [(1, []), (17, []), (64, []), (130, []), (130, [30, 100]), (63, [1, 62])]:
        for density in (0.0, 0.3, 1.0):
            for capacity in (0.0, 0.5, 1.0):
                x = sparse_array(rng, (2, 3, 11, channels), density)
                y, used, spilled, nonzeros, _ = kernels.roundtrip(x, parts, F32, 1.0, capacity, 2)
                assert np.array_equal(x, y)
                assert nonzeros == np.count_nonzero(x)
                assert used + spilled == nonzeros * 4
                assert used <= capacity * x.nbytes + 64


@pytest.mark.parametrize("isa", ISAS)
def test_pack_special_values_and_types(isa):
    assert _engine.force_isa(isa)
    x = np.zeros((1, 1, 3, 40), np.float32)
    special = [np.nan, np.inf, -np.inf, 1e-40, -1e-40, 2**-25, 2**-24, 65519.9, 65520, 1e9, -3]
    special += [0.5, 1.5, 2.5, 254.6, -0.0]
    x[0, 0, 1, : len(special)] = special
    y = kernels.roundtrip(x, [], F32, 1.0, 1.0, 1)[0]
    assert np.array_equal(x, y, equal_nan=True)
    y, _, _, nonzeros, _ = kernels.roundtrip(x, [], F16, 1.0, 1.0, 1)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(want, y, equal_nan=True)
    assert nonzeros == np.count_nonzero(want)
    for kind, top in ((U8, 255), (U16, 65535)):
        y, _, _, nonzeros, _ = kernels.roundtrip(x, [], kind, 0.5, 1.0, 1)
        want = np.clip(np.rint(np.where(np.isnan(x), np.inf, x) / np.float32(0.5)), 0, top) * np.float32(0.5)
        assert np.array_equal(want, y)
        assert nonzeros == np.count_nonzero(want)


def test_every_half_and_every_integer_survives():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = np.resize(halves, (1, 1, 1024, 64)).copy()
    for isa in ISAS:
        assert _engine.force_isa(isa)
        y = kernels.roundtrip(x, [], F16, 1.0, 1.0, 1)[0]
        assert np.array_equal(x, y, equal_nan=True)
        numbers = np.arange(1 << 16, dtype=np.float32).reshape(1, 1, 1024, 64) * np.float32(0.25)
        assert np.array_equal(kernels.roundtrip(numbers, [], U16, 0.25, 1.0, 1)[0], numbers)


def test_memory_falls_with_density():
    """Index and values of a float32 map at density 0.44 take less than half of the dense map."""
    x = sparse_array(np.random.default_rng(3), (1, 35, 35, 256), 0.44)
    _, used, spilled, _, index = kernels.roundtrip(x, [], F32, 1.0, 0.46, 1)
    assert spilled == 0
    assert used + index < 0.5 * x.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ic": 0}, "positive"),
        ({"sh": 0}, "positive"),
        ({"pad_left": -1}, "negative"),
        ({"groups": 3}, "groups"),
        ({"thresholds": [1.0]}, "threshold"),
    ],
)
def test_impossible_problems_are_refused(change, message):
    p = Case(ic=64, oc=64).problem()
    for name, value in change.items():
        setattr(p, name, value)
    with pytest.raises(ValueError, match=message):
        kernels.variants(p)


def test_unknown_kernel_is_refused():
    p = Case(ic=4, oc=4).problem()
    with pytest.raises(ValueError, match="no kernel named nonsense"):
        kernels.conv(
            p, "nonsense", np.zeros((1, 7, 9, 4), np.float32), np.zeros((4, 4, 3, 3), np.float32), None
        )
