"""What the verbs share: consoles, progress bars, JSON out, arrays in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.text import Text

from actzip.errors import CodecError, DataError, InputError
from actzip.files import read_torch
from actzip.progress import display
from actzip.text import visible

if TYPE_CHECKING:
    from actzip.data.form import Form

__all__ = [
    "FALLBACK",
    "IMAGES",
    "JSON",
    "MODEL",
    "SIZE",
    "THREADS",
    "TRUST",
    "WEIGHTS",
    "beside",
    "complain",
    "errors",
    "model_and_input",
    "one_line",
    "other_than",
    "out",
    "print_json",
    "progress",
    "read_array",
    "read_arrays",
    "read_blob",
    "with_elements",
]


class Plain(Console):
    """A console that shows strings as they are: without markup, with control characters as escapes.

    A name in a file could otherwise colour, move or delete what the terminal shows. Colours of
    our own are ``Text``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, cells of tables included, comes here."""
        return super().render_str(visible(text, keep="\n"), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Lines are not broken where they are text alone: a path can be copied, or read by a program."""
        if all(isinstance(o, (str, Text)) for o in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)


#: Results go to standard output, everything else (progress, warnings, errors) to standard error.
out = Plain()
errors = Plain(stderr=True)

#: The option that every verb has.
JSON: bool = typer.Option(False, "--json", help="Print the result as JSON on standard output.")
#: What the verbs that run a model on the engine take, in the order of :func:`model_and_input`.
MODEL: str = typer.Argument(
    ..., help="A torchvision or timm name, one of ours, package.module:attribute, a .pt2 or an .onnx file."
)
WEIGHTS: str | None = typer.Option(None, "--weights", help="A safetensors file for the model.")
IMAGES: str | None = typer.Option(
    None, "--data", "-d", help="Typical images: folder, parquet file, .npy, or a data set's name."
)
SIZE: int | None = typer.Option(None, "--size", min=1, help="Images are resized and cropped to this square.")
TRUST: bool = typer.Option(
    False, "--trust", help="Run code that the given file holds: a .pt2, or a recipe that names Python code."
)
FALLBACK: bool | None = typer.Option(
    None,
    help="Let ONNX Runtime run an ONNX file that it is quicker with here; where not given, a quantized one.",
    show_default=False,
)
THREADS: int | None = typer.Option(
    None, "--threads", min=1, help="Threads of each engine; all CPUs where not given."
)


def one_line(message: object) -> str:
    """A message on one line, without control characters."""
    return visible(" ".join(str(message).split()))


def complain(kind: str, message: object, style: str = "red") -> None:
    """``error: message`` on standard error."""
    errors.print(Text.assemble((f"{kind}:", style), " ", one_line(message)))


def print_json(value: Any) -> None:
    """JSON on standard output, nothing else."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo("".join(c if c == "\n" or visible(c) == c else json.dumps(c)[1:-1] for c in text))


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A progress display on standard error; nothing is shown where that is not a terminal, or with
    ``quiet``."""
    with display(errors, TextColumn("{task.fields[note]}"), quiet=quiet) as bar:
        yield bar


def read_arrays(path: Path, name: str | None = None) -> dict[str, Any]:
    """The arrays in a ``.npy``, ``.npz``, ``.pt``/``.pth`` (a tensor or a dict of them) or
    ``.safetensors`` file.

    The one of a ``.npy`` file, or a lone tensor, is called ``""``. With ``name`` only that one is read.

    Raises:
        DataError: the file is missing, unreadable or of another kind.
        InputError: there is no array called ``name``.
    """
    import numpy as np

    if not path.is_file():
        raise DataError(f"there is no file {path}")
    kind = path.suffix.lower()
    try:
        if kind == ".npy":
            return {"": np.load(path, allow_pickle=False)}
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                entries = arrays.zip.namelist()
                twice = {
                    n for n in entries if entries.count(n) > 1 or (n.endswith(".npy") and n[:-4] in entries)
                }
                if twice:
                    raise DataError(
                        f"{path} holds two arrays called {sorted(twice)[0].removesuffix('.npy')!r}"
                    )
                return {n: arrays[n] for n in _named(list(arrays.files), name, path)}
        if kind == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), "np") as file:
                names = _named(list(file.keys()), name, path)
                wide = any(file.get_slice(n).get_dtype() == "BF16" for n in names)
                if not wide:
                    return {n: file.get_tensor(n) for n in names}
            with safe_open(str(path), "pt") as file:  # numpy has no bfloat16
                return {n: file.get_tensor(n) for n in names}
        if kind in (".pt", ".pth"):
            import torch

            value = read_torch(path)
            if isinstance(value, torch.Tensor):
                return {"": value}
            if not isinstance(value, dict):
                raise InputError(
                    f"{path} holds a {type(value).__name__}; a tensor or a dict of tensors is needed"
                )
            tensors = {str(n): t for n, t in value.items() if isinstance(t, torch.Tensor)}
            inner = [str(n) for n, t in value.items() if isinstance(t, dict)]
            if not tensors:
                under = (
                    f"; under {', '.join(map(repr, inner[:4]))} are dicts: save one of them" if inner else ""
                )
                raise InputError(f"{path} holds a dict without tensors of its own{under}")
            return {n: tensors[n] for n in _named(list(tensors), name, path)}
    except (InputError, DataError):
        raise
    except Exception as error:  # numpy, torch and safetensors raise many types for a damaged file
        raise DataError(
            f"{path} is not a readable {kind[1:]} file: {' '.join(str(error).split())}"
        ) from error
    raise DataError(f"{path}: a .npy, .npz, .pt or .safetensors file is needed")


