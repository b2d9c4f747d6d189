"""Where data sets come from: one function a source, one row in the table of names."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actzip.data.arrays import Images
from actzip.data.roots import data_roots
from actzip.errors import ActzipWarning, DataError, InputError
from actzip.files import cache_dir, write_with

__all__ = ["PHOTOGRAPHS", "data_roots", "names", "resolve"]

_MNIST = ((0.1307,), (0.3081,))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
#: Mean and deviation that networks for photographs are trained with.
PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_KINDS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")  # EPS, say, would be a program for Ghostscript
#: The side of a square, or height and width.
Side = int | tuple[int, int]
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"}


def names() -> list[str]:
    """Names and forms that :func:`resolve` takes."""
    return [*_NAMED, "parquet:PATH", "folder:PATH", "wds:PATTERN", "npy:PATH"]


def resolve(
    name: str,
    split: str = "train",
    *,
    folder: str | os.PathLike[str] | None = None,
    image_size: Side | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    limit: int | None = None,
    sample: int | None = None,
    download: bool = True,
) -> Images:
    """The data set called ``name``.

    Args:
        name: ``mnist``, ``cifar10``, ``digits``, ``imagenet_sample``; or ``parquet:PATH`` (Hugging
            Face layout: ``image.bytes``/``img.bytes`` and ``label``), ``folder:PATH`` (one folder a
            class, or images alone), ``wds:PATTERN`` (WebDataset shards), ``npy:PATH`` (an array N,
            C, H, W). A plain path is one of the latter four, by what lies there.
        split: ``train`` or ``test``.
        folder: where to look first (the command line's ``--data``).
        image_size: images are resized (shorter side) and cropped to this square, or to (height,
            width); needed where they differ in size.
        mean, std: normalisation; the data set's usual one where not given.
        limit: at most this many images, the first.
        sample: at most about this many images, spread evenly over the set (of shards: the first);
            no others are decoded or held in memory, however many a folder, parquet file or shard
            has.
        download: ask torchvision to download a named set that is nowhere (MNIST); otherwise a
            stand-in is used.

    Raises:
        InputError: an unknown name or split.
        DataError: the data is missing, empty or unreadable.
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test', not {split!r}")
    kind, _, rest = name.partition(":")
    if rest and kind in _FORMS:
        data = _FORMS[kind](rest, split, image_size, sample)
    elif name in _NAMED:
        data = _NAMED[name](data_roots(folder), split, image_size, download)
    else:
        data = _by_path(name, split, image_size, sample)
    if sample is not None and len(data) > sample:
        data = data.take(_evenly(len(data), sample))
    if limit is not None and limit < len(data):
        data = data.take(slice(0, limit))
    if mean is not None or std is not None:
        from dataclasses import replace

        data = replace(data, mean=mean or data.mean, std=std or data.std)
    return data


def _evenly(count: int, sample: int | None) -> npt.NDArray[np.int64]:
    """``sample`` indices of ``count``, spread evenly; all of them where there are no more."""
    if sample is None or count <= sample:
        return np.arange(count)
    return np.round(np.linspace(0, count - 1, sample)).astype(np.int64)


def _by_path(name: str, split: str, image_size: Side | None, sample: int | None) -> Images:
    path = Path(name).expanduser()
    if path.is_dir():
        parquet = sorted(path.glob(f"*{split}*.parquet")) or sorted(path.glob("*.parquet"))
        if parquet:
            return _parquet(str(parquet[0]), split, image_size, sample)
        if sorted(path.glob("*.tar")):
            return _webdataset(str(path / "*.tar"), split, image_size, sample)
        return _folder(name, split, image_size, sample)
    if path.is_file():
        form = {".parquet": _parquet, ".npy": _npy, ".tar": _webdataset}.get(path.suffix)
        if form is not None:
            return form(name, split, image_size, sample)
        raise DataError(f"{path} is no parquet, npy or tar file")
    if "/" in name or path.suffix:
        raise DataError(f"there is no file or folder {path}")
    import difflib

    near = difflib.get_close_matches(name, list(_NAMED), n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise InputError(f"no data set is called {name!r}{hint} There are: {', '.join(names())}")


# --- named sets -----------------------------------------------------------------------------------


def _listed(roots: list[Path]) -> str:
    return f"none of {', '.join(map(str, roots))}" if roots else "no folder that is known"


def _absent(file: str, roots: list[Path]) -> DataError:
    return DataError(
        f"{file} is in {_listed(roots)}; set ACTZIP_DATA to the folder that holds {file.split('/')[0]}/"
    )


def _idx(path: Path) -> npt.NDArray[Any]:
    """An IDX file (MNIST's format), plain or gzipped."""
    import gzip

    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes")
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if data.size != int(np.prod(dims)):
        raise DataError(f"{path} is truncated: {data.size} bytes for {dims}")
    return data.reshape(dims)


def _mnist(roots: list[Path], split: str, image_size: Side | None, download: bool) -> Images:
    stem = "train" if split == "train" else "t10k"
    for root in roots:
        for folder in (root / "MNIST" / "raw", root / "MNIST", root):
            for suffix in ("", ".gz"):
                images = folder / f"{stem}-images-idx3-ubyte{suffix}"
                labels = folder / f"{stem}-labels-idx1-ubyte{suffix}"
                if images.is_file() and labels.is_file():
                    return Images(
                        _idx(images)[:, None],
                        _idx(labels).astype(np.int64),
                        10,
                        *_MNIST,
                        "mnist",
                        f"MNIST in {folder}",
                    )
    why = "is not to be downloaded"
    if download:
        try:
            from actzip.models._torchvision import import_torchvision

            import_torchvision()
            from torchvision.datasets import MNIST

            target = cache_dir("mnist")
            found = MNIST(str(target), train=split == "train", download=True)
            return Images(
                found.data.numpy()[:, None],
                found.targets.numpy().astype(np.int64),
                10,
                *_MNIST,
                "mnist",
                "MNIST, downloaded",
            )
        except Exception as error:
            why = f"cannot be downloaded ({type(error).__name__})"
    warnings.warn(
        f"MNIST is in {_listed(roots)} and {why}; scikit-learn's digits (1,797 "
        "images of 8x8, enlarged) stand in for it",
        ActzipWarning,
        stacklevel=3,
    )
    return _digits(roots, split, image_size, download)


def _digits(roots: list[Path], split: str, image_size: Side | None, download: bool) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError("the digits need scikit-learn; `pip install actzip[data]` brings it") from error
    found = load_digits()
    small = np.clip(found.images * 16, 0, 255).astype(np.uint8)
    big = np.zeros((len(small), 1, 28, 28), np.uint8)
    big[:, 0, 2:26, 2:26] = small.repeat(3, axis=1).repeat(3, axis=2)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(big))
    chosen = order[:1297] if split == "train" else order[1297:]
    return Images(
        big[chosen],
        found.target[chosen].astype(np.int64),
        10,
        *_MNIST,
        "digits",
        "scikit-learn's digits, enlarged to 28x28 (a stand-in, not MNIST)",
    )


def _cifar10(roots: list[Path], split: str, image_size: Side | None, download: bool) -> Images:
    for root in roots:
        for path in (root / "cifar10" / f"{split}.parquet", root / f"{split}.parquet"):
            if path.is_file():
                data = _parquet(str(path), split, None)
                return Images(
                    data.images,
                    data.labels,
                    10,
                    *_CIFAR,
                    "cifar10",
                    f"CIFAR-10 (re-encoded as JPEG) in {path}",
                )
    raise _absent(f"cifar10/{split}.parquet", roots)


def _imagenet_sample(roots: list[Path], split: str, image_size: Side | None, download: bool) -> Images:
    for root in roots:
        path = root / "imagenet_sample" / "test.parquet"
        if path.is_file():
            data = _parquet(str(path), split, image_size or 224)
            return Images(
                data.images, data.labels, 1000, *PHOTOGRAPHS, "imagenet_sample", f"photographs in {path}"
            )
    raise _absent("imagenet_sample/test.parquet", roots)


_NAMED: dict[str, Callable[[list[Path], str, Side | None, bool], Images]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "digits": _digits,
    "imagenet_sample": _imagenet_sample,
}


# --- files ----------------------------------------------------------------------------------------


def _decode(data: bytes | Path, image_size: Side | None) -> npt.NDArray[np.uint8]:
    """One image as uint8 C, H, W in RGB; resized by its shorter side and cropped at the centre to a
    square, or to (height, width), if asked."""
    from PIL import Image

    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_KINDS) as image:
        rgb = image.convert("RGB")
        if isinstance(image_size, tuple):
            rgb = _covering(rgb, *image_size)
        elif image_size is not None:
            w, h = rgb.size
            target = max(image_size, round(image_size * 8 / 7)) if min(w, h) != image_size else image_size
            scale = target / min(w, h)
            rgb = rgb.resize(
                (max(image_size, round(w * scale)), max(image_size, round(h * scale))),
                Image.Resampling.BICUBIC,
            )
            w, h = rgb.size
            left, top = (w - image_size) // 2, (h - image_size) // 2
            rgb = rgb.crop((left, top, left + image_size, top + image_size))
        return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))


