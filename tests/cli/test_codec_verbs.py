"""encode, decode and inspect on the command line: every kind of file, and what bad ones get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from actzip.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """run("verb", ...) -> (exit code, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(a) for a in args])
        except SystemExit as e:
            code = int(e.code or 0)
        got = capsys.readouterr()
        return code, got.out, got.err

    return call


@pytest.fixture
def array() -> np.ndarray:
    a = np.random.default_rng(0).integers(-99, 99, (2, 8, 30, 30)).astype("i1")
    a[a < 20] = 0
    return a


def test_one_array(run, array: np.ndarray) -> None:
    np.save("a.npy", array)
    assert run("encode", "a.npy")[0] == 0
    code, text, _ = run("inspect", "a.acz", "--json")
    info = json.loads(text)
    assert (
        code == 0 and info["shape"] == [2, 8, 30, 30] and info["total_bytes"] == Path("a.acz").stat().st_size
    )
    assert sum(info["chunk_bytes"]) + info["header_bytes"] == info["total_bytes"]
    assert "bits/element" in run("inspect", "a.acz")[1]
    assert run("decode", "a.acz", "b.npy")[0] == 0
    np.testing.assert_array_equal(np.load("b.npy"), array)


def test_files_of_several(run, array: np.ndarray) -> None:
    x = torch.relu(torch.randn(1, 4, 5, 5))
    save_file({"m": x.bfloat16(), "n": torch.from_numpy(array)}, "s.safetensors")
    torch.save({"m": x, "note": "kept out"}, "t.pt")
    np.savez("z.npz", p=array, q=x.numpy())
    for source in ("s.safetensors", "z.npz"):
        assert run("encode", source)[0] == 0
    assert run("encode", "t.pt", "t.acz", "--bits", "8", "--codec", "seg")[0] == 0
    assert run("decode", "t.acz", "t2.pt")[0] == 0
    assert (torch.load("t2.pt") - x).abs().max() <= x.max() / 255 * 0.5001
    names = json.loads(run("inspect", "s.azm", "--json")[1])["maps"]
    assert set(names) == {"m", "n"} and names["m"]["dtype"] == "bfloat16"
    assert run("decode", "s.azm", "s2.pt")[0] == 0
    assert torch.equal(torch.load("s2.pt")["m"], x.bfloat16())
    assert run("decode", "z.azm", "z2.safetensors")[0] == 0
    np.testing.assert_array_equal(load_file("z2.safetensors")["p"], array)
    assert run("decode", "z.azm", "p.npy", "--name", "p")[0] == 0
    np.testing.assert_array_equal(np.load("p.npy"), array)


def test_bad_input_is_one_line_and_an_exit_code(run, array: np.ndarray) -> None:
    np.save("a.npy", array)
    run("encode", "a.npy")
    blob = Path("a.acz").read_bytes()
    Path("cut.acz").write_bytes(blob[:-9])
    Path("bad.acz").write_bytes(blob[:-9] + bytes(9))
    Path("empty.acz").write_bytes(b"")
    Path("text.npy").write_text("no array")
    np.save("nan.npy", np.array([1.0, np.nan], np.float32))
    np.save("complex.npy", np.zeros(3, complex))
    before = {p.name for p in Path().iterdir()}
    for args, want in (
        (("decode", "cut.acz", "x.npy"), 3),
        (("decode", "bad.acz", "x.npy"), 3),
        (("inspect", "empty.acz"), 3),
        (("encode", "text.npy"), 4),
        (("encode", "missing.npy"), 4),
        (("encode", "a.npy", "no/folder/x.acz"), 4),
        (("encode", "nan.npy", "--bits", "8"), 2),
        (("encode", "complex.npy"), 2),
        (("encode", "a.npy", "x.acz", "--codec", "sge"), 2),
        (("decode", "a.acz", "x.txt"), 2),
        (("decode", "a.acz", "x.npy", "--name", "x"), 2),
    ):
        code, _, err = run(*args)
        assert code == want, (args, err)
        assert err.startswith("error:") and err.count("\n") == 1 and "Traceback" not in err
    assert {p.name for p in Path().iterdir()} == before
