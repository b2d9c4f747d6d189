"""Maps over the wire: quantizers, frames, streams. Damage, loss and strangers end in typed errors."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import actzip
from actzip import cpu
from actzip.codec import encode
from actzip.errors import ActzipError, CodecError, DataError, InputError, StreamError
from actzip.split.coder import MapCoder
from actzip.split.frames import Frame, pack, unpack
from actzip.split.quantizer import MapQuantizer
from actzip.split.rate import Rates
from actzip.split.sides import Head, Tail


def quantizer(levels=7, signed=False, channels=3, rounding=0.4, name="m", side=4):
    rng = np.random.default_rng(levels)
    steps = rng.uniform(0.1, 1, channels).astype(np.float32)
    points = np.arange(levels + 1, dtype=np.float32) + np.float32(0.1)
    points[0] = 0
    return MapQuantizer(name, (channels, side, side), signed, steps, levels, rounding, points)


def video(signed, frames=12, batch=1, seed=0):
    """Maps that change a little from frame to frame."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 3, 4, 4)).astype(np.float32) * 2
    for _ in range(frames):
        x = x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
        yield x if signed else np.maximum(x, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.floats(0.05, 0.5), st.integers(0, 2**31), st.booleans())
def test_the_formula_is_what_it_says(bits, signed, rounding, seed, one):
    if signed and bits == 1:
        return
    levels = 2 ** (bits - signed) - 1
    rng = np.random.default_rng(seed)
    q = quantizer(levels, signed, 1 if one else 3, rounding)
    if one:
        q = MapQuantizer("m", (3, 4, 4), signed, q.steps, levels, rounding, q.points)
    x = rng.standard_normal((2, 3, 4, 4)).astype(np.float32) * (1 if signed else 0.5)
    x = np.where(rng.random(x.shape) < 0.3, 0, x if signed else np.abs(x)).astype(np.float32)
    steps = np.broadcast_to(q.steps.reshape(-1, 1, 1), (3, 4, 4))
    want = np.sign(x) * np.minimum(
        levels, np.floor(np.abs(x) * (np.float32(1) / steps) + np.float32(rounding))
    )
    got = q.integers(x)
    assert q.bits == bits and got.dtype == (np.int8 if signed else np.uint8)
    assert np.array_equal(got, want)
    assert np.array_equal(
        q.values(got), (np.sign(want) * q.points[np.abs(want).astype(int)] * steps).astype(np.float32)
    )
    assert (q.values(got)[x == 0] == 0).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("levels", [1, 15, 31, 32, 127])