def _covering(rgb: Any, height: int, width: int) -> Any:
    """The image resized to cover ``height`` x ``width``, and its middle."""
    from PIL import Image

    w, h = rgb.size
    scale = max(height / h, width / w)
    w, h = max(width, round(w * scale)), max(height, round(h * scale))
    left, top = (w - width) // 2, (h - height) // 2
    rgb = rgb.resize((w, h), Image.Resampling.BICUBIC)
    return rgb.crop((left, top, left + width, top + height))


def _stack(
    items: Iterator[tuple[str, bytes | Path, int]], image_size: Side | None, where: str
) -> tuple[Any, Any, tuple[str, ...]]:
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label_name, data, label in items:
        try:
            image = _decode(data, image_size)
        except Exception as error:  # PIL raises many types
            skipped.append(f"{label_name}: {type(error).__name__}: {error}")
            continue
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{where}: images of {images[0].shape[1:]} and {image.shape[1:]}; give an image size"
            )
        images.append(image)
        labels.append(label)
    if skipped:
        shown = "; ".join(skipped[:3]) + (" ..." if len(skipped) > 3 else "")
        warnings.warn(
            f"{where}: {len(skipped)} images cannot be read and are skipped: {shown}",
            ActzipWarning,
            stacklevel=4,
        )
    if not images:
        raise DataError(f"{where} holds no readable image")
    return np.stack(images), np.array(labels, dtype=np.int64), tuple(skipped)


