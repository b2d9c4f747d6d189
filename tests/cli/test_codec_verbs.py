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


# --- names and messages that came from outside


NASTY = [
    "x[/red]",
    "features[relu1]",
    "a\x1b[31mred",
    "[bold]b[/bold]",
    "c\x9b2J",
    "d\u202egnp",
    "e\nf\rg",
    "\\[x]",
    "[link=x]",
]


def _raw(text: str) -> list[str]:
    """Characters in output that a terminal would obey."""
    import unicodedata

    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")]


def test_cli_markup(run, tmp_path, monkeypatch):
    from actzip.codec import save_maps

    monkeypatch.setenv("COLUMNS", "200")
    a = np.zeros((2, 3, 4, 4), np.uint8)
    for i, name in enumerate(NASTY):
        path = tmp_path / f"{i}.azm"
        save_maps(path, {name: a, "b": a})
        for verb in (
            ["inspect", path],
            ["decode", path, tmp_path / "x.safetensors"],
            ["inspect", path, "--json"],
        ):
            code, out, err = run(*verb)
            assert code == 0 and not _raw(out + err), (name, out, err)
        if name.isprintable():
            assert name in run("inspect", path)[1]
        code, out, err = run("inspect", path, "--name", "no" + name)
        assert code == 2 and not _raw(err) and err.count("\n") == 1
        assert name in json.loads(run("inspect", path, "--json")[1])["maps"]


def test_cli_markup_in_paths_and_options(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("m.npy", np.zeros((2, 3, 4, 4), np.uint8))
    for name in NASTY:
        if "/" in name or "\n" in name:
            continue
        Path(f"{name}.npy").write_bytes(Path("m.npy").read_bytes())
        code, out, err = run("encode", f"{name}.npy")
        assert code == 0 and Path(f"{name}.acz").exists() and not _raw(out + err)
        lines = f"""encode {name}.no|profile {name}|{name}|encode --{name}|encode m.npy --bits {name}|
            reproduce {name}|profile lenet5 --no-engine --data {name}|
            bench lenet5 --against {name}|profile --compare {name} {name}|
            export {name} x.onnx"""
        for verb in (line.split(" ") for line in lines.replace("\n            ", "").split("|")):
            code, out, err = run(*verb)
            assert code in (2, 4, 5) and not _raw(out + err), (verb, err)
    Path("d[").mkdir()
    Path("d[/b].npy").write_bytes(Path("m.npy").read_bytes())
    code, out, _ = run("encode", "d[/b].npy")
    assert code == 0 and "d[/b].acz" in out and Path("d[/b].acz").exists()


def test_tracebacks_show_no_control_characters(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "actzip.cli", "inspect", str(tmp_path / "a\x1b[31m"), "--debug"],
        capture_output=True,
        text=True,
    )
    assert done.returncode and "Traceback" in done.stderr and not _raw(done.stderr)


def test_report_tables_show_names_as_they_are(capsys):
    import torch
    from rich.console import Console

    import actzip
    from actzip.profile import compare

    net = torch.nn.Sequential()
    for i, name in enumerate(["x[/red]", "a\x1b[31m", "[bold]"]):
        net.add_module(name, torch.nn.Sequential(torch.nn.Conv2d(3 if not i else 4, 4, 1), torch.nn.ReLU()))
    report = actzip.profile(
        net, [torch.randn(2, 3, 4, 4)], codecs=[], engine=False, whatif_images=0, name="[/x]\x1b"
    )
    for shown in (
        report,
        report.table(),
        compare(report, report).table(),
    ):
        print(shown)
        Console().print(shown)
    text = capsys.readouterr().out
    assert "x[/red]" in text and "[bold]" in text and not _raw(text)
    page = report.to_html()
    assert "\x1b" not in page and "<b>" not in page.split("</style>")[0]


def test_print_table(capsys):
    import torch

    import actzip
    from actzip.profile import compare

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
    report = actzip.profile(net, [torch.randn(2, 3, 4, 4)], codecs=[], engine=False, whatif_images=0)
    for shown in (report.table(), compare(report, report).table()):
        print(shown)
        assert "object at" not in repr(shown)
    text = capsys.readouterr().out
    assert "Activation maps" in text and "Before and after" in text and "object at" not in text


@pytest.mark.parametrize(
    "names", [["file", "b"], ["allow_pickle", "b"], ["a/b", "c.npy", "self"], ["é ü", ".", "x" * 200]]
)
def test_cli_npz_names(run, tmp_path, names):
    from actzip.codec import save_maps

    given = {n: np.full(3, i, np.uint8) for i, n in enumerate(names)}
    save_maps(tmp_path / "m.azm", given)
    for kind in (".npz", ".safetensors", ".pt"):
        assert run("decode", tmp_path / "m.azm", tmp_path / f"m{kind}")[0] == 0
        assert run("encode", tmp_path / f"m{kind}", tmp_path / "again.azm")[0] == 0
        from actzip.codec import load_maps

        again = load_maps(tmp_path / "again.azm", framework="numpy")
        assert sorted(again) == sorted(names) and all((again[n] == given[n]).all() for n in names)
    with np.load(tmp_path / "m.npz") as file:
        assert sorted(file.files) == sorted(names) and all((file[n] == given[n]).all() for n in names)