def _named(names: list[str], name: str | None, path: Path) -> list[str]:
    if name is None and names:
        return names
    if name in names:
        return [str(name)]
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    if name is None:
        raise InputError(f"{path} holds no arrays")
    raise InputError(f"{path} holds {len(names)} arrays ({shown}), none is called {name!r}")


def read_array(path: Path, name: str | None = None) -> Any:
    """The array in a file, or the one called ``name``; see :func:`read_arrays`.

    Raises:
        DataError: the file is missing, unreadable or of another kind.
        InputError: it holds several arrays and ``name`` is not one of them.
    """
    arrays = read_arrays(path, name)
    if len(arrays) > 1:
        shown = ", ".join(list(arrays)[:8]) + (" ..." if len(arrays) > 8 else "")
        raise InputError(f"{path} holds {len(arrays)} arrays ({shown}); choose one with --name")
    return next(iter(arrays.values()))


def with_elements(arrays: dict[str, Any], source: Path) -> dict[str, Any]:
    """The arrays that have elements; of several, the others are left out with a warning.

    Raises:
        InputError: none has any.
    """
    import warnings

    from actzip.errors import ActzipWarning

    empty = {name: tuple(a.shape) for name, a in arrays.items() if 0 in a.shape}
    if len(empty) == len(arrays):
        name, shape = next(iter(empty.items()), ("", ()))
        of = f", array {name!r}" if name else ""
        raise InputError(f"{source}{of}: nothing to encode: no elements (shape {shape})")
    for name, shape in empty.items():
        warnings.warn(f"{source}, array {name!r}: no elements (shape {shape}): left out", ActzipWarning)
    return {name: a for name, a in arrays.items() if name not in empty}


def other_than(source: Path, target: Path) -> Path:
    """``target``, which is not the file that is read.

    Raises:
        InputError: it is.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target} is the file that is read; give another name for what is written")
    return target


def beside(path: Path) -> Plain:
    """Where to say that ``path`` was written: not into what goes to standard output."""
    return errors if str(path).startswith(("/dev/", "/proc/")) else out


def read_blob(path: Path) -> bytes:
    """The bytes of a blob file.

    Raises:
        DataError: the file cannot be read. CodecError: it is empty.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not blob:
        raise CodecError(f"{path} is empty: 0 bytes are no blob")
    return blob


def model_and_input(
    ref: str,
    weights: str | None,
    data: str | None,
    batch: int,
    size: int | None,
    trust: bool,
    form: Form | None = None,
) -> tuple[Any, Any, Any]:
    """What ``actzip.compile`` takes for the model ``ref`` (a module, a graph, or the path of an
    ONNX file), the same as a module in eval mode, and a batch of ``data`` or of the arrays given
    (random numbers, with a warning, where there are none): a tensor, a tuple of several inputs.

    Raises:
        InputError: unknown model or data, or data that does not fit the model. DataError: a file is
            missing, damaged or not trusted.
    """
    import warnings

    import numpy as np
    import torch

    from actzip.data import Loader
    from actzip.data.form import Form, forward_names
    from actzip.errors import ActzipWarning
    from actzip.models import RANDOM_WEIGHTS, has_random_weights, load_weights
    from actzip.runtime.drawn import drawn
    from actzip.runtime.models import GraphNet, load_model, open_size, say_open

    form = form or Form()
    torch.manual_seed(0)
    first = None if form.first is None else form.first[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActzipWarning)  # what runs elsewhere is said when it is compiled
        parts = ref.endswith(".onnx") and weights is None
        net, shape, mean, std = load_model(ref, first, shapes=form.given, trust=trust, parts=parts)
    for m in net.modules():  # an exported program's module refuses eval()
        m.training = False
    if weights is not None:
        load_weights(net, weights)
    elif has_random_weights(net):
        warnings.warn(RANDOM_WEIGHTS, ActzipWarning, stacklevel=2)
    found = Path(ref) if ref.endswith(".onnx") and weights is None else net
    batch = getattr(net, "batch", None) or (form.first[0] if form.first else batch)
    if form.arrays:
        if data is not None:
            raise InputError("--data and --input exclude each other: both give the inputs")
        names = list(net.graph.inputs) if isinstance(net, GraphNet) else forward_names(net)
        return found, net, next(form.batches(names, None))
    if data is None:
        warnings.warn(
            "no --data: random input is used, so densities mean little", ActzipWarning, stacklevel=2
        )
        if size is None:
            say_open(net)
        if isinstance(net, GraphNet) and len(net.graph.inputs) > 1:
            return found, net, net.example()
        if size is not None:
            shape = form.laid_shape(form.chw(shape)[0], size, size)
        kind = net.graph.values[net.graph.inputs[0]].dtype if isinstance(net, GraphNet) else "float32"
        return found, net, torch.from_numpy(drawn(np.random.default_rng(0), (batch, *shape), kind))
    images = form.images(data, shape, mean, std, size=size, limit=batch, takes=open_size(net))
    if size is None:
        say_open(net, form.laid_shape(*images.shape))
    if len(images) < batch:
        raise InputError(f"{images.source} has {len(images)} images, --batch wants {batch}")
    return found, net, form.laid_out(next(iter(Loader(images, batch)))[0])