def _cached(
    key: str, files: list[Path], make: Callable[[], tuple[Any, Any, tuple[str, ...]]]
) -> tuple[Any, Any, tuple[str, ...]]:
    """Decoded arrays, made once for the same files (by path, size and time) and mapped from the
    disk afterwards."""
    state = "|".join(f"{p.resolve()}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    digest = hashlib.sha256(f"{key}|{state}".encode()).hexdigest()[:24]
    base = cache_dir("data")
    x_path, y_path = base / f"{digest}.x.npy", base / f"{digest}.y.npy"
    try:
        return np.load(x_path, mmap_mode="r"), np.load(y_path), ()
    except (OSError, ValueError, EOFError):
        pass
    x, y, skipped = make()
    if not skipped:  # a set with unreadable files says so every time
        write_with(y_path, lambda f: np.save(f, y))
        write_with(x_path, lambda f: np.save(f, x))
    return x, y, skipped


def _parquet(path: str, split: str, image_size: Side | None, sample: int | None = None) -> Images:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise DataError("reading parquet needs pyarrow; `pip install actzip[data]` brings it") from error
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no file {file}")

    def rows() -> Iterator[tuple[str, bytes, int]]:
        index = 0
        try:
            table = pq.ParquetFile(file)
            wanted = set(_evenly(table.metadata.num_rows, sample).tolist())
            columns = table.schema_arrow.names
            image = next((c for c in ("image", "img", "jpg", "png") if c in columns), None)
            label = next((c for c in ("label", "labels", "fine_label", "cls") if c in columns), None)
            if image is None:
                raise DataError(f"{file} has no image column (image or img); it has {', '.join(columns)}")
            for batch in table.iter_batches(batch_size=1000, columns=[c for c in (image, label) if c]):
                for row in batch.to_pylist():
                    if index not in wanted:
                        index += 1
                        continue
                    value = row[image]
                    data = value["bytes"] if isinstance(value, dict) else value
                    yield f"row {index}", data or b"", int(row[label]) if label else 0
                    index += 1
        except DataError:
            raise
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file} is not a readable parquet file of images: {error}") from error

    x, y, skipped = _cached(
        f"parquet:{image_size}:{sample}", [file], lambda: _stack(rows(), image_size, str(file))
    )
    return Images(x, y, int(y.max()) + 1, *PHOTOGRAPHS, f"parquet:{path}", str(file), skipped)


