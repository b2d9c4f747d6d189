from pathlib import Path

import pytest

from actzip.errors import RecipeError
from actzip.experiment import load_recipe, parse_recipe

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
