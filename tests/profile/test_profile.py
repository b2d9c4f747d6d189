import html as html_module
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip.errors import ActzipWarning, DataError, InputError, LayerError
from actzip.profile import Collection, collect, compare, load_report, profile, split_inputs
from actzip.runtime.passes import optimize
from actzip.runtime.to_torch import to_torch
from actzip.runtime.tracing import capture


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2, groups=2)
        self.unused = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = F.silu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


LOADER = [
    (torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)), torch.zeros(4)) for i in range(3)
]
QUIET = pytest.mark.filterwarnings("ignore::actzip.errors.ActzipWarning")


@pytest.fixture
def report(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return profile(net, LOADER, codecs=["seg"], engine=False)


def test_numbers_are_those_of_the_maps(net, report):
    x = torch.cat([b for b, _ in LOADER])
    with torch.no_grad():
        y = F.relu(net.conv(x))
    row = report.maps[0]
    assert row["density"] == pytest.approx(float((y != 0).float().mean()), abs=1e-12)
    assert row["shape"] == [8, 16, 16] and row["images"] == 12
    layers = {r["name"]: r for r in report.layers}
    assert layers["conv"]["macs"] == 8 * 16 * 16 * 27
    assert layers["conv2"]["macs"] == 6 * 7 * 7 * 4 * 9
    assert layers["fc"]["macs"] == 24
    assert report.totals["macs"] == sum(r["macs"] for r in report.layers)
    assert report.totals["theoretical_speedup"] == pytest.approx(
        report.totals["macs"] / sum(r["effective_macs"] for r in report.layers)
    )


def test_coded_sizes_are_those_of_the_codec(net, report):
    x = torch.cat([b for b, _ in LOADER])
    with torch.no_grad():
        y = F.relu(net.conv(x))
    sizes = [len(actzip.encode(m.numpy(), codec="seg", bits=8)) for m in y]
    row = report.maps[0]["coded"]["seg-8"]
    assert row["bits_per_element"] == pytest.approx(8 * sum(sizes) / y.numel())
    assert row["buffer_bytes_worst"] == max(sizes)


def test_what_is_not_sparse_or_never_runs_is_said(net):
    r = profile(net, LOADER, codecs=(), engine=False)
    text = " ".join(r.data["warnings"])
    assert "unused" in text and "not ReLU" in text
    with pytest.warns(ActzipWarning, match="unused"):
        collect(net, LOADER)


@QUIET
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_that_are_not_counted_are_said(kind, tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader, self.head = kind(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.relu(self.reader(x)[0]))

    r = profile(Reader(), [torch.rand(4, 2, 6)], codecs=(), engine=False)
    assert any("recurrent" in w and "reader" in w for w in r.data["warnings"])
    if kind is not nn.RNN:
        graph = to_torch(optimize(capture(Reader().eval(), torch.rand(4, 2, 6))))
        r = profile(graph, [torch.rand(4, 2, 6)], codecs=(), engine=False)
        assert any("recurrent" in w for w in r.data["warnings"])


@QUIET
def test_model_is_left_as_it_was(net):
    net.train()
    net.fc.eval()
    keys = list(net.state_dict())
    profile(net, LOADER, codecs=(), engine=False)
    assert net.training and not net.fc.training and list(net.state_dict()) == keys
    assert not net._forward_hooks and not net.conv._forward_pre_hooks


@QUIET
def test_parts_merge_exactly(net):
    whole = collect(net, LOADER)
    parts = collect(net, LOADER[:1])
    for batch in LOADER[1:]:
        parts.merge(collect(net, [batch]))
    for name, stats in whole.maps.items():
        assert (parts.maps[name].hist == stats.hist).all() and parts.maps[name].nonzeros == stats.nonzeros
    for name, compute in whole.computations.items():
        assert parts.computations[name].effective_macs == compute.effective_macs
    assert parts.images == whole.images and parts.never_run == whole.never_run
    empty = Collection()
    empty.merge(whole)
    assert empty.images == whole.images


@QUIET
def test_max_images_cuts_within_a_batch(net):
    assert collect(net, LOADER, max_images=6).images == 6


@QUIET
def test_json_round_trip_table_and_comparison(net, report, tmp_path):
    path = tmp_path / "a.json"
    report.to_json(path)
    again = load_report(path)
    assert again.totals["macs"] == report.totals["macs"]
    json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    text = str(report)
    assert "conv2" in text and "seg-16" in text
    with torch.no_grad():
        net.conv.bias -= 0.3
    after = profile(net, LOADER, codecs=["seg"], engine=False)
    c = compare(report, after)
    assert next(r for r in c.rows if r["what"] == "density")["after"] < report.maps[0]["density"]
    assert not c.only_before and not c.only_after
    with pytest.raises(InputError, match="no layer in common"):
        compare(report, profile(nn.Sequential(nn.ReLU()), LOADER, codecs=(), engine=False))


@QUIET
def test_json_has_the_published_schema(net, report):
    jsonschema = pytest.importorskip("jsonschema")
    schema = actzip.profile.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(report.to_json()))
    validator.validate(json.loads(profile(net, LOADER, codecs=(), engine=False, whatif_images=0).to_json()))
    broken = json.loads(report.to_json())
    broken["maps"][0]["density"] = 1.5
    del broken["layers"][0]["macs"]
    assert len(list(validator.iter_errors(broken))) == 2


def test_dram_traffic_saved_and_places_of_non_zeros(net, report):
    row = report.maps[0]
    coded = row["coded"]["seg-8"]
    assert coded["dram_bytes_saved_per_image"] == pytest.approx(
        row["float32_bytes"] - coded["coded_bytes_per_image"]
    )
    with torch.no_grad():
        y = torch.cat([F.relu(net.conv(b)) for b, _ in LOADER])
    assert np.allclose(row["nonzero_places"], (y != 0).float().mean((0, 1)).numpy(), atol=1e-6)


def _process(rank, world, port, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = profile(
            Net(), LOADER[rank::world], codecs=["seg"], engine=False, whatif_images=0, distributed=True
        )
    r.to_json(f"{folder}/{rank}.json")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_merge_exactly(net, tmp_path):
    """Three batches in four processes, one of which has none: every report is that of one process."""
    import socket

    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = profile(net, LOADER, codecs=["seg"], engine=False, whatif_images=0).to_dict()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_profile as t;"
        f" t._process(int(sys.argv[1]), 4, {port}, {str(tmp_path)!r})"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(4)]
    assert [p.wait(timeout=120) for p in started] == [0] * 4
    for rank in range(4):
        got = json.loads((tmp_path / f"{rank}.json").read_text())
        for key in ("maps", "layers", "totals"):
            assert got[key] == json.loads(json.dumps(want[key])), key
        assert got["data"]["images"] == 12


@QUIET
def test_csv_and_parquet_hold_everything(report, tmp_path):
    names = {p.name for p in report.to_csv(tmp_path)}
    assert names == {f"{n}.csv" for n in ("maps", "layers", "runs", "values", "channels", "thresholds")}
    assert "seg-8_bits_per_element" in (tmp_path / "maps.csv").read_text().splitlines()[0]
    pq = pytest.importorskip("pyarrow.parquet")
    report.to_parquet(tmp_path)
    table = pq.read_table(tmp_path / "values.parquet").to_pylist()
    assert sum(r["count"] for r in table if r["name"] == report.maps[0]["name"]) == 12 * 8 * 16 * 16


@QUIET
def test_what_if_without_threshold_changes_nothing(report):
    points = report.data["whatif"]["points"]
    assert points[0]["output_change"] == 0 and points[0]["top1_agreement"] == 1
    densities = [p["density"] for p in points]
    assert densities == sorted(densities, reverse=True) and densities[-1] < densities[0]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, left, right, scale=1.0):
        return {"out": F.relu(self.a(left) + self.a(right)) * scale}


