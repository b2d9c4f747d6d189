"""The codec for CompressAI-Vision: called as its pipelines call theirs; in its own registry and
beside its own codec where it is installed."""

import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from actzip.errors import CodecError, DataError, InputError
from actzip.split.compressai_vision import ActzipCodec, register


def features(frames=1):
    generator = torch.Generator().manual_seed(0)
    data = {
        "p2": torch.rand((frames, 8, 20, 24), generator=generator).relu(),
        "p3": torch.randn((frames, 8, 10, 12), generator=generator),
    }
    return {
        "data": data,
        "org_input_size": {"height": 80, "width": 96},
        "input_size": [(80, 96)],
        "file_name": "a.png",
    }


def made(**config):
    """As ``create_codec`` makes it: everything of the configuration, and model and data set."""
    return ActzipCodec(
        vision_model=torch.nn.Identity(),
        dataset={"name": "any"},
        device="cpu",
        eval_encode="bitrate",
        encoder_config=config,
        codec_output_dir="x",
        bitstream_name="b",
        measure_complexity=False,
    )


@pytest.mark.parametrize("frames", [1, 3])
def test_a_round_trip_as_the_pipelines_call_it(tmp_path, frames):
    codec, given = made(bits=8, price=2.0**-14), features(frames)
    result, seconds, complexity = codec.encode(given, tmp_path, "stream", "img_id_7", remote_inference=False)
    assert complexity is None and all(s >= 0 for s in seconds.values())
    path = Path(result["bitstream"])
    assert path.name == "stream-img_id_7.bin"  # what decode_only looks for
    assert result["bytes"] == [path.stat().st_size / frames] * frames
    raw = 4 * sum(t.numel() for t in given["data"].values())
    assert path.stat().st_size < raw / 2
    found, _, _ = codec.decode(
        str(path),
        tmp_path,
        "img_id_7",
        org_img_size=None,
        remote_inference=False,
        vcm_mode=False,
        output10b=False,
    )
    assert list(found["data"]) == list(given["data"])
    for k, t in given["data"].items():
        assert found["data"][k].shape == t.shape
        assert (found["data"][k] - t).abs().max() < 0.1 * t.abs().max()
    assert found["org_input_size"] == given["org_input_size"]
    assert codec.eval_encode_type == "bitrate" and codec.qp_value == 2.0**-14


def test_a_dearer_bit_is_a_smaller_file(tmp_path):
    sizes = [sum(made(price=2.0**p).encode(features(), tmp_path, f"s{p}")[0]["bytes"]) for p in (-14, -8, -4)]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0] / 2


def test_pictures_and_damaged_bitstreams_are_refused(tmp_path):
    codec = made()
    with pytest.raises(InputError, match="feature maps"):
        codec.encode({"file_names": []}, tmp_path, "s", "", remote_inference=True)
    path = Path(codec.encode(features(), tmp_path, "s")[0]["bitstream"])
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at])
        with pytest.raises(CodecError):
            codec.decode(path)
        damaged = bytearray(whole)
        damaged[at] ^= 64
        path.write_bytes(damaged)
        with pytest.raises(CodecError):
            codec.decode(path)
    with pytest.raises(DataError):
        codec.decode(tmp_path / "nowhere.bin")


@pytest.fixture
def theirs_installed(monkeypatch):
    """CompressAI-Vision, installed; or its sources in $ACTZIP_COMPRESSAI_VISION, without what its
    packages import besides."""
    checkout = os.environ.get("ACTZIP_COMPRESSAI_VISION")
    if checkout:
        from actzip.models._torchvision import import_torchvision

        import_torchvision()
        for name in ("", ".codecs", ".utils"):
            package = ModuleType(f"compressai_vision{name}")
            package.__path__ = [str(Path(checkout, "compressai_vision", name[1:]))]
            package.time_measure = time.perf_counter  # of .utils
            monkeypatch.setitem(sys.modules, package.__name__, package)
    pytest.importorskip("compressai_vision.registry", reason="CompressAI-Vision is not installed")


def test_in_the_registry_of_compressai_vision(theirs_installed, tmp_path):
    """Its own registry, its own Bypass codec as the model of what a codec gives."""
    registry = importlib.import_module("compressai_vision.registry")
    base = importlib.import_module("compressai_vision.codecs.base")
    register()
    theirs = base.Bypass(eval_encode="bitrate", encoder_config={"nbit_quant": -1})
    ours = registry.CODECS["actzip"](eval_encode="bitrate", encoder_config={}, device="cpu")
    want = theirs.encode(features(2), str(tmp_path), "s", "f", remote_inference=False)
    got = ours.encode(features(2), str(tmp_path), "s", "f", remote_inference=False)
    assert len(got) == len(want) and got[0].keys() == want[0].keys()
    assert len(got[0]["bytes"]) == len(want[0]["bytes"]) and type(got[1]) is type(want[1])
    back, again = (
        c.decode(r[0]["bitstream"], str(tmp_path), "f", remote_inference=False)
        for c, r in ((theirs, want), (ours, got))
    )
    assert len(back) == len(again) and back[0].keys() == again[0].keys()
    assert all(again[0]["data"][k].shape == v.shape for k, v in back[0]["data"].items())
    assert ours.eval_encode_type == theirs.eval_encode_type


def test_without_compressai_vision_registering_says_so(monkeypatch):
    for name in [m for m in sys.modules if m.startswith("compressai_vision")] or ["compressai_vision"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="not installed"):
        register()
