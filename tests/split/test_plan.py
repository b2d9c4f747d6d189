"""Plans: every cut in the table, the best proven, links and folders that cannot be are said."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import actzip
from actzip.cli import build
from actzip.errors import DataError, InputError, LayerError
from actzip.split import Head, Tail, plan
from actzip.split.link import Link, bits_per_second, seconds


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


def inputs(count=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((8, 3, 24, 24), generator=generator) for _ in range(count // 8)]


OPTIONS = {
    "bandwidth": "20Mbit",
    "latency": "1ms",
    "threads": 1,
    "tune": False,
    "finalists": 2,
    "attempts": 3,
}


@pytest.fixture(scope="module")
def found():
    return plan(net(), inputs(), client_slowdown=4, mean=(0.0,) * 3, std=(1.0,) * 3, keep=0.9, **OPTIONS)


def test_every_cut_has_bits_and_times(found):
    assert [r.cut.index for r in found.rows] == list(range(len(found.rows))) and len(found.rows) >= 3
    for row in found.rows:
        assert {(c.codec, c.bits) for c in row.codings} == {
            (c, b) for c in ("rans", "seg", "zvc") for b in (8, 4, 2)
        }
        assert row.total_ms == pytest.approx(
            row.head_ms + row.encode_ms + row.link_ms + row.decode_ms + row.tail_ms
        )
        answer = 32 * 5
        assert row.link_ms == pytest.approx(2 + (row.bits + answer) / 20e6 * 1e3)
        raw = 32 * row.cut.elements
        assert all(0 < c.size < raw for c in row.codings)
    heads = [r.head_ms for r in found.rows]
    assert heads == sorted(heads)
    whole = found.rows[0].head_ms / 4 + found.rows[0].tail_ms
    assert all(r.head_ms / 4 + r.tail_ms == pytest.approx(whole) for r in found.rows)
    jpeg, nothing = found.others
    assert nothing.total_ms == pytest.approx(4 * whole) and jpeg.codec.startswith("JPEG")
    assert jpeg.tail_ms == pytest.approx(whole) and jpeg.bits > 0


def test_the_best_is_searched_kept_and_the_quickest_of_those(found):
    searched = [r for r in found.rows if r.searched]
    assert len(searched) == 2 and set(found.choices) == {r.name for r in searched}
    kept = [r for r in searched if r.kept]
    if kept:
        assert found.best.total_ms == min(r.total_ms for r in kept)
    every = [*kept, *(r for r in found.others if r.kept)]
    assert found.winner.total_ms == min(r.total_ms for r in every)
    assert found.verdict() in found.lines()[0]
    assert found.winner.name in found.verdict() or found.winner is found.best


def test_a_network_whose_maps_are_not_finite_is_refused_by_the_map():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.b(self.a(x).relu() * float("nan")).mean((2, 3))

    with pytest.raises(InputError, match=r"map .* of the network holds values that are not finite"):
        plan(Broken().eval(), inputs(), **OPTIONS)


def test_where_sending_nothing_wins_it_says_so():
    slow = plan(net(), inputs(), **{**OPTIONS, "bandwidth": "1kbit", "latency": "500ms", "finalists": 1})
    assert slow.winner.name == "send nothing" and slow.verdict().startswith("send nothing wins")
    assert any("left out" in note for note in slow.notes)  # a module's normalisation is not known


def test_the_report_and_json_hold_every_row(found, tmp_path):
    text = found.to_html(tmp_path / "r.html").read_text()
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    for row in [*said["rows"], *said["others"]]:
        assert f">{row['name']}<" in text or row["name"] in text
    assert text.count("<svg") == 1 and text.count("<rect") == 5 * (len(said["rows"]) + 2)
    assert "http" not in text.replace("http://www.w3.org", "")


def test_the_sides_give_what_the_network_gives(found, tmp_path):
    folder = found.save(tmp_path / "parts")
    assert {p.name for p in folder.iterdir()} == {
        "head.actzip", "tail.actzip", "head.onnx", "tail.onnx", "split.json",
    }  # fmt: skip
    head, tail = (actzip.split.load(folder / f"{side}.actzip", threads=1) for side in ("head", "tail"))
    assert isinstance(head, Head) and isinstance(tail, Tail)
    x = torch.cat(inputs())
    with torch.no_grad():
        want = net()(x)
    got = torch.from_numpy(tail(head.encode(x)))
    assert (got.argmax(1) == want.argmax(1)).float().mean() >= 0.8
    ort = pytest.importorskip("onnxruntime")
    sides = [
        ort.InferenceSession(str(folder / f"{n}.onnx"), providers=["CPUExecutionProvider"])
        for n in ("head", "tail")
    ]
    maps = sides[0].run(None, {"input": x.numpy()})
    (out,) = sides[1].run(None, {i.name: m for i, m in zip(sides[1].get_inputs(), maps, strict=True)})
    assert np.allclose(out, want.numpy(), atol=1e-5)


def test_a_folder_that_exists_is_refused_and_left_as_it_is(found, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists"):
        found.save(tmp_path / "parts")
    assert [p.name for p in tmp_path.rglob("*")] == ["parts", "mine.txt"]
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "nowhere" / "parts"):
        with pytest.raises(DataError):
            found.save(bad)


@pytest.mark.parametrize(
    "text, bits",
    [
        ("20Mbit", 20e6),
        ("1.5 Gbit/s", 1.5e9),
        ("2.5MB/s", 20e6),
        ("100kbps", 1e5),
        ("8", 8.0),
        (1e6, 1e6),
        ("1 MByte", 8e6),
    ],
)
def test_bandwidths(text, bits):
    assert bits_per_second(text) == bits


@pytest.mark.parametrize(
    "text", ["0", "0Mbit", 0, -1, "fast", "", None, float("nan"), float("inf"), "1.2.3Mbit", True]
)
def test_impossible_bandwidths_are_refused(text):
    with pytest.raises(InputError, match="bandwidth"):
        Link.of(text, "1ms")


@pytest.mark.parametrize("text, s", [("10ms", 0.01), ("0.5 s", 0.5), ("20us", 2e-5), (0, 0.0), ("0ms", 0.0)])
def test_latencies(text, s):
    assert seconds(text) == pytest.approx(s)


@pytest.mark.parametrize("text", ["10", "-1ms", "soon", -1, None, float("nan")])
def test_impossible_latencies_are_refused(text):
    with pytest.raises(InputError, match="latency"):
        Link.of("1Mbit", text)


@pytest.mark.parametrize("bandwidth", ["1e300Tbit", "0.5bit", 1e-320, 1e300, "0." + "0" * 400 + "1Mbit"])
def test_a_link_beyond_all_numbers_is_refused(bandwidth):
    """Totals would be infinite, and JSON has no such number."""
    with pytest.raises(InputError, match="bandwidth"):
        Link.of(bandwidth, "1ms")
    for latency in ("9" * 400 + "s", "1e9s", 1e300):
        with pytest.raises(InputError, match="latency"):
            Link.of("1Mbit", latency)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"bandwidth": "0Mbit"}, InputError, "bandwidth must be above 0"),
        ({"client_slowdown": 0}, InputError, "client_slowdown"),
        ({"bits": (9,)}, InputError, "bits"),
        ({"bits": ()}, InputError, "at least one"),
        ({"codecs": ("rance",)}, InputError, "did you mean 'rans'"),
        ({"keep": 0.9, "max_error": 0.1}, InputError, "not both"),
        ({"finalists": 0}, InputError, "finalists"),
        ({"at": "nowhere"}, LayerError, "no layer"),
        ({"at": 99}, InputError, "from 0 to"),
    ],
)
def test_impossible_plans_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        plan(net(), inputs(), **{**OPTIONS, **options})


def test_the_verb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("photos.npy", rng.random((24, 3, 32, 32), np.float32))
    line = ["split", "cifar_resnet20", "--data", "photos.npy", "--bandwidth", "20Mbit", "--latency", "1ms"]
    line += ["--threads", "1", "--at", "layer2", "--keep", "0.5", "--images", "24"]
    result = CliRunner().invoke(build(), [*line, "--out", "parts", "--html", "r.html"])
    assert result.exit_code == 0, result.output
    assert "layer2.2" in result.output and "send nothing" in result.output
    assert (tmp_path / "parts" / "tail.actzip").exists() and (tmp_path / "r.html").exists()
    again = CliRunner().invoke(build(), [*line, "--out", "parts"])
    assert isinstance(again.exception, DataError) and "exists" in str(again.exception)
    bad = CliRunner().invoke(build(), [*line[:5], "0Mbit", *line[6:]])
    assert isinstance(bad.exception, InputError) and "bandwidth" in str(bad.exception)