def _folder(path: str, split: str, image_size: Side | None, sample: int | None = None) -> Images:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    if (root / split).is_dir():
        root = root / split
    elif split == "test" and (root / "val").is_dir():
        root = root / "val"
    classes = sorted(d for d in root.iterdir() if d.is_dir())
    if classes:
        files = [
            (f, i)
            for i, d in enumerate(classes)
            for f in sorted(d.rglob("*"))
            if f.suffix.lower() in _EXTENSIONS
        ]
    else:
        files = [(f, 0) for f in sorted(root.iterdir()) if f.suffix.lower() in _EXTENSIONS]
    files = [files[i] for i in _evenly(len(files), sample)]
    if not files:
        raise DataError(f"{root} holds no images ({', '.join(sorted(_EXTENSIONS))})")

    def make() -> tuple[Any, Any, tuple[str, ...]]:
        return _stack(((f.name, f, i) for f, i in files), image_size, str(root))

    x, y, skipped = _cached(f"folder:{image_size}", [f for f, _ in files], make)
    return Images(x, y, max(1, len(classes)), *PHOTOGRAPHS, f"folder:{path}", str(root), skipped)


def _webdataset(pattern: str, split: str, image_size: Side | None, sample: int | None = None) -> Images:
    try:
        import webdataset as wds
    except ModuleNotFoundError as error:
        raise DataError("reading shards needs webdataset; `pip install actzip[data]` brings it") from error
    import glob

    shards = (
        sorted(glob.glob(pattern))
        if any(c in pattern for c in "*?[")
        else list(wds.shardlists.expand_urls(pattern))
    )
    files = [Path(s) for s in shards]
    if not files or any(not f.is_file() for f in files):
        raise DataError(f"no WebDataset shards match {pattern}")

    def rows() -> Iterator[tuple[str, bytes, int]]:
        # absolute: a name like "pipe:..." would be a command
        shards = wds.WebDataset([str(f.absolute()) for f in files], shardshuffle=False, empty_check=False)
        try:
            for sample in shards:
                image = next(
                    (sample[k] for k in sample if k.lower() in ("jpg", "jpeg", "png", "webp", "ppm")), None
                )
                label = sample.get("cls", b"0")
                if image is not None:
                    number = int(label if isinstance(label, (int, str)) else label.decode())
                    yield str(sample["__key__"]), image, number
        except Exception as error:  # tarfile's, and those of labels
            raise DataError(f"{pattern}: not readable shards of images: {error}") from error

    x, y, skipped = _cached(
        f"wds:{image_size}:{sample}",
        files,
        lambda: _stack(itertools.islice(rows(), sample), image_size, pattern),
    )
    return Images(
        x, y, int(y.max()) + 1, *PHOTOGRAPHS, f"wds:{pattern}", f"{len(files)} shards {pattern}", skipped
    )


def _npy(path: str, split: str, image_size: Side | None, sample: int | None = None) -> Images:
    file = Path(path).expanduser()
    try:
        x = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {file}") from error
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file} is not an array file: {error}") from error
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4:
        raise DataError(f"{file} has the shape {x.shape}; images N, C, H, W are needed")
    if sample is not None and len(x) > sample:
        x = x[_evenly(len(x), sample)]
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.number) or not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
            raise DataError(f"{file} is {x.dtype}; uint8 images, or numbers in [0, 1], are needed")
        x = np.round(np.asarray(x) * 255).astype(np.uint8)
    c = x.shape[1]
    return Images(x, np.zeros(len(x), np.int64), 1, (0.0,) * c, (1.0,) * c, f"npy:{path}", str(file))


_FORMS: dict[str, Callable[[str, str, Side | None, int | None], Images]] = {
    "parquet": _parquet,
    "folder": _folder,
    "wds": _webdataset,
    "npy": _npy,
}