@pytest.mark.parametrize("side", [1, 3, 17])
@pytest.mark.parametrize("name", cpu.isas())
def test_all_instruction_sets_quantize_alike(name, signed, levels, side):
    """Sides that fill no vector; halves between levels; beyond the clip; infinite products."""
    q = quantizer(levels, signed, side=side)
    rng = np.random.default_rng(side)
    x = rng.standard_normal((3, 3, side, side)).astype(np.float32) * levels
    halves = (np.round(x) + 0.5 - np.float32(q.rounding)) * q.steps.reshape(-1, 1, 1)
    x = np.where(rng.random(x.shape) < 0.5, x, halves).astype(np.float32)
    x.flat[0], x.flat[-1] = np.float32(3e38), np.float32(-3e38)
    with np.errstate(over="ignore"):
        y = np.abs(x) * (np.float32(1) / q.steps.reshape(-1, 1, 1)) + np.float32(q.rounding)
        want = np.sign(x) * np.minimum(np.floor(y), levels)
    want = want if signed else np.maximum(want, 0)
    with cpu.forced(name):
        got = q.integers(x)
        values = q.values(got)
    assert np.array_equal(got, want)
    back = np.sign(want) * q.points[np.abs(want).astype(int)] * q.steps.reshape(-1, 1, 1)
    assert values.tobytes() == (back + 0.0).astype(np.float32).tobytes()
    assert np.array_equal(q.integers(np.asfortranarray(x)), got)
    for bad in (np.nan, np.inf, -np.inf):
        x.flat[x.size // 2] = bad
        with pytest.raises(InputError, match="not finite"):
            q.integers(x)


def test_a_quantizer_says_what_it_was_given():
    q = quantizer()
    with pytest.raises(InputError, match=r"shape \(1, 3, 5, 4\), not \(N, 3, 4, 4\)"):
        q.integers(np.zeros((1, 3, 5, 4), np.float32))
    with pytest.raises(InputError, match="not finite"):
        q.integers(np.full((1, 3, 4, 4), np.nan, np.float32))
    with pytest.raises(InputError, match="levels"):
        quantizer(200, signed=True)
    with pytest.raises(InputError, match="rounding"):
        quantizer(rounding=0.7)


def test_a_coder_comes_back_from_plain_values():
    coder = MapCoder([quantizer(), quantizer(63, True, name="n")])
    again = MapCoder.from_dict(json.loads(json.dumps(coder.to_dict())))
    assert again.mark == coder.mark
    x = [next(video(False)), next(video(True))]
    assert again.encode(x) == coder.encode(x)
    for damaged in ({}, {"format": 99}, {"format": 1}, {**coder.to_dict(), "maps": [{"name": 1}]}, 3):
        with pytest.raises(DataError):
            MapCoder.from_dict(damaged)


@pytest.mark.parametrize("codec", ["rans", "seg", "zvc", "huffman", "raw", "auto"])
@pytest.mark.parametrize("batch", [1, 3])
def test_frames_come_back(codec, batch):
    coder = MapCoder([quantizer(), quantizer(63, True, name="n")], codec)
    maps = [next(video(False, batch=batch)), next(video(True, batch=batch))]
    want = [q.values(q.integers(m)) for q, m in zip(coder.quantizers, maps, strict=True)]
    for given_maps in (maps, [torch.from_numpy(m) for m in maps]):
        got = coder.decode(coder.encode(given_maps))
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("levels, signed", [(1, False), (3, False), (255, False), (1, True), (127, True)])
def test_a_stream_gives_what_single_frames_give(levels, signed):
    coder = MapCoder([quantizer(levels, signed)])
    sender, receiver = coder.sender(key_every=5), coder.receiver()
    keys = []
    for x in video(signed):
        frame = sender.encode(x)
        keys.append(unpack(frame).key)
        (got,) = receiver.decode(frame)
        assert np.array_equal(got, coder.decode(coder.encode(x))[0])
    assert keys == [i % 5 == 0 for i in range(12)]


def test_prediction_saves_bits_and_a_change_of_batch_begins_anew():
    coder = MapCoder([quantizer(255, side=32)])
    rng = np.random.default_rng(0)
    x = rng.random((1, 3, 32, 32)).astype(np.float32) * 100
    sender, receiver = coder.sender(), coder.receiver()
    first, second = sender.encode(x), sender.encode(x + np.float32(0.01))
    assert len(second) < len(first) / 3
    receiver.decode(first)
    receiver.decode(second)
    third = sender.encode(np.concatenate([x, x]))
    assert unpack(third).key and len(receiver.decode(third)[0]) == 2


def test_lost_repeated_and_late_frames_are_refused_until_a_key_frame():
    coder = MapCoder([quantizer()])
    sender = coder.sender(key_every=100)
    frames = [sender.encode(x) for x in video(False, 6)]
    receiver = coder.receiver()
    with pytest.raises(StreamError, match="key frame is needed"):
        receiver.decode(frames[1])
    receiver.decode(frames[0])
    receiver.decode(frames[1])
    with pytest.raises(StreamError, match="frame 2 was expected, 4 came: 2 lost"):
        receiver.decode(frames[4])
    with pytest.raises(StreamError, match="twice or late"):
        receiver.decode(frames[1])
    receiver.decode(frames[2])  # what was refused changed nothing
    sender.key()
    x = next(video(False, seed=5))
    (got,) = receiver.decode(sender.encode(x))
    assert np.array_equal(got, coder.decode(coder.encode(x))[0])
    with pytest.raises(StreamError):
        receiver.decode(frames[3])
    receiver.decode(coder.sender().encode(x))  # a client that began anew
    with pytest.raises(StreamError, match="needs the one before"):
        coder.decode(frames[1])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_frame_is_refused_and_the_stream_stays(data):
    coder = MapCoder([quantizer(), quantizer(7, True, name="n")])
    sender, receiver = coder.sender(), coder.receiver()
    maps = list(zip(video(False, 3), video(True, 3), strict=True))
    receiver.decode(sender.encode(list(maps[0])))
    frame = bytearray(sender.encode(list(maps[1])))
    kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
    damaged = bytearray(frame)
    if kind == "flip":
        at = data.draw(st.integers(0, len(frame) - 1))
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del damaged[data.draw(st.integers(0, len(frame) - 1)) :]
    else:
        damaged += b"x"
    with pytest.raises(CodecError):
        receiver.decode(bytes(damaged))
    receiver.decode(bytes(frame))


def test_frames_of_strangers_are_refused():
    coder, other = MapCoder([quantizer()]), MapCoder([quantizer(15)])
    x = next(video(False))
    with pytest.raises(CodecError, match="another split"):
        coder.decode(other.encode(x))
    frame = bytearray(coder.encode(x))
    frame[4] = 2
    with pytest.raises(CodecError, match="version 2; this reads version 1"):
        coder.decode(frame)
    for nothing in (b"", b"A", b"AZSF", b"GET / HTTP/1.1\r\n\r\n", bytes(100)):
        with pytest.raises(CodecError):
            coder.decode(nothing)


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((1, 3, 5, 4), np.uint8), "shape"),
        (np.zeros((3, 4, 4), np.uint8), "shape"),
        (np.zeros((999, 3, 4, 4), np.uint8), "N from 1 to 256"),
        (np.zeros((1, 3, 4, 4), np.int8), "int8"),
        (np.zeros((1, 3, 4, 4), np.float32), "float32"),
        (np.full((1, 3, 4, 4), 200, np.uint8), "8 bits"),
    ],
)
def test_a_whole_frame_of_other_maps_is_refused(array, said):
    """The checksum is right: what is inside was never this split's."""
    coder = MapCoder([quantizer()])
    frame = pack(Frame(coder.mark, 0, True, ((False, encode(array, "rans")),)))
    with pytest.raises(CodecError, match=said):
        coder.decode(frame)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("per", ["channel", "map"])
