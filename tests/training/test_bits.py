"""The native packing against plain torch, on every instruction set."""

import numpy as np
import pytest
import torch

from actzip import cpu
from actzip._native import _engine
from actzip.training.bits import NATIVE, PORTABLE, Predicate, PredicateKind

SIZES = [1, 7, 8, 63, 64, 65, 255, 256, 1000, 8191, 8192, 8193, 70001]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TESTS = [
    Predicate(PredicateKind.NOT_BELOW, 0.0, 0.0, 1.0, 0.0),
    Predicate(PredicateKind.NOT_BEYOND, 0.0, 2.0, 1.0, -np.inf),
    Predicate(PredicateKind.ABOVE, 0.0, 0.0, 1.0, -1.0),
    Predicate(PredicateKind.INSIDE, -0.5, 1.0, 0.25, -np.inf),
]


@pytest.fixture(params=cpu.isas())
def isa(request):
    with cpu.forced(request.param):
        yield request.param


def numbers(n, dtype, density=0.5, seed=0):
    """Values with zeros, minus zeros, infinities, NaNs and subnormal numbers among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n) * (rng.random(n) < density)
    odd = rng.integers(0, n, size=max(1, n // 50))
    x[odd] = rng.choice([-0.0, np.inf, -np.inf, np.nan, 1e-310, 1e-41, 2.0, -0.5], size=len(odd))
    return torch.from_numpy(x).to(dtype)


def bits_of(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[x.element_size()])


def unpacked(mask, n):
    return torch.from_numpy(np.unpackbits(mask.bits.numpy(), count=n, bitorder="little")).bool()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_and_values_come_back(isa, dtype):
    for n in SIZES:
        for density in (0.0, 0.3, 1.0):
            x = numbers(n, dtype, density, seed=n)
            mask = NATIVE.nonzero(x)
            nonzero = bits_of(x) != 0
            assert torch.equal(unpacked(mask, n), nonzero)
            assert mask.ones == nonzero.sum()
            assert torch.equal(mask.bits, PORTABLE.nonzero(x).bits)
            values = NATIVE.compress(x, mask)
            assert torch.equal(bits_of(NATIVE.expand(values, mask, n)), bits_of(x))
            if values.numel() == mask.ones:
                assert torch.equal(bits_of(values), bits_of(x[nonzero]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("test", TESTS, ids=lambda t: t.kind.name)
def test_tests_answer_as_comparisons_do(isa, dtype, test):
    for n in SIZES:
        x = numbers(n, dtype, seed=n)
        if test.kind == PredicateKind.NOT_BEYOND:  # PyTorch's own kernels answer a NaN in two ways
            assert (NATIVE.test(x, test) is None) == bool(x.isnan().any())
            x = torch.where(x.isnan(), 0, x)
        mask = NATIVE.test(x, test)
        assert torch.equal(unpacked(mask, n), test.of(x))
        on, off = torch.tensor(test.on, dtype=dtype), torch.tensor(test.off, dtype=dtype)
        filled = NATIVE.fill(mask, n, x, on, off)
        assert torch.equal(filled, torch.where(test.of(x), on, off))
        assert torch.equal(test.of(filled), test.of(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_mask_selects_is_unchanged(isa, dtype):
    for n in SIZES:
        x, mask = numbers(n, dtype, 1.0, seed=n), NATIVE.nonzero(numbers(n, dtype, seed=n + 1))
        expected = torch.where(unpacked(mask, n), bits_of(x), 0)
        assert torch.equal(bits_of(NATIVE.select(x, mask, n)), expected)


def test_bools_come_back(isa):
    for n in SIZES:
        x = torch.rand(n) < 0.3
        mask = NATIVE.nonzero(x)
        assert torch.equal(NATIVE.fill(mask, n, x, torch.tensor(True), torch.tensor(False)), x)


def test_a_mask_of_other_zeros_is_refused(isa):
    for dtype in DTYPES:
        x = torch.randn(9000).relu().to(dtype)
        mask = NATIVE.nonzero(x)
        x[8999] = 3.0 if x[8999] == 0 else 0.0
        assert NATIVE.compress(x, mask) is None
        assert PORTABLE.compress(x, mask) is None
        if dtype == torch.float32:
            assert NATIVE.quantize(x, 8, 1, mask) is None


def test_one_value_takes_no_room():
    noise = torch.nn.functional.dropout(torch.ones(10000), 0.5)
    for backend in (NATIVE, PORTABLE):
        mask = backend.nonzero(noise)
        values = backend.compress(noise, mask)
        assert values.numel() == 1
        assert torch.equal(backend.expand(values, mask, 10000), noise)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [NATIVE, PORTABLE])
def test_codes_are_within_a_step(isa, dtype, bits, masked, backend):
    for n in SIZES:
        x = torch.randn(n).to(dtype) * 3
        x = x.relu() if masked else x
        mask = backend.nonzero(x) if masked else None
        codes = backend.quantize(x, bits, 7, mask)
        back = backend.dequantize(codes, mask, n, dtype)
        assert back.dtype == dtype
        values = x.float()[x != 0] if masked else x.float()
        got = back.float()[x != 0] if masked else back.float()
        if masked:
            assert torch.equal(back != 0, x != 0)
        for i in range(0, 8192 if masked else n, 256) if n <= 8192 else ():
            group = values[i : i + 256]
            if group.numel():
                step = (group.max() - group.min()) / (2**bits - 1)
                slack = 0.01 * group.abs().max() if dtype != torch.float32 else 1e-5
                assert ((got[i : i + 256] - group).abs() <= step * 1.001 + slack).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_every_instruction_set_and_number_of_threads_makes_the_same_codes(bits):
    x, threads = torch.randn(100_001), torch.get_num_threads()
    made = []
    for isa in cpu.isas():
        for t in (1, 2):
            torch.set_num_threads(t)
            with cpu.forced(isa):
                made.append(NATIVE.quantize(x, bits, 11, None))
                back = NATIVE.dequantize(made[-1], None, x.numel(), x.dtype)
                assert torch.equal(back, NATIVE.dequantize(made[0], None, x.numel(), x.dtype))
    torch.set_num_threads(threads)
    assert all(torch.equal(m.codes, made[0].codes) and torch.equal(m.ranges, made[0].ranges) for m in made)
    other = NATIVE.quantize(x, bits, 12, None)
    assert not torch.equal(other.codes, made[0].codes)


@pytest.mark.parametrize("backend", [NATIVE, PORTABLE])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_mean_of_many_roundings_is_the_value(isa, backend, bits):
    x = torch.randn(2048)
    mean = torch.zeros_like(x)
    for seed in range(400):
        mean += backend.dequantize(backend.quantize(x, bits, seed, None), None, 2048, x.dtype) / 400
    step = (x.view(-1, 256).amax(1) - x.view(-1, 256).amin(1)) / (2**bits - 1)
    # a rounding's deviation is at most half a step
    assert ((mean - x).view(-1, 256).abs() < 5.5 * 0.5 * step[:, None] / 20).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("backend", [NATIVE, PORTABLE])
def test_what_is_not_finite_is_refused(isa, backend, value):
    x = torch.randn(9000)
    for place in (0, 300, 8999):
        y = x.clone()
        y[place] = value
        assert backend.quantize(y, 8, 1, None) is None
    y = torch.tensor([3e38, -3e38]).repeat(200)
    assert backend.quantize(y, 8, 1, None) is None  # the range overflows


def test_a_range_of_nothing_and_subnormal_ranges(isa):
    for x in (torch.full((300,), 2.5), torch.full((300,), 1e-40), torch.linspace(0, 1e-40, 300)):
        back = NATIVE.dequantize(NATIVE.quantize(x, 8, 1, None), None, 300, x.dtype)
        assert (back - x).abs().max() <= 1e-40


@pytest.mark.parametrize("channels_last", [False, True])
def test_pool_indices_come_back(channels_last):
    import torch.nn.functional as F

    layout = torch.channels_last if channels_last else torch.contiguous_format
    for kernel, stride, padding, dilation in [
        (2, 2, 0, 1),
        (3, 2, 1, 1),
        ((1, 2), 1, 0, 1),
        ((3, 5), (2, 1), (1, 2), 1),
        (3, 1, 1, 2),
        (9, 3, 4, 1),
    ]:
        x = torch.randn(2, 3, 23, 19).to(memory_format=layout)
        _, indices = F.max_pool2d(x, kernel, stride, padding, dilation, return_indices=True)

        def pair(v):
            return (v, v) if isinstance(v, int) else v

        outer, inner = (2, 3) if channels_last else (6, 1)
        pool = (
            outer,
            *indices.shape[-2:],
            inner,
            23,
            19,
            *pair(kernel),
            *pair(stride),
            *pair(padding),
            *pair(dilation),
        )
        bits = _engine.training.index_bits(pool)
        codes = torch.empty((indices.numel() * bits + 7) // 8, dtype=torch.uint8)
        assert _engine.training.pack_indices(indices.data_ptr(), pool, codes.data_ptr(), 2)
        back = torch.empty_like(indices)
        _engine.training.unpack_indices(codes.data_ptr(), pool, back.data_ptr(), 2)
        assert torch.equal(back, indices)
        wrong = indices.clone()
        wrong[-1, -1, -1, -1] = -1
        assert not _engine.training.pack_indices(wrong.data_ptr(), pool, codes.data_ptr(), 2)


def test_loops_run_on_the_threads_of_torch_or_on_our_own():
    from actzip.training import bits

    x = torch.randn(300_000)
    made = []
    for openmp in (0, bits._openmp()):
        _engine.training.use_openmp(openmp)
        mask = NATIVE.nonzero(x.relu())
        made.append((mask, NATIVE.compress(x.relu(), mask), NATIVE.quantize(x, 8, 3, None)))
    (mask, values, codes), (mask2, values2, codes2) = made
    assert torch.equal(mask.bits, mask2.bits) and torch.equal(values, values2)
    assert torch.equal(codes.codes, codes2.codes) and torch.equal(codes.ranges, codes2.ranges)
