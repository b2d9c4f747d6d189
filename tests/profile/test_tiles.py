"""Non-zeros in tiles: counted as one would by hand, coded as the codec codes, compared with chance."""

from __future__ import annotations

import json
import math

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from actzip.codec import encode, inspect
from actzip.errors import InputError
from actzip.profile import profile
from actzip.profile.report import schema
from actzip.profile.tiles import TileStats, code_tiles, hypergeometric, parse_tiles


def by_hand(x: np.ndarray, tile: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """Non-zeros of the whole tiles and of the cut-off ones."""
    h, w, c = (min(t, s) for t, s in zip(tile, (x.shape[2], x.shape[3], x.shape[1])))
    whole, cut = [], []
    for image in x:
        for i in range(0, x.shape[1], c):
            for j in range(0, x.shape[2], h):
                for k in range(0, x.shape[3], w):
                    box = image[i : i + c, j : j + h, k : k + w]
                    (whole if box.shape == (c, h, w) else cut).append(int((box != 0).sum()))
    return whole, cut


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(st.integers(1, 3), *[st.integers(1, 17)] * 3),
    st.integers(0, 99),
)
def test_tiles_are_counted_as_by_hand(tile: tuple[int, int, int], shape: tuple[int, ...], seed: int) -> None:
    x = np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)
    stats = TileStats.of(tile, x)
    stats.add(x)
    whole, cut = by_hand(x, tile)
    assert stats.counts.tolist() == np.bincount(whole, minlength=stats.counts.size).tolist()
    assert stats.edges[0] == len(cut) and stats.edges[2] == sum(cut)
    assert stats.nonzeros == sum(whole) + sum(cut) == int((x != 0).sum())


def test_parts_merge_exactly() -> None:
    x = np.random.default_rng(0).integers(0, 3, (6, 20, 9, 9)).astype(np.float32)
    one = TileStats.of((4, 4, 8), x)
    one.add(x)
    parts = [TileStats.of((4, 4, 8), p) for p in (x[:2], x[2:])]
    for part, p in zip(parts, (x[:2], x[2:])):
        part.add(p)
    parts[0].merge(parts[1])
    assert parts[0].summary() == one.summary()


def test_hypergeometric_is_the_distribution_of_that_name() -> None:
    for elements, nonzeros, tile in ((10, 4, 3), (7, 7, 2), (9, 0, 4), (30, 28, 12), (5, 3, 5)):
        want = [
            math.comb(nonzeros, k) * math.comb(elements - nonzeros, tile - k) / math.comb(elements, tile)
            for k in range(tile + 1)
        ]
        assert hypergeometric(elements, nonzeros, tile) == pytest.approx(want)


def test_distance_is_near_0_by_chance_and_near_1_for_whole_channels() -> None:
    rng = np.random.default_rng(0)
    scattered = (rng.random((4, 64, 32, 32)) < 0.4).astype(np.float32)
    channels = np.zeros((4, 64, 32, 32), np.float32)
    channels[:, :26] = 1
    for x, low, high in ((scattered, 0.0, 0.06), (channels, 0.4, 1.0)):
        stats = TileStats.of((8, 8, 1), x)
        stats.add(x)
        assert low <= stats.summary()["hypergeometric"]["distance"] <= high
    assert stats.summary()["empty"] == pytest.approx(1 - 26 / 64)


def test_a_tile_is_a_chunk_of_its_own_and_the_index_is_counted() -> None:
    rng = np.random.default_rng(1)
    x = (rng.random((20, 10, 9)) * (rng.random((20, 10, 9)) < 0.4)).astype(np.float32)
    stats = TileStats.of((4, 4, 16), x[None])
    for codec in ("seg", "zvc", "rans", "raw"):
        index, sizes, elements = code_tiles(stats, x, codec, 8)
        assert len(sizes) == 2 * 3 * 3 and elements == x.size
        blob = encode(stats.blocks(x), codec=codec, bits=8, chunk_elements=256)
        assert len(blob) == index + sum(sizes)
        assert index >= 8 * len(sizes)
        assert inspect(blob).chunk_shape == (16, 4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 3, stride=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(torch.relu(self.conv(x))).mean((2, 3))
        return torch.relu(self.fc(y))


def test_the_report_has_tiles_everywhere(tmp_path: object) -> None:
    torch.manual_seed(0)
    report = profile(
        Net(), [torch.randn(3, 3, 12, 12)], codecs=["zvc", "seg"], bits=(8,), engine=False, tiles="4x4x8"
    )
    data = json.loads(report.to_json())
    jsonschema.validate(data, schema())
    first, second = data["maps"][0]["tiles"], data["maps"][1]["tiles"]
    assert first["tile"] == [4, 4, 8] and first["tiles"] == 3 * 9 and second["tile"] == [1, 1, 4]
    assert set(first["coded"]) == {"zvc-8", "seg-8"}
    coded = first["coded"]["seg-8"]
    assert 0 < coded["index_bits_per_element"] < coded["bits_per_element"]
    assert sum(i * n for i, n in enumerate(first["histogram"])) == round(
        data["maps"][0]["density"] * 3 * 8 * 144
    )
    assert [row["tiles"]["tile"] for row in data["layers"]] == [[4, 4, 3], [4, 4, 8], [1, 1, 6]]
    said = str(report.table())
    assert "from chance" in said and "seg-8 by tile" in said and "4x4x8" in said
    assert 'tab("tiles"' in report.to_html()
    assert {r["name"] for r in report.frames()["tiles"]} == {m["name"] for m in data["maps"]}


def test_without_tiles_none_are_counted() -> None:
    report = profile(Net(), [torch.randn(1, 3, 12, 12)], codecs=[], engine=False)
    assert "tiles" not in report.maps[0] and "tiles" not in report.frames()


@pytest.mark.parametrize(
    "wrong", ["8x8", "8x8x16x1", "0x8x8", "axbxc", "8x8x-1", "", (1, 2), (1, 2, 0), 7, "2000x2000x16", True]
)
def test_a_wrong_shape_of_tiles_is_named(wrong: object) -> None:
    with pytest.raises(InputError, match="tile"):
        parse_tiles(wrong)
