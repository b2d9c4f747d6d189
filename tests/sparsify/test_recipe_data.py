"""A recipe of ImageNet's form, shrunk: a folder with one folder a class, and WebDataset shards;
alpha found by itself."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from actzip.experiment.recipe import parse_recipe
from actzip.experiment.run import reproduce

RECIPE = """
name: shrunk
seed: 1
model: {{name: "toys:net"}}
data:
  name: {train}
  test: {test}
  validation: 16
  batch_size: 16
  augment: crop_flip
  image_size: 16
train: {{epochs: 2, lr: 0.01}}
sparsify: {{epochs: 2, lr: 0.01, alpha: auto, floor: 0.0, checks: 2}}
"""


def png(label: int, random: np.random.Generator) -> bytes:
    pixels = random.integers(0, 150, (20, 24, 3))
    if label < 3:
        pixels[:, :, label] += 80
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def folder(root, count: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    for label in range(4):
        (root / f"n{label:08d}").mkdir(parents=True)
        for i in range(count):
            (root / f"n{label:08d}" / f"{i}.png").write_bytes(png(label, random))
    return f"folder:{root}"


def shards(root, count: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    root.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / f"part-{shard}.tar", "w") as tar:
            for i in range(count * 2):
                for name, blob in ((f"{i}.png", png(i % 4, random)), (f"{i}.cls", str(i % 4).encode())):
                    entry = tarfile.TarInfo(f"{shard}-{name}")
                    entry.size = len(blob)
                    tar.addfile(entry, io.BytesIO(blob))
    return f"wds:{root}/*.tar"


@pytest.mark.parametrize("make", [folder, shards])
def test_folder_and_shards(make, tmp_path, monkeypatch):
    if make is shards:
        pytest.importorskip("webdataset")
    monkeypatch.setenv("ACTZIP_CACHE", str(tmp_path / "cache"))
    train, test = make(tmp_path / "train", 16, 0), make(tmp_path / "test", 4, 1)
    recipe = parse_recipe(RECIPE.format(train=train, test=test), "shrunk.yaml")
    results = reproduce(recipe, tmp_path / "out", trust=True)  # its network is the test's own code
    stages = {s["stage"]: s for s in results["stages"]}
    assert stages["sparse"]["samples"] == 16
    assert results["data"]["train"]["images"] == 48
    assert len(results["history"]["sparse"]["checks"]) == 5  # the start, and two an epoch
    allowed = [c["theoretical_speedup"] for c in results["history"]["sparse"]["checks"]]
    assert max(allowed) > min(allowed)
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
