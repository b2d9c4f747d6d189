"""The command line as its users meet it: exit codes, one-line errors, JSON, nothing half-written."""

import json
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

from actzip import cli
from actzip.errors import ActzipWarning


@pytest.fixture
def run(capsys):
    def call(*args):
        try:
            cli.main([str(a) for a in args])
            code = 0
        except SystemExit as leave:
            code = leave.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture
def maps(tmp_path):
    path = tmp_path / "maps.npy"
    np.save(path, np.maximum(0, np.random.default_rng(0).standard_normal((2, 4, 8, 8))).astype(np.float32))
    return path


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_an_example_and_json(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "Example:" in out and f"actzip {verb}" in " ".join(out.split())
    assert "--json" in out


def test_help_documents_exit_codes(run):
    code, out, _ = run("--help")
    assert code == 0 and "Exit codes" in out


def test_info_as_json(run):
    code, out, _ = run("info", "--json")
    found = json.loads(out)
    assert code == 0 and found["isa"] in found["isas"] and "seg" in found["codecs"]


def test_encode_decode_inspect(run, maps, tmp_path):
    blob, back = tmp_path / "m.az", tmp_path / "back.npy"
    code, out, _ = run("encode", maps, blob, "--codec", "seg", "--bits", "8", "--json")
    assert code == 0 and json.loads(out)["codec"] == "seg"
    code, out, _ = run("inspect", blob, "--json")
    assert code == 0 and json.loads(out)["shape"] == [2, 4, 8, 8]
    assert run("decode", blob, back)[0] == 0
    original, decoded = np.load(maps), np.load(back)
    step = json.loads(run("inspect", blob, "--json")[1])["scale"]
    assert np.abs(original - decoded).max() <= step / 2 * 1.001
    assert ((original == 0) <= (decoded == 0)).all()


def test_missing_file_is_exit_code_4_in_one_line(run, tmp_path):
    code, out, err = run("encode", tmp_path / "no.npy", tmp_path / "x.az")
    assert code == 4 and not out and err.count("\n") == 1 and "no.npy" in err


@pytest.mark.parametrize("size", [0, 3, 20, -1])
def test_truncated_blob_is_exit_code_3_and_writes_nothing(run, maps, tmp_path, size):
    blob = tmp_path / "m.az"
    assert run("encode", maps, blob, "--bits", "8")[0] == 0
    blob.write_bytes(blob.read_bytes()[:size])
    code, _, err = run("decode", blob, tmp_path / "x.npy")
    assert code == 3 and err.startswith("error:")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.az", "maps.npy"]


def test_altered_blob_is_refused(run, maps, tmp_path):
    blob = tmp_path / "m.az"
    assert run("encode", maps, blob, "--bits", "8")[0] == 0
    data = bytearray(blob.read_bytes())
    data[-5] ^= 16
    blob.write_bytes(data)
    assert run("decode", blob, tmp_path / "x.npy")[0] == 3


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.0, np.nan], np.float32),
        np.array([1.0, np.inf], np.float32),
        np.array(["a", "b"]),
        np.array([1 + 2j]),
    ],
    ids=["nan", "inf", "text", "complex"],
)
def test_values_that_cannot_be_coded_are_exit_code_2(run, tmp_path, array):
    np.save(tmp_path / "bad.npy", array)
    code, _, err = run("encode", tmp_path / "bad.npy", tmp_path / "x.az", "--bits", "8")
    assert code == 2 and err.startswith("error:")
    assert not (tmp_path / "x.az").exists()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 4, 4)])
def test_empty_arrays_are_refused_by_shape(run, tmp_path, shape):
    np.save(tmp_path / "e.npy", np.zeros(shape, np.uint8))
    code, _, err = run("encode", tmp_path / "e.npy", tmp_path / "e.az")
    assert code == 2 and str(shape) in err
    assert not (tmp_path / "e.az").exists()


def test_unknown_codec_names_the_known(run, maps, tmp_path):
    code, _, err = run("encode", maps, tmp_path / "x.az", "--codec", "huffmann", "--bits", "8")
    assert code == 2 and "seg" in err


def test_unwritable_target_leaves_nothing(run, maps, tmp_path):
    code, _, err = run("encode", maps, tmp_path / "no" / "x.az", "--bits", "8")
    assert code == 4 and "cannot write" in err
    assert [p.name for p in tmp_path.iterdir()] == ["maps.npy"]