@QUIET
def test_dicts_several_inputs_and_dict_outputs_work():
    r = profile(Two(), [(torch.randn(2, 4), torch.randn(2, 4), torch.zeros(2))], codecs=(), engine=False)
    assert len(r.layers) == 2 and r.data["data"]["images"] == 2
    batch = {"left": np.ones((2, 4), np.float32), "right": torch.randn(2, 4), "y": 3}
    assert len(profile(Two(), [batch], codecs=(), engine=False).layers) == 2
    with pytest.raises(InputError, match="requires 2"):
        split_inputs(Two(), [torch.zeros(1)])


@QUIET
def test_bad_input_is_named(net, tmp_path):
    with pytest.raises(DataError, match="no batch"):
        profile(net, [], codecs=(), engine=False)
    with pytest.raises(InputError, match="Module"):
        profile(lambda x: x, LOADER)
    with pytest.raises(InputError, match="from 1 to 16"):
        profile(net, LOADER, bits=(32,), codecs=())
    with pytest.raises(LayerError, match="convv"):
        profile(net, LOADER, layers="convv", codecs=(), engine=False)
    with pytest.raises(InputError):
        profile(net, ["text"], codecs=(), engine=False)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load_report(tmp_path / "x.json")
    with pytest.raises(DataError, match="no file"):
        load_report(tmp_path / "y.json")
    (tmp_path / "z.json").write_text("[1]")
    with pytest.raises(DataError, match="schema"):
        load_report(tmp_path / "z.json")


