import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actzip import cpu
from actzip.cli.common import progress
from actzip.cli.reproduce import _Display
from actzip.data import Loader, resolve
from actzip.errors import ActzipWarning, CodecError, DataError, InputError, RecipeError
from actzip.experiment import parse_recipe, reproduce
from actzip.experiment.coding import code_maps
from actzip.models import resolve as resolve_model
from actzip.quantize import quantize

# digits come with scikit-learn, so these tests need no data folder
RECIPE = """\
name: digits
seed: 3
model: {name: lenet5}
data: {name: digits, validation: 200, limit: 500, test_limit: 200, batch_size: 50, eval_batch_size: 100,
  mean: [0.0], std: [1.0]}
train: {epochs: 2, lr: 0.02}
sparsify: {epochs: 2, lr: 0.02, penalty: l1, weighting: macs, alpha: 0.3}
quantize: {bits: [16, 8], calibration: 100}
encode: {codecs: [seg, zvc], images: 40}
targets: {density_reduction: 1.0, speedup_over_control: 1.0, gain_8: 2.0}
"""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    results = reproduce(parse_recipe(RECIPE), out)
    torch.set_num_threads(before)
    return out, results


def figures(results):
    return json.loads(json.dumps({k: v for k, v in results.items() if k != "run"}))


def test_results_hold_every_stage_and_are_on_disk(whole):
    out, results = whole
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = [(s["stage"], s["bits"]) for s in results["stages"]]
    assert rows == [
        ("baseline", 32),
        ("control", 32),
        ("sparse", 32),
        ("control", 16),
        ("control", 8),
        ("sparse", 16),
        ("sparse", 8),
    ]
    assert results["environment"]["isas"] and results["environment"]["versions"]["torch"]
    assert "stand-in" in results["data"]["test"]["source"]
    assert {t["target"] for t in results["targets"]} == {
        "density_reduction",
        "speedup_over_control",
        "gain_8",
    }
    control, sparse = results["stages"][1], results["stages"][2]
    assert sparse["density"] < control["density"]
    assert sparse["speedup_over_control"] == pytest.approx(
        control["effective_macs"] / sparse["effective_macs"]
    )


def test_repaired_thresholds_are_read_again(whole, tmp_path):
    """Also where the repair gave a bias to a layer that had none."""
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(whole[0], tmp_path / "out")
    recipe = parse_recipe(RECIPE + "thresholds: {density: 0.1, samples: 60, per: channel, repair: true}\n")
    assert recipe.thresholds.identity()["repair"]
    assert "repair" not in recipe.thresholds.model_copy(update={"repair": False}).identity()
    results = reproduce(recipe, tmp_path / "out")
    sparse, repaired = (load_file(tmp_path / "out" / f"{n}.safetensors") for n in ("sparse", "thresholded"))
    assert any(k not in sparse or not torch.equal(v, sparse[k]) for k, v in repaired.items())
    again = reproduce(recipe, tmp_path / "out")
    assert "thresholded" in again["run"]["resumed"] and again["stages"] == results["stages"]