def test_pickled_array_is_not_loaded(run, tmp_path):
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert run("encode", tmp_path / "p.npy", tmp_path / "x.az")[0] == 4


def test_wrong_recipe_is_exit_code_5(run, tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\nmodle: {}\n")
    code, _, err = run("reproduce", tmp_path / "r.yaml", "--out", tmp_path / "o")
    assert code == 5 and "line 2" in err and "modle" in err
    assert not (tmp_path / "o").exists()


def test_missing_data_folder_is_exit_code_4(run, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {name: lenet5}\ndata: {name: mnist, validation: 10}\ntrain: {epochs: 1}\n"
    )
    code, _, err = run(
        "reproduce", tmp_path / "r.yaml", "--out", tmp_path / "o", "--data", tmp_path / "nowhere"
    )
    assert code == 4 and "nowhere" in err


def test_unknown_model_names_near_ones(run, tmp_path):
    code, _, err = run("sparsify", "lenet55", "--weights", "x", "--data", "digits", "--out", tmp_path / "y")
    assert code == 2 and "lenet5" in err


def test_unknown_layer_is_exit_code_6(run, tmp_path):
    from actzip.models import resolve, save_weights

    save_weights(resolve("lenet5"), tmp_path / "w.safetensors")
    args = [
        "sparsify",
        "lenet5",
        "--weights",
        tmp_path / "w.safetensors",
        "--data",
        "digits",
        "--validation",
        "100",
    ]
    code, _, err = run(*args, "--epochs", "1", "--layers", "relu9", "--out", tmp_path / "y.safetensors")
    assert code == 6 and "relu9" in err and "relu1" in err
    assert not (tmp_path / "y.safetensors").exists()


def test_sparsify_and_quantize_write_what_they_say(run, tmp_path):
    from actzip.models import load_weights, resolve, save_weights

    save_weights(resolve("lenet5"), tmp_path / "w.safetensors")
    common = ["lenet5", "--weights", tmp_path / "w.safetensors", "--data", "digits"]
    code, out, _ = run(
        "sparsify",
        *common,
        "--validation",
        100,
        "--limit",
        300,
        "--epochs",
        1,
        "--json",
        "--out",
        tmp_path / "s.safetensors",
    )
    assert code == 0 and set(json.loads(out)) >= {"before", "after", "run"}
    load_weights(resolve("lenet5"), tmp_path / "s.safetensors")
    code, out, _ = run(
        "quantize", *common, "--calibration", 50, "--bits", 4, "--json", "--out", tmp_path / "q.json"
    )
    assert code == 0 and set(json.loads(out)["maps"]) == {"relu1", "relu2", "relu3"}
    assert json.loads((tmp_path / "q.json").read_text())["maps"]["relu1"]["bits"] == 4


def test_debug_shows_the_error_itself(tmp_path):
    from actzip.errors import DataError

    with pytest.raises(DataError):
        cli.main(["inspect", str(tmp_path / "no.az"), "--debug"])


def test_what_nobody_foresaw_is_one_line_too(run, monkeypatch, tmp_path):
    import actzip.codec

    def fail(blob):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(actzip.codec, "inspect", fail)
    (tmp_path / "x.az").write_bytes(b"ACTZ")
    code, _, err = run("inspect", tmp_path / "x.az")
    assert code == 1 and err.startswith("error: ZeroDivisionError: by zero") and "--debug" in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", str(tmp_path / "x.az"), "--debug"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_write_leaves_nothing(maps, tmp_path, number):
    program = f"""
import os, signal, actzip.files
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
from actzip import cli
def half(file, data):
    file.write(data[:10])
    os.kill(os.getpid(), {int(number)})
    file.write(data[10:])
actzip.files._write = half
cli.main(["encode", {str(maps)!r}, {str(tmp_path / "x.az")!r}, "--bits", "8"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 128 + number and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["maps.npy"]


def test_a_scalar_is_an_array(run, tmp_path):
    np.save(tmp_path / "s.npy", np.float32(3))
    assert run("encode", tmp_path / "s.npy", tmp_path / "s.az", "--bits", "8")[0] == 0
    assert run("decode", tmp_path / "s.az", tmp_path / "t.npy")[0] == 0
    assert np.load(tmp_path / "t.npy") == np.float32(3)


def test_warnings_are_one_line(run, monkeypatch, tmp_path):
    def warn(blob):
        warnings.warn("mind\nthis", ActzipWarning, stacklevel=1)
        raise KeyboardInterrupt

    import actzip.codec

    monkeypatch.setattr(actzip.codec, "inspect", warn)
    (tmp_path / "x.az").write_bytes(b"ACTZ")
    code, _, err = run("inspect", tmp_path / "x.az")
    assert code == 130 and "warning: mind this" in err


def test_compile_prints_what_runs_where(run, tmp_path):
    out = tmp_path / "fast.pickle"
    code, text, _ = run("compile", "lenet5", "--no-tune", "--runs", "1", "--threads", "1", "--out", out)
    assert code == 0 and "eff. MMACs" in text and "conv" in text
    import pickle

    fast = pickle.loads(out.read_bytes())
    assert fast(np.zeros((2, 1, 28, 28), np.float32)).shape == (2, 10)
    code, text, err = run("compile", "lenet5", "--no-tune", "--runs", "1", "--json", "--batch", "3")
    found = json.loads(text)
    assert code == 0 and found["batch"] == 3 and sum(r["macs"] for r in found["rows"]) > 0 and "random" in err


@pytest.fixture
def sorts(tmp_path, monkeypatch):
    (tmp_path / "model_that_sorts.py").write_text(
        "import torch\nclass Sorts(torch.nn.Module):\n    def forward(self, x):\n        return "
        "x.sort(1)[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "model_that_sorts:Sorts"


def test_compile_of_what_the_engine_lacks_is_exit_code_7(run, sorts):
    code, _, err = run("compile", sorts, "--no-tune")
    assert code == 7 and "sort" in err and err.count("\n") == 2  # a warning of random input, and the error


def test_bench_times_engines_in_processes_of_their_own(run, monkeypatch):
    monkeypatch.delenv("ACTZIP_DEEPSPARSE_PYTHON", raising=False)
    code, text, _ = run(
        "bench",
        "lenet5",
        "--batch-size",
        "3",
        "--against",
        "torch,deepsparse",
        "--rounds",
        "2",
        "--runs",
        "2",
        "--threads",
        "1",
        "--json",
    )
    found = json.loads(text)
    rows = {r["engine"]: r for r in found["engines"]}
    assert code == 0 and list(rows) == ["actzip", "torch", "deepsparse"] and found["threads"] == 1
    for name in ("actzip", "torch"):
        r = rows[name]
        assert r["runs"] == 4 and r["median_ms"] > 0 and r["error"] < 1e-4 and r["peak_bytes"] > 0
        p = r["percentiles_ms"]
        assert r["fastest_ms"] <= p["50"] <= p["90"] <= p["95"] <= p["99"]
        assert p["50"] == pytest.approx(r["median_ms"])
        assert (
            r["images_per_second"] == pytest.approx(1e3 * found["batch"] / r["mean_ms"])
            and r["stdev_ms"] >= 0
        )
    assert "skip" in rows["deepsparse"] and found["isa"] in found["isas"] and found["batch"] == 3
    assert run("bench", "lenet5", "--engines", "no-such")[0] == 2


def test_export_writes_thresholds_that_other_engines_run(run, tmp_path):
    pytest.importorskip("onnx")
    cuts = tmp_path / "lenet5.thresholds.json"
    cuts.write_text(json.dumps({"relu1": 0.25, "relu2": [0.1] * 50}))
    target = tmp_path / "lenet5.onnx"
    code, text, err = run("export", "lenet5", str(target), "--thresholds", str(cuts), "--json")
    assert code == 0, err
    found = json.loads(text)
    assert (
        found["thresholds"] == 2
        and found["operators"]["ThresholdedRelu"] == 1
        and found["operators"]["Where"] == 1
    )
    assert run("compile", str(target), "--no-tune", "--threads", "1")[0] == 0
    code, text, err = run(
        "export", str(target), str(tmp_path / "b.onnx"), "--json"
    )  # an ONNX file goes in too
    assert code == 0, err
    assert json.loads(text)["operators"]["ThresholdedRelu"] == 1
    cuts.write_text("[1]")
    assert run("export", "lenet5", str(target), "--thresholds", str(cuts))[0] == 4
    cuts.write_text(json.dumps({"nowhere": 1.0}))
    assert run("export", "lenet5", str(target), "--thresholds", str(cuts))[0] == 6


def test_python_m_actzip_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "actzip", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()