@QUIET
def test_nothing_half_written_is_left(report, tmp_path):
    with pytest.raises(DataError):
        report.to_html(tmp_path / "no" / "r.html")
    assert not list(tmp_path.iterdir())


def _chromium():
    return next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


DRIVER = """
<script>
window.addEventListener("load", () => {
  const out = {errors: window.__errors, tabs: [], sorted: [], found: null, keyboard: null, theme: null};
  const q = (s) => [...document.querySelectorAll(s)];
  setTimeout(() => {
    for (const t of q("[role=tab]")) {
      t.click();
      const p = document.getElementById(t.getAttribute("aria-controls"));
      out.tabs.push([t.textContent, !p.hidden, p.textContent.length]);
    }
    q("[role=tab]")[0].click();
    const column = () => q("#panel-layers tbody tr").map((r) => r.dataset.name);
    setTimeout(() => {
      const before = column();
      q("#panel-layers th button")[5].click();
      out.sorted = [before, column()];
      q("[role=tab]")[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
      out.keyboard = document.activeElement.textContent;
      q("#panel-maps tbody tr")[0].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
      out.detail = document.getElementById("detail").textContent.length;
      out.canvas = q("#detail canvas").length;
      const s = document.getElementById("search");
      s.value = "conv2";
      s.dispatchEvent(new Event("input"));
      q("[role=tab]")[0].click();
      out.found = q("#panel-layers tbody tr:not([hidden])").map((r) => r.dataset.name);
      document.getElementById("theme").click();
      out.theme = document.documentElement.dataset.theme;
      out.requests = performance.getEntriesByType("resource").map((r) => r.name)
        .filter((n) => !n.startsWith("data:"));
      const pre = document.createElement("pre");
      pre.id = "result";
      pre.textContent = JSON.stringify(out);
      document.body.replaceChildren(pre);
    }, 50);
  }, 50);
});
</script>
"""
CATCH = """<script>
window.__errors = [];
addEventListener("error", (e) => __errors.push(e.message));
const original = console.error;
console.error = (...a) => { __errors.push(a.join(" ")); original(...a); };
</script>"""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
    "--dump-dom",
]


@pytest.mark.skipif(_chromium() is None, reason="no Chromium on this machine")
def test_page_in_a_real_browser(report, tmp_path):
    page = report.to_html(tmp_path / "r.html")
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("<head>", "<head>" + CATCH, 1).replace("</body>", DRIVER + "</body>", 1))
    with tempfile.TemporaryDirectory() as home:
        command = [_chromium(), *FLAGS, f"--user-data-dir={home}", driven.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    start = run.stdout.index('<pre id="result">') + len('<pre id="result">')
    out = json.loads(html_module.unescape(run.stdout[start : run.stdout.index("</pre>", start)]))
    assert out["errors"] == [] and out["requests"] == []
    assert len(out["tabs"]) == 6 and all(shown and length >= 20 for _, shown, length in out["tabs"])
    before, after = out["sorted"]
    macs = {r["name"]: r["macs"] for r in report.layers}
    assert after == sorted(before, key=lambda n: -macs[n])
    assert out["keyboard"] == "Activation maps" and out["detail"] > 20 and out["canvas"] == 2
    assert out["found"] == ["conv2"] and out["theme"] in ("light", "dark")


@QUIET
def test_the_report_shows_itself_in_a_notebook(report):
    assert report._repr_html_().startswith("<iframe srcdoc=")


@QUIET
def test_memory_does_not_grow_with_the_number_of_images(net):
    def size(n):
        return len(pickle.dumps(collect(net, [torch.randn(2, 3, 16, 16)] * n)))

    assert size(20) <= size(1) + 512


@QUIET
def test_progress_bars_move(net):
    seen = []
    report = profile(net, LOADER, codecs=(), engine=False, progress=True, on_batch=seen.append)
    assert seen == [4, 4, 4] and report.data["data"]["images"] == 12


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnext50_32x4d"])
def test_total_macs_agree_with_torchinfo(name):
    torchinfo = pytest.importorskip("torchinfo")
    from actzip.models._torchvision import import_torchvision

    model = import_torchvision().models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 96, 96)
    layers = torchinfo.summary(model, input_data=x, verbose=0).summary_list
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = collect(model, [x], runs=False)
    want = sum(r.macs for r in layers if r.class_name in ("Conv2d", "Linear"))
    bias = sum(  # torchinfo counts a bias as a multiply-accumulate
        int(np.prod(r.output_size[2:])) * r.module.bias.numel()
        for r in layers
        if r.class_name in ("Conv2d", "Linear") and r.module.bias is not None
    )
    assert sum(s.macs for s in c.computations.values()) == want - bias


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "inception_v3"])
def test_total_macs_agree_with_fvcore(name):
    fvcore = pytest.importorskip("fvcore.nn")
    from actzip.models._torchvision import import_torchvision

    options = {"init_weights": False} if "inception" in name else {}
    model = import_torchvision().models.get_model(name, weights=None, **options)
    model.eval()
    x = torch.randn(1, 3, 96, 96)
    counts = fvcore.FlopCountAnalysis(model, x)
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    by_operator = counts.by_operator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = collect(model, [x], runs=False)
    assert sum(s.macs for s in c.computations.values()) == by_operator["conv"] + by_operator["linear"]