def test_thresholds_are_a_stage_after_the_penalty(whole, tmp_path):
    import shutil

    shutil.copytree(whole[0], tmp_path / "out")
    wanted = RECIPE.replace("gain_8: 2.0}", "gain_8: 2.0, accuracy_8_over_control: -50}")
    recipe = parse_recipe(wanted + "thresholds: {density: 0.1, samples: 60}\n")
    results = reproduce(recipe, tmp_path / "out")
    assert {"baseline", "control", "sparse"} <= set(results["run"]["resumed"])  # what was there stays
    rows = {(s["stage"], s["bits"]): s for s in results["stages"]}
    assert list(rows) == [
        ("baseline", 32),
        ("control", 32),
        ("sparse", 32),
        ("thresholded", 32),
        ("control", 16),
        ("control", 8),
        ("thresholded", 16),
        ("thresholded", 8),
    ]
    sparse, thresholded = rows["sparse", 32], rows["thresholded", 32]
    assert sparse == {s["stage"]: s for s in whole[1]["stages"] if s["bits"] == 32}["sparse"]
    assert thresholded["density"] < sparse["density"] and results["thresholds"]["met"]
    assert results["thresholds"]["density"] <= 0.1 < results["thresholds"]["density_before"]
    assert rows["thresholded", 8]["density"] < rows["control", 8]["density"]
    target = next(t for t in results["targets"] if t["target"] == "speedup_over_control")
    assert target["measured"] == pytest.approx(thresholded["speedup_over_control"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"accuracy 8 over control</span><b>[+-]\d+\.\d\d points", page)
    kept = json.loads((tmp_path / "out" / "thresholded.thresholds.json").read_text())
    assert set(kept) == {"relu1", "relu2", "relu3"} and max(kept.values()) > 0
    again = reproduce(recipe, tmp_path / "out")
    assert figures(again) == figures(results)
    for wrong in ("{density: 0.2, speedup: 2}", "{}", "{density: 2}"):
        with pytest.raises(RecipeError, match="thresholds"):
            parse_recipe(RECIPE + f"thresholds: {wrong}\n")
    with pytest.raises(RecipeError, match="thresholds"):
        parse_recipe(
            RECIPE.replace("alpha: 0.3", "alpha: 0.3, thresholds: learned") + "thresholds: {density: 0.2}\n"
        )


def test_every_map_was_coded_and_the_network_ran_on_the_decoded_ones(whole):
    _, results = whole
    assert len(results["coding"]) == 4
    for coding in results["coding"]:
        assert coding["images"] == 40
        assert coding["blobs"] == 40 * 3 * 2  # images, maps, codecs
        assert coding["elements"] == 40 * (20 * 24 * 24 + 50 * 8 * 8 + 500)
        assert coding["same_predictions"] and coding["accuracy"] == coding["quantized_accuracy"]
        for codec, rate in coding["bits_per_element"].items():
            assert coding["gain_float32"][codec] == pytest.approx(32 / rate)


def test_report_stands_alone(whole):
    out, _ = whole
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page)
    assert "http" not in page and "@import" not in page
    assert "prefers-color-scheme" in page
    assert page.count("<figure>") >= 3 + 1  # a plot a layer, and the frontier
    for layer in ("relu1", "relu2", "relu3"):
        assert f"<h3>{layer} " in page


def test_same_seed_same_figures_and_a_second_run_does_nothing_again(whole, tmp_path):
    _, results = whole
    again = reproduce(parse_recipe(RECIPE), tmp_path)
    assert figures(again) == figures(results)
    events = []
    once_more = reproduce(parse_recipe(RECIPE), tmp_path, progress=events.append)
    assert figures(once_more) == figures(results)
    assert {e["kind"] for e in events} == {"cached"}
    # a change of the penalty does the sparse stage anew and keeps the others
    milder = RECIPE.replace("alpha: 0.3", "alpha: 0.1, ramp: 0.5").replace(
        "weighting: macs", "weighting: mixed"
    )
    changed = reproduce(parse_recipe(milder), tmp_path)
    assert changed["stages"][0] == results["stages"][0]
    assert changed["stages"][2]["density"] != results["stages"][2]["density"]
    assert "sparse" not in changed["run"]["resumed"]
    assert {"baseline", "control"} <= set(changed["run"]["resumed"])


@pytest.mark.parametrize("stage", ["baseline", "sparse"])
def test_killed_run_goes_on_to_the_same_figures(whole, tmp_path, stage):
    """SIGKILL in the middle of a stage, after its first epoch; the second run must end as an
    unbroken one does."""
    recipe = tmp_path / "digits.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "actzip.cli", "reproduce", str(recipe), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACTZIP_NUM_THREADS": str(cpu.info()["threads"])}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = out / "stages" / stage / "last.pt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (out / "results.json").exists()
    done = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert figures(results) == figures(whole[1])
    assert stage in results["run"]["resumed"]
    for name in ("baseline", "control", "sparse"):
        weights, expected = (load_file(folder / f"{name}.safetensors") for folder in (out, whole[0]))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[k], expected[k]) for k in weights)


