import re
from pathlib import Path

import pytest

from actzip.errors import DataError, RecipeError
from actzip.experiment import load_recipe, parse_recipe, reproduce
from actzip.experiment.recipe import runs_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

GOOD = """\
name: small
seed: 3
model:
  name: lenet5
data:
  name: digits
  validation: 200
train:
  epochs: 1
  lr: 1e-2
sparsify:
  epochs: 1
  penalty: l1
  alpha: 1e-3
quantize:
  bits: [16, 8]
encode:
  images: 20
"""


EVERY = sorted(RECIPES.glob("*/*.yaml"))
assert {"mobilenet-v1-cifar10", "resnet18-imagenet", "lenet5-mnist"} <= {p.parent.name for p in EVERY}


@pytest.mark.parametrize("path", EVERY, ids=[f"{p.parent.name}/{p.stem}" for p in EVERY])
def test_every_recipe_of_the_project_is_valid(path):
    what = "" if path.stem == "sparsify" else f"-{path.stem}"
    assert load_recipe(path).name == path.parent.name + what


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lenet5-mnist", "lenet5-mnist/sparsify"),
        ("mobilenet-v1-cifar10-thresholds-1.6x-8bit", "mobilenet-v1-cifar10/thresholds-1.6x-8bit"),
    ],
)
def test_the_old_place_of_a_recipe_names_the_new_one(old, new):
    with pytest.raises(RecipeError) as error:
        load_recipe(RECIPES / f"{old}.yaml")
    assert f"{RECIPES / new}.yaml" in str(error.value)


def test_good_recipe_is_read():
    recipe = parse_recipe(GOOD)
    assert recipe.train.lr == 0.01  # 1e-2 is a number, though YAML 1.1 says otherwise
    assert recipe.sparsify.config(7).alpha == 1e-3
    assert recipe.sparsify.config(7).seed == 7
    assert recipe.sparsify.control


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("lr: 1e-2", "lrr: 1e-2", ["line 10", "train.lrr", "did you mean lr", "epochs"]),
        ("lr: 1e-2", "lr: fast", ["line 10", "train.lr", "number", "'fast'"]),
        ("penalty: l1", "penalty: l3", ["line 13", "sparsify.penalty", "tl1"]),
        ("alpha: 1e-3", "alpha: high", ["line 14", "sparsify.alpha", "'auto'"]),
        ("bits: [16, 8]", "bits: [16, 2]", ["line 16", "quantize.bits", "4 to 16"]),
        ("images: 20", "images: -3", ["line 18", "encode.images", "greater than 0"]),
        ("  name: digits\n", "", ["line 5", "data.name", "needed"]),
        ("seed: 3", "seed: 3\nseed: 4", ["line 3", "seed", "twice", "line 2"]),
        ("seed: 3", "seed: [3", ["line 3", "not YAML"]),
        ("name: small", "name: a/b", ["line 1", "name"]),
        ("train:", "trian:", ["line 8", "trian", "did you mean train"]),
        ("epochs: 1\n  lr", "epochs: .nan\n  lr", ["line 9", "train.epochs"]),
    ],
)
def test_wrong_recipe_names_key_line_and_what_is_allowed(old, new, expected):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD.replace(old, new, 1), "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml")
    for text in expected:
        assert text in message


@pytest.mark.parametrize("text", ["", "- 1\n", "just words", "\t: x"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_parts_that_need_each_other():
    with pytest.raises(RecipeError, match="quantize"):
        parse_recipe(GOOD.replace("quantize:\n  bits: [16, 8]\n", ""))
    with pytest.raises(RecipeError, match="weights"):
        parse_recipe(GOOD.replace("train:\n  epochs: 1\n  lr: 1e-2\n", ""))


def test_missing_file_names_the_others_there(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"a\.yaml"):
        load_recipe(tmp_path / "b.yaml")


SECOND = GOOD.replace("name: small", "name: second\ncontinues: [{}]").replace(
    "  name: lenet5", "  name: lenet5\n  weights: runs/small/control.safetensors"
)


@pytest.mark.parametrize(
    ("continues", "said"),
    [
        ("first.yaml", None),
        ("nowhere.yaml", "there is no"),
        ("second.yaml", "second.yaml goes on from this recipe itself"),
        ("third.yaml", "second.yaml goes on from this recipe itself"),
        ("other.yaml", "model.weights: runs/small/control.safetensors is of the run 'small', which none"),
        ("wrong.yaml", "wrong.yaml, line 1"),
    ],
)
def test_what_a_recipe_continues_is_checked(tmp_path, continues, said):
    (tmp_path / "first.yaml").write_text(GOOD)
    (tmp_path / "other.yaml").write_text(GOOD.replace("name: small", "name: other"))
    (tmp_path / "third.yaml").write_text(SECOND.format("second.yaml").replace("name: second", "name: third"))
    (tmp_path / "wrong.yaml").write_text("nam: small")
    (tmp_path / "second.yaml").write_text(SECOND.format(continues))
    if said is None:
        assert load_recipe(tmp_path / "second.yaml").continues == ["first.yaml"]
    else:
        with pytest.raises(RecipeError, match=re.escape(said)):
            load_recipe(tmp_path / "second.yaml")


def test_a_run_that_was_not_made_is_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(SECOND.format("first.yaml"))
    with pytest.raises(DataError, match=r"model.weights: there is no runs/small.*made by first.yaml"):
        reproduce(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", EVERY, ids=[f"{p.parent.name}/{p.stem}" for p in EVERY])
def test_recipes_say_what_they_continue(path):
    recipe = load_recipe(path)
    assert bool(runs_of(recipe)) == bool(recipe.continues)
