"""Nearest upsampling as exporters write it without a Resize is one, and costs no moves."""

import numpy as np
import pytest

from actzip.errors import InputError
from actzip.runtime import ops
from exported import FIRST, LAST, N, compiled, kinds, model_of, normal


def unsqueezed(x, y, axis, n, rank):
    """Unsqueeze and Tile, as tf2onnx writes a repeat along ``axis``; names of their constants in ``y``."""
    repeats = [1] * (rank + 1)
    repeats[axis + 1] = n
    nodes = [N("Unsqueeze", [x, y + ".axis"], [y + ".u"]), N("Tile", [y + ".u", y + ".times"], [y])]
    return nodes, {y + ".axis": np.int64([axis + 1]), y + ".times": np.int64(repeats)}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "transpose inside"])
def test_keras_upsampling_of_maps_is_one_resize(inside, tmp_path):
    """UpSampling2D: each row twice, then each column three times."""
    rows, first = unsqueezed("c", "r", 2 if inside else 1, 2, 4)
    columns, second = unsqueezed("s", "q", 2, 3, 4)
    nodes = [N("Transpose", ["x"], ["t"], perm=FIRST), N("Conv", ["t", "w"], ["v"])]
    if inside:  # the transpose stands between Tile and Reshape
        nodes += [N("Identity", ["v"], ["c"]), *rows, N("Transpose", ["r"], ["l"], perm=[0, 2, 3, 4, 1])]
    else:
        nodes += [N("Transpose", ["v"], ["c"], perm=LAST), *rows, N("Identity", ["r"], ["l"])]
    nodes += [
        N("Reshape", ["l", "s.shape"], ["s"]),
        *columns,
        N("Reshape", ["q", "q.shape"], ["z"]),
        N("Transpose", ["z"], ["f"], perm=FIRST),
        N("Conv", ["f", "w2"], ["o"]),
        N("Transpose", ["o"], ["y"], perm=LAST),
    ]
    constants = {"w": normal(6, 3, 3, 3), "w2": normal(4, 6, 3, 3), **first, **second}
    constants |= {"s.shape": np.int64([-1, 10, 6, 6]), "q.shape": np.int64([-1, 10, 18, 6])}
    fast = compiled(model_of(nodes, constants, ["n", 7, 8, 3]), normal(1, 7, 8, 3), tmp_path)
    assert kinds(fast) == ["transpose", "conv2d", "resize", "conv2d", "transpose"]


@pytest.mark.parametrize("how", ["Expand", "Tile"])
def test_upsampling_by_six_dimensions_is_one_resize(how, tmp_path):
    """(N, C, H, 1, W, 1) expanded in both ones, as YOLO's older exporters write it."""
    sizes = [1, 6, 5, 2, 7, 2] if how == "Expand" else [1, 1, 1, 2, 1, 2]
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Reshape", ["c", "apart"], ["a"]),
        N(how, ["a", "sizes"], ["e"]),
        N("Reshape", ["e", "joined"], ["j"]),
        N("Conv", ["j", "w2"], ["y"]),
    ]
    constants = {
        "w": normal(6, 3, 3, 3),
        "w2": normal(4, 6, 3, 3),
        "apart": np.int64([-1, 6, 5, 1, 7, 1]),
        "sizes": np.int64(sizes),
        "joined": np.int64([-1, 6, 10, 14]),
    }
    fast = compiled(model_of(nodes, constants, ["n", 3, 7, 9]), normal(1, 3, 7, 9), tmp_path)
    assert kinds(fast) == ["conv2d", "resize", "conv2d"]


@pytest.mark.parametrize("last", [False, True], ids=["(N, C, L)", "(N, L, C)"])
def test_upsampling_of_signals_is_a_resize(last, tmp_path):
    axis = 1 if last else 2
    repeat, own = unsqueezed("c", "r", axis, 2, 3)
    nodes = [N("Conv", ["x", "w"], ["v"])]
    nodes += [N("Transpose", ["v"], ["c"], perm=[0, 2, 1])] if last else [N("Identity", ["v"], ["c"])]
    nodes += [*repeat, N("Reshape", ["r", "shape"], ["j"])]
    nodes += [N("Transpose", ["j"], ["k"], perm=[0, 2, 1])] if last else [N("Identity", ["j"], ["k"])]
    nodes += [N("Conv", ["k", "w2"], ["y"])]
    constants = {"w": normal(6, 3, 3), "w2": normal(4, 6, 3), **own}
    constants["shape"] = np.int64([-1, 20, 6] if last else [-1, 6, 20])
    fast = compiled(model_of(nodes, constants, ["n", 3, 12]), normal(1, 3, 12), tmp_path)
    assert "resize" in kinds(fast) and not {"expand", "transpose"} & set(kinds(fast))