def test_stages_trained_alone_and_at_once_give_the_figures_of_the_whole(whole, tmp_path):
    _, results = whole
    recipe = parse_recipe(RECIPE)
    assert reproduce(recipe, tmp_path, only="baseline") == {}
    assert not (tmp_path / "sparse.safetensors").exists() and not (tmp_path / "results.json").exists()
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from actzip.experiment import parse_recipe, reproduce\n"
        "reproduce(parse_recipe(sys.argv[1]), sys.argv[2], only=sys.argv[3])"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, RECIPE, str(tmp_path), stage])
        for stage in ("control", "sparse")
    ]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    events = []
    again = reproduce(recipe, tmp_path, progress=events.append)
    assert figures(again) == figures(results)
    assert {"baseline", "control", "sparse"} <= {e["stage"] for e in events if e["kind"] == "cached"}
    with pytest.raises(RecipeError, match="'both' is none"):
        reproduce(recipe, tmp_path, only="both")
    alone = parse_recipe(RECIPE.replace("alpha: 0.3}", "alpha: 0.3, control: false}"))
    with pytest.raises(RecipeError, match="trains no 'control'"):
        reproduce(alone, tmp_path / "alone", only="control")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "stages").mkdir()
    with (tmp_path / "stages" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run"):
            reproduce(parse_recipe(RECIPE), tmp_path)


def test_digits_stand_in_for_a_set_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTZIP_DATA", str(tmp_path))
    monkeypatch.delenv("ACTZIP_SHARED", raising=False)
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("name: digits, validation: 200, limit: 500", "name: mnist, validation: 5000")
    with pytest.warns(ActzipWarning, match="digits"):
        results = reproduce(parse_recipe(text), tmp_path / "out", download=False)
    assert results["data"]["validation"]["images"] == 1297 // 5
    assert results["data"]["train"]["images"] == 10 * (1297 - 1297 // 5)
    assert all("stand-in" in part["source"] for part in results["data"].values())


@pytest.mark.parametrize("name", ["cifar10", "imagenet_sample"])
def test_a_set_that_is_nowhere_is_refused_with_what_to_set(tmp_path, monkeypatch, name):
    for variable in ("ACTZIP_DATA", "ACTZIP_SHARED"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no folder that is known; set ACTZIP_DATA .* {name}/"):
        resolve(name)
    with pytest.raises(DataError, match=f"none of {tmp_path}; set ACTZIP_DATA"):
        resolve(name, folder=tmp_path)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    mine, other = tmp_path / ".results.json.ab12.tmp", tmp_path / ".notes.tmp"
    (tmp_path / "stages" / "baseline").mkdir(parents=True)
    inner = tmp_path / "stages" / "baseline" / ".last.pt.cd34.tmp"
    for file in (mine, other, inner):
        file.write_bytes(b"half")
    with pytest.raises(RecipeError):
        reproduce(parse_recipe(RECIPE.replace("validation: 200", "validation: 5000")), tmp_path)
    assert not mine.exists() and not inner.exists() and other.exists()


def test_validation_larger_than_the_data_names_the_key(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.validation"):
        reproduce(parse_recipe(RECIPE.replace("validation: 200", "validation: 5000")), tmp_path)


def test_a_codec_that_lies_is_caught(monkeypatch):
    from actzip.experiment import coding

    data = resolve("digits", "test", mean=(0.0,), std=(1.0,), limit=4)
    model = quantize(resolve_model("lenet5").eval(), Loader(data, 4), bits=8)
    assert code_maps(model, Loader(data, 4), ["seg"]).images == 4
    with pytest.raises(InputError, match="nonsense"):
        code_maps(model, Loader(data, 4), ["nonsense"])
    true = coding.codecs.decode
    monkeypatch.setattr(coding.codecs, "decode", lambda blob, **kw: np.bitwise_xor(true(blob, **kw), 1))
    with pytest.raises(CodecError, match="relu1 of image 0"):
        code_maps(model, Loader(data, 4), ["seg"])


def test_low_bits_are_trained_beside_a_given_control(whole, tmp_path, capsys):
    out, before = whole
    text = (
        RECIPE.replace(
            "model: {name: lenet5}",
            f"model: {{name: lenet5, weights: {out / 'sparse.safetensors'}, "
            f"control: {out / 'control.safetensors'}}}",
        )
        .replace("train: {epochs: 2, lr: 0.02}\n", "")
        .replace(
            "bits: [16, 8], calibration: 100", "bits: [8, 4], calibration: 100, train: {epochs: 2, rate: 0.5}"
        )
        .replace(
            "density_reduction: 1.0, speedup_over_control: 1.0, gain_8: 2.0",
            "gain_4: 3.0, accuracy_4_over_control: -30",
        )
    )
    text = "\n".join(line for line in text.splitlines() if not line.startswith("sparsify"))
    with progress() as bar:
        results = reproduce(parse_recipe(text), tmp_path, progress=_Display(bar))
    said = capsys.readouterr().err
    assert said.count("estimated rate") == 2 and "baseline.4.train: epoch 2/2: loss" in said
    rows = {(s["stage"], s["bits"]): s for s in results["stages"]}
    assert set(rows) == {("baseline", 32), ("control", 32), ("baseline", 8), ("baseline", 4)}
    accuracies = {s["stage"]: s["accuracy"] for s in before["stages"] if s["bits"] == 32}
    assert rows["baseline", 32]["accuracy"] == accuracies["sparse"]
    assert rows["control", 32]["accuracy"] == accuracies["control"]
    assert rows["baseline", 4]["trained"] and not rows["baseline", 8]["trained"]
    epochs = results["quantized_training"]["baseline.4"]
    assert len(epochs) == 2 and epochs[1]["rate"] < epochs[0]["rate"]
    assert [t["target"] for t in results["targets"]] == ["gain_4", "accuracy_4_over_control"]
    assert all(t["measured"] is not None for t in results["targets"])
    trained, start = (
        load_file(tmp_path / "baseline.4.safetensors"),
        load_file(tmp_path / "baseline.safetensors"),
    )
    assert any(not torch.equal(v, start[k]) for k, v in trained.items())
    page = (tmp_path / "report.html").read_text()
    assert "Rate and distortion" in page and "4, trained" in page
    again = reproduce(parse_recipe(text), tmp_path)
    assert figures(again) == figures(results) and "baseline.4.train" in again["run"]["resumed"]


def test_weights_with_thresholds_learn_from_a_given_teacher(whole, tmp_path):
    out, _before = whole
    first = parse_recipe(
        RECIPE.replace(
            "model: {name: lenet5}",
            f"model: {{name: lenet5, weights: {out / 'sparse.safetensors'}, "
            f"teacher: {out / 'control.safetensors'}, control: {out / 'control.safetensors'}}}",
        )
        .replace("train: {epochs: 2, lr: 0.02}\n", "")
        .replace(
            "penalty: l1, weighting: macs, alpha: 0.3",
            "alpha: 0, distill: 1, thresholds: calibrated, threshold_density: 0.2, control: false",
        )
        .replace("[16, 8]", "[8]")
    )
    results = reproduce(first, tmp_path / "a")
    rows = {(s["stage"], s["bits"]): s for s in results["stages"]}
    assert set(rows) == {("baseline", 32), ("control", 32), ("sparse", 32), ("sparse", 8)}
    assert rows["sparse", 32]["density"] < 0.25 < rows["baseline", 32]["density"]
    other = parse_recipe(
        RECIPE.replace(
            "model: {name: lenet5}",
            f"model: {{name: lenet5, weights: {tmp_path / 'a/sparse.safetensors'}, "
            f"thresholds: {tmp_path / 'a/sparse.thresholds.json'}}}",
        )
        .replace("train: {epochs: 2, lr: 0.02}\n", "")
        .replace("sparsify: {epochs: 2, lr: 0.02, penalty: l1, weighting: macs, alpha: 0.3}\n", "")
        .replace("[16, 8]", "[8]")
        .replace(
            "targets: {density_reduction: 1.0, speedup_over_control: 1.0, gain_8: 2.0}",
            "targets: {gain_8: 2.0}",
        )
    )
    again = {(s["stage"], s["bits"]): s for s in reproduce(other, tmp_path / "b")["stages"]}
    assert again["baseline", 32]["effective_macs"] == rows["sparse", 32]["effective_macs"]
    assert again["baseline", 8]["gain_float32"] == rows["sparse", 8]["gain_float32"]
    thresholds = [
        (tmp_path / f).read_text() for f in ("a/sparse.thresholds.json", "b/baseline.thresholds.json")
    ]
    assert thresholds[0] == thresholds[1] != "{}"
    (tmp_path / "bad.json").write_text('{"relu1": "much"}')
    wrong = other.model_copy(
        update={"model": other.model.model_copy(update={"thresholds": str(tmp_path / "bad.json")})}
    )
    with pytest.raises(DataError, match=r"bad\.json: an object of thresholds"):
        reproduce(wrong, tmp_path / "c")


def test_a_teacher_needs_distillation():
    with pytest.raises(RecipeError, match=r"model\.teacher: nothing is distilled"):
        parse_recipe(RECIPE.replace("{name: lenet5}", "{name: lenet5, teacher: a.safetensors}"))


def test_widths_to_train_are_among_those_asked_for():
    with pytest.raises(RecipeError, match=r"quantize.*its bits must be among \[16, 8\], not 4"):
        parse_recipe(RECIPE.replace("bits: [16, 8],", "bits: [16, 8], train: {epochs: 1},"))