def test_a_dearer_bit_costs_fewer_bits_and_more_error(signed, per):
    rng = np.random.default_rng(0)
    x = rng.laplace(size=(4, 6, 16, 16)).astype(np.float32) * np.arange(1, 7).reshape(-1, 1, 1)
    x = x if signed else np.maximum(x, 0)
    rates = Rates("m", [x], bits=8, per=per)
    before = None
    for power in range(-14, 4, 2):
        q, bits = rates.at(rates.dropped / rates.elements * 2.0**power)
        assert len(q.steps) == (6 if per == "channel" else 1)
        error = float(((q.values(q.integers(x)) - x) ** 2).sum())
        real = 8 * len(encode(q.integers(x), "rans", q.bits)) / x.size
        assert real < bits * 1.1 + 0.3
        if before:
            assert bits <= before[0] + 1e-9 and error >= before[1] * 0.999
        before = bits, error
    assert bits < 0.1


def test_the_chosen_quantizer_beats_uniform_rounding_at_the_same_error():
    rng = np.random.default_rng(1)
    scale = np.exp(rng.normal(size=(16, 1, 1)))
    x = np.maximum(rng.laplace(size=(4, 16, 16, 16)) * scale, 0).astype(np.float32)
    rates = Rates("m", [x], bits=8)
    q, _ = rates.at(rates.dropped / rates.elements * 2.0**-5)
    ours = q.integers(x)
    ours_bits = len(encode(ours, "rans", q.bits))
    ours_error = float(((q.values(ours) - x) ** 2).mean())
    uniform = []
    for step in np.geomspace(0.01, 10, 60):
        n = np.clip(np.rint(x / step), 0, 255)
        uniform.append((len(encode(n.astype(np.uint8), "rans", 8)), float(((n * step - x) ** 2).mean())))
    at_same_error = min(b for b, e in uniform if e <= ours_error)
    assert ours_bits < 0.98 * at_same_error


@pytest.mark.parametrize("bits", [0, 9, 1.5, None])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(InputError, match="bits"):
        Rates("m", [np.ones((1, 2, 3, 3), np.float32)], bits=bits)


def test_maps_that_are_all_zero_or_constant_can_be_coded():
    for x in (np.zeros((2, 3, 4, 4), np.float32), np.ones((2, 3, 4, 4), np.float32)):
        q, _ = Rates("m", [x], bits=1).at(1e-9)
        coder = MapCoder([q])
        assert np.allclose(coder.decode(coder.encode(x))[0], x, rtol=1e-5)
    with pytest.raises(InputError, match="not finite"):
        Rates("m", [np.full((1, 2, 3), np.inf, np.float32)])


def test_head_and_tail_files(tmp_path):
    torch.manual_seed(0)
    model = actzip.models.resolve("cifar_resnet20").eval()
    x = torch.rand(4, 3, 32, 32)
    head, tail = actzip.split(model, "layer1.1.relu1", x, compile=True, threads=1)
    maps = head(x)
    coder = MapCoder([Rates(f"m{i}", [m.numpy()]).at(1e-9)[0] for i, m in enumerate(maps)])
    Head(head, coder, "layer2").save(tmp_path / "head.actzip")
    Tail(tail, coder, "layer2").save(tmp_path / "tail.actzip")
    client = actzip.split.load(tmp_path / "head.actzip", threads=1)
    server = actzip.split.load(tmp_path / "tail.actzip", threads=1)
    assert isinstance(client, Head) and isinstance(server, Tail) and server.at == "layer2"
    with torch.no_grad():
        want = model(x).numpy()
    got = server(client.encode(x))
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    sender, receiver = client.sender(), server.receiver()
    for i in range(3):
        assert np.allclose(receiver(sender.encode(x[i : i + 1])), got[i : i + 1], atol=1e-5)
    model_file = actzip.compile(model, x, tune=False).save(tmp_path / "whole.actzip")
    with pytest.raises(DataError, match="no part of a split"):
        actzip.split.load(model_file)
    for bad in ("missing.actzip", __file__):
        with pytest.raises(ActzipError):
            actzip.split.load(tmp_path / bad)