@pytest.mark.parametrize(
    ("apart", "sizes", "joined"),
    [
        ([-1, 6, 1, 5, 7], [1, 1, 2, 1, 1], [-1, 6, 10, 7]),  # the map twice, not each row
        ([-1, 6, 1, 5, 7], [1, 1, 2, 1, 1], [-1, 12, 5, 7]),  # each channel twice
        ([-1, 1, 6, 5, 7], [1, 2, 1, 1, 1], [-1, 6, 5, 14]),  # another shape behind it
        ([-1, 6, 5, 7, 1], [1, 1, 1, 1, 3], [-1, 6, 15, 7]),  # columns joined with rows
    ],
)
def test_other_repeats_are_what_they_were(apart, sizes, joined, tmp_path):
    nodes = [
        N("Relu", ["x"], ["c"]),
        N("Reshape", ["c", "apart"], ["a"]),
        N("Tile", ["a", "sizes"], ["e"]),
        N("Reshape", ["e", "joined"], ["j"]),
        N("Neg", ["j"], ["y"]),
    ]
    constants = {"apart": np.int64(apart), "sizes": np.int64(sizes), "joined": np.int64(joined)}
    compiled(model_of(nodes, constants, ["n", 6, 5, 7]), normal(1, 6, 5, 7), tmp_path)


@pytest.mark.parametrize("sizes", [(33, 44), (96, 80), (31, 57), (7, 90)])
@pytest.mark.parametrize(
    ("coordinates", "rounding"),
    [("tf_half_pixel_for_nn", "floor"), ("align_corners", "round_prefer_ceil"), ("asymmetric", "floor")],
)
def test_tensorflow_nearest_pixels_are_one_resize(sizes, coordinates, rounding, tmp_path):
    """The scales are rounded to float32, as tf2onnx writes them, and of no whole number of pixels."""
    how = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding, "mode": "nearest"}
    nodes = [N("Relu", ["x"], ["r"]), N("Resize", ["r", "", "s"], ["y"], **how)]
    scales = np.float32([1, 1, sizes[0] / 48, sizes[1] / 40])
    fast = compiled(model_of(nodes, {"s": scales}, ["n", 3, 48, 40]), normal(1, 3, 48, 40), tmp_path)
    assert kinds(fast).count("resize") == 1 and "slice" not in kinds(fast)


def test_given_pixels_are_checked_in_saved_models():
    def resize(**how):
        return ops.Resize("r", ("x",), "y", mode="given", **how).infer([(1, 3, 4, 5)])

    assert resize(size=(2, 3), rows=(0, 3), columns=(4, 0, 0)) == (1, 3, 2, 3)
    for rows, columns in (((0, 4), (0, 0, 0)), ((0,), (0, 0, 0)), ((0, -1), (0, 0, 0)), ((0, 1), (0, 0, 5))):
        with pytest.raises(InputError, match=r"rows|columns"):
            resize(size=(2, 3), rows=rows, columns=columns)


def test_crops_of_transposed_convolutions_go_into_their_padding(tmp_path):
    """tf2onnx writes the output's size as a Slice and a Pad of nothing, worked out of shapes."""
    nodes = [
        N("ConvTranspose", ["x", "w"], ["c"], strides=[2, 2]),
        N("Slice", ["c", "starts", "ends", "axes"], ["s"]),
        N("Pad", ["s", "nothing"], ["p"]),
        N("Add", ["p", "b"], ["q"]),
        N("Relu", ["q"], ["y"]),
    ]
    constants = {
        "w": normal(4, 6, 4, 3),
        "starts": np.int64([1, 0]),
        "ends": np.int64([-1, 14]),
        "axes": np.int64([2, 3]),
        "nothing": np.int64([0] * 8),
        "b": normal(1, 6, 1, 1),
    }
    fast = compiled(model_of(nodes, constants, ["n", 4, 6, 7]), normal(1, 4, 6, 7), tmp_path)
    assert not {"slice", "pad", "batch_norm", "activation"} & set(kinds(fast))