@pytest.mark.parametrize("name", ["../x", "a/../../b", "/etc/x", "C:x", "..\\x", "n\0ul", "b.npy"])
def test_names_that_an_archive_would_not_give_back_are_refused(run, tmp_path, name):
    from actzip.codec import save_maps

    save_maps(tmp_path / "m.azm", {name: np.zeros(3, np.uint8), "b": np.zeros(3, np.uint8)})
    code, _, err = run("decode", tmp_path / "m.azm", tmp_path / "m.npz")
    assert code == 2 and "safetensors" in err and not (tmp_path / "m.npz").exists()
    assert run("decode", tmp_path / "m.azm", tmp_path / "m.pt")[0] == 0
    save_maps(tmp_path / "n.azm", {"__metadata__": np.zeros(3, np.uint8), "b": np.zeros(3, np.uint8)})
    assert run("decode", tmp_path / "n.azm", tmp_path / "n.safetensors")[0] == 2


def test_two_arrays_of_one_name_are_refused(run, tmp_path):
    import io
    import warnings
    import zipfile

    body = io.BytesIO()
    np.save(body, np.zeros(3, np.uint8))
    for i, names in enumerate([["a.npy", "a.npy"], ["a.npy", "a.npy.npy"]]):
        with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / f"{i}.npz", "w") as file:
            warnings.simplefilter("ignore")
            for n in names:
                file.writestr(n, body.getvalue())
        code, _, err = run("encode", tmp_path / f"{i}.npz")
        assert code == 4 and "two arrays called 'a" in err


def test_bfloat16_is_not_written_where_numpy_cannot_say_so(run, tmp_path):
    import torch

    x = torch.randn(2, 3).bfloat16()
    torch.save({"a": x, "b": x}, tmp_path / "x.pt")
    assert run("encode", tmp_path / "x.pt", tmp_path / "x.azm")[0] == 0
    for kind, args in ((".npy", ["--name", "a"]), (".npz", [])):
        code, _, err = run("decode", tmp_path / "x.azm", tmp_path / f"y{kind}", *args)
        assert (
            code == 2 and "bfloat16" in err and "safetensors" in err and not (tmp_path / f"y{kind}").exists()
        )
    for kind in (".pt", ".safetensors"):
        assert run("decode", tmp_path / "x.azm", tmp_path / f"y{kind}")[0] == 0
        assert run("encode", tmp_path / f"y{kind}", tmp_path / "z.azm")[0] == 0
        from actzip.codec import load_maps

        assert torch.equal(load_maps(tmp_path / "z.azm", framework="torch")["a"], x)


def test_cli_messages(run, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(3)}}, "nested.pt")
    np.savez("mix.npz", a=np.ones((2, 3), np.float32), b=np.zeros((0, 3), np.float32))
    np.savez("mix64.npz", a=np.ones((2, 3), np.float32), b=np.ones((2, 3)))
    code, _, err = run("encode", "nested.pt")
    assert code == 2 and "'model'" in err and "None" not in err
    code, _, err = run("encode", "mix.npz", "mix.azm")
    assert code == 0 and "warning" in err and "array 'b'" in err
    code, _, err = run("encode", "mix64.npz")
    assert code == 2 and "array 'b'" in err and "float64" in err and not list(tmp_path.glob("*64.azm"))
    np.save("p.npy", np.zeros((2, 3, 4, 4), np.uint8))
    for args in (["p.npy", "p.npy"], ["p.npy", "./p.npy"]):
        code, _, err = run("encode", *args)
        assert code == 2 and "is the file that is read" in err and np.load("p.npy").shape == (2, 3, 4, 4)
    long = "x" * 150
    Path(f"{long}.npy").write_bytes(Path("p.npy").read_bytes())
    assert run("encode", f"{long}.npy")[1].startswith(f"{long}.acz: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_room_is_a_message(tmp_path):
    import subprocess
    import sys

    np.save(tmp_path / "b.npy", np.ones((8, 64, 64), np.uint8))
    actzip = [sys.executable, "-m", "actzip.cli"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*actzip, "encode", "b.npy", "--codec", "raw"], cwd=tmp_path, stdout=full, stderr=-1, text=True
        )
    assert done.returncode == 4 and "standard output" in done.stderr and "not foreseen" not in done.stderr
    for kind in (".pt", ".npz", ".npy", ".safetensors"):
        shell = f"ulimit -f 10; exec {sys.executable} -m actzip.cli decode b.acz lim{kind}"
        done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 4 and "cannot write" in done.stderr, done.stderr
    assert not list(tmp_path.glob("lim*")) and not list(tmp_path.glob(".*"))


def test_results_to_standard_output_alone(tmp_path):
    import subprocess
    import sys

    from actzip.codec import decode

    np.save(tmp_path / "b.npy", np.ones((2, 3), np.uint8))
    shell = f"{sys.executable} -m actzip.cli encode b.npy /dev/stdout | cat"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True)
    assert (decode(done.stdout) == 1).all() and b"bits/element" in done.stderr