@pytest.mark.shared
@pytest.mark.slow
def test_densities_of_the_given_inception_within_sampling_error(shared_file):
    """43.9 % of the ReLU outputs and 38.9 % of the inputs of convolutions, weighted by MACs, over
    40 photographs (the data's README); here over 16 others or the same, so the difference has the
    error of both means."""
    pytest.importorskip("pyarrow")
    from actzip.data import Loader, resolve
    from actzip.models import load_weights
    from actzip.models import resolve as model_of

    weights = shared_file("weights/inception_v3_5class.safetensors")
    photographs = shared_file("data/imagenet_sample/test.parquet")
    model = model_of("inception_v3_5class")
    load_weights(model, weights)
    data = resolve(str(photographs), "test", image_size=299, mean=(0.0,) * 3, std=(1.0,) * 3, sample=16)
    outputs, inputs = [], []
    for batch in Loader(data, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c = collect(model, [batch], runs=False)
        relus = [s for s in c.maps.values() if s.site.sparse]
        convs = [s for s in c.computations.values() if s.site.kind == "conv2d"]
        outputs.append(sum(s.nonzeros for s in relus) / sum(s.elements for s in relus))
        inputs.append(sum(s.input_density * s.macs for s in convs) / sum(s.macs for s in convs))
    for values, given in ((outputs, 0.439), (inputs, 0.389)):
        error = np.std(values, ddof=1) * np.sqrt(1 / len(values) + 1 / 40)
        assert abs(np.mean(values) - given) < 3 * error, (np.mean(values), error)


class Patches(nn.Module):
    """4x4 patches as a batch, like window attention or a head on regions; tokens first in the last layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.a(x)).unfold(2, 4, 4).unfold(3, 4, 4)
        y = torch.relu(self.b(y.permute(0, 2, 3, 1, 4, 5).reshape(-1, 8, 4, 4)))
        tokens = y.flatten(2).mean(2).reshape(len(x), -1, 8).transpose(0, 1)
        return torch.relu(self.fc(tokens)).mean(0)


@QUIET
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_profile_macs_folded_batch(batch):
    from torch.utils.flop_counter import FlopCounterMode

    from actzip.sparsify.costs import map_costs, measure

    net, x = Patches().eval(), torch.randn(batch, 3, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        net(x)
    want = counted.get_total_flops() / 2 / batch
    report = profile(net, [x, x], codecs=["zvc"], engine=False, whatif_images=2)
    assert report.totals["macs"] == want == measure(net, [x]).macs
    assert report.totals["elements"] == 8 * 16 * 16 * 2 + 16 * 5 == sum(m["elements"] for m in report.maps)
    costs = map_costs(net, x)
    assert sum(c.elements for c in costs.values()) == report.totals["elements"]
    assert sum(c.macs for c in costs.values()) <= want
    assert report.data["data"]["images"] == 2 * batch


@QUIET
def test_images_in_a_list_are_counted_each(net):
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            return [self.net(i[None]) for i in images]

    first = LOADER[0][0] if isinstance(LOADER[0], tuple) else LOADER[0]
    x = torch.randn(4, *first.shape[1:])
    want = profile(net, [x], codecs=(), engine=False, whatif_images=0)
    got = profile(Boxes(), [(list(x),)], codecs=(), engine=False, whatif_images=0)
    assert got.data["data"]["images"] == 4 and got.totals["macs"] == pytest.approx(want.totals["macs"])


def test_random_weights_silent():
    from actzip.models import RANDOM_WEIGHTS, resolve
    from actzip.runtime.models import load

    x = torch.rand(2, 1, 28, 28)
    for model in ("lenet5", resolve("lenet5"), load("lenet5")):
        with pytest.warns(match="weights are random"):
            report = profile(model, [x], codecs=(), engine=False, whatif_images=0)
        assert report.data["warnings"][0] == RANDOM_WEIGHTS and report.data["model"]["random_weights"]
        assert (
            "weights are random" in " ".join(str(report).split()) and "weights are random" in report.to_html()
        )
    trained = resolve("lenet5")
    trained.load_state_dict(resolve("lenet5").state_dict())
    report = profile(trained, [x], codecs=(), engine=False, whatif_images=0)
    assert not report.data["model"]["random_weights"] and "weights are random" not in str(report)
