"""Models by name: our own, torchvision's, timm's, or any import path; and weights as safetensors.

model = resolve("lenet5")
model = resolve("resnet50", weights=None)            # torchvision
model = resolve("timm:efficientnet_lite0")           # timm, when both know the name
model = resolve("my.package:make_net", width=2)      # any importable attribute
load_weights(model, "weights.safetensors")
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actzip._module import lazy
from actzip.errors import DataError, InputError
from actzip.files import write_bytes
from actzip.models._torchvision import import_timm, import_torchvision

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "OWN",
    "ModelInfo",
    "available",
    "find_weights",
    "has_random_weights",
    "load_weights",
    "model_info",
    "resolve",
    "save_weights",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)


#: What is said where such a model is measured.
RANDOM_WEIGHTS = (
    "the weights are random, since none were given: densities, bits and speed-ups mean nothing; give "
    "trained ones (--weights, or a module that has them)"
)


@dataclass(frozen=True)
class ModelInfo:
    """What is known beforehand of a model: its constructor and how its input is prepared.

    ``input_shape`` is (C, H, W); ``mean`` and ``std`` are per channel, for input scaled to [0, 1] first.
    """

    target: str
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CIFAR_IDELBAYEV = ((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_IMAGENET = ((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# None of these is a torchvision or timm name.
OWN: dict[str, ModelInfo] = {
    "lenet5": ModelInfo("actzip.models.lenet:lenet5", (1, 28, 28), (0.0,), (1.0,)),
    "mobilenet_v1": ModelInfo("actzip.models.mobilenet:mobilenet_v1", *_CIFAR),
    "cifar_resnet20": ModelInfo("actzip.models.resnet_cifar:resnet20", *_CIFAR_IDELBAYEV),
    "cifar_resnet32": ModelInfo("actzip.models.resnet_cifar:resnet32", *_CIFAR_IDELBAYEV),
    "cifar_resnet44": ModelInfo("actzip.models.resnet_cifar:resnet44", *_CIFAR_IDELBAYEV),
    "cifar_resnet56": ModelInfo("actzip.models.resnet_cifar:resnet56", *_CIFAR_IDELBAYEV),
    "inception_v3_5class": ModelInfo(
        "actzip.models:_inception_v3_5class", (3, 299, 299), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    ),
}


def _inception_v3_5class(classes: int = 5) -> nn.Module:
    """torchvision's Inception-V3 with the three-layer head of the five-class photograph classifier."""
    from torch import nn

    import_torchvision()
    from torchvision.models import inception_v3

    model: nn.Module = inception_v3(
        weights=None, aux_logits=False, transform_input=False, init_weights=False, num_classes=1
    )
    model.fc = nn.Sequential(
        nn.Linear(2048, 256),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(128, classes),
    )
    return model


def available() -> list[str]:
    """Names that :func:`resolve` knows without a prefix: our own, and torchvision's classifiers if
    installed."""
    names = list(OWN)
    try:
        import_torchvision()
        from torchvision import models
    except DataError:
        return names
    return [*names, *(n for n in models.list_models(module=models) if n not in OWN)]


def _timm_names() -> list[str]:
    try:
        timm = import_timm()
    except DataError:
        return []
    return list(timm.list_models())


def _import_path(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"model {path!r}: module {module_name!r} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            near = difflib.get_close_matches(part, dir(target), n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise InputError(f"model {path!r}: {module_name!r} has no {part!r}{hint}")
        target = getattr(target, part)
    return target  # type: ignore[no-any-return]


def resolve(name: str, **kwargs: Any) -> nn.Module:
    """The model called ``name``, with fresh weights unless ``kwargs`` say otherwise.

    Args:
        name: one of ours (:data:`OWN`), a torchvision name (``torchvision:`` may stand before it), a timm
            name (``timm:`` before it where torchvision has the same), or ``package.module:attribute`` that is
            an ``nn.Module`` or a callable that returns one.
        **kwargs: given to the constructor.

    Raises:
        InputError: nothing is called that (near matches are named), or the constructor refuses ``kwargs``.
        DataError: the package that has it is not installed.
    """
    from torch import nn

    prefix, _, rest = name.partition(":")
    if prefix == "timm" and rest:
        names = _timm_names()
        base = rest.split(".")[0]
        if base not in names:
            if not names:
                import_timm()
            raise _unknown(name, [f"timm:{n}" for n in names])
        build: Callable[..., Any] = lambda **kw: import_timm().create_model(rest, **kw)  # noqa: E731
    elif prefix == "torchvision" and rest:
        build = _torchvision_builder(rest)
    elif rest:
        build = _import_path(name)
        if isinstance(build, nn.Module):
            if kwargs:
                raise InputError(
                    f"model {name!r} is an instance already, it takes no arguments: {sorted(kwargs)}"
                )
            return build
    elif name in OWN:
        build = _import_path(OWN[name].target)
    else:
        known = available()
        if name in known:
            build = _torchvision_builder(name)
        else:
            timm_names = _timm_names()
            if name.split(".")[0] not in timm_names:
                raise _unknown(name, [*known, *timm_names])
            build = lambda **kw: import_timm().create_model(name, **kw)  # noqa: E731
    try:
        model = build(**kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"model {name!r} cannot be built with {kwargs or 'no arguments'}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name!r} gave a {type(model).__name__}, not a torch.nn.Module")
    named = prefix in ("timm", "torchvision") or not rest
    if named and not any(kwargs.get(k) for k in ("weights", "pretrained", "checkpoint_path")):
        model.__dict__["_actzip_fresh"] = _versions(model)
    return model


def has_random_weights(model: nn.Module) -> bool:
    """Whether ``model`` is as :func:`resolve` made it without weights: nothing was loaded, no step taken."""
    return model.__dict__.get("_actzip_fresh") == _versions(model)


def _versions(model: nn.Module) -> list[int]:
    """How often each parameter was written."""
    return [p._version for p in model.parameters()]


def _torchvision_builder(name: str) -> Callable[..., Any]:
    import_torchvision()
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise _unknown(f"torchvision:{name}", [f"torchvision:{n}" for n in names])

    def build(**kwargs: Any) -> Any:
        # GoogLeNet and Inception spend many seconds on a slow initialiser unless told not to
        if name in ("googlenet", "inception_v3") and kwargs.get("weights") is None:
            kwargs.setdefault("init_weights", True)
        return models.get_model(name, **kwargs)

    return build


def _unknown(name: str, known: list[str]) -> InputError:
    known = list(dict.fromkeys(known))  # torchvision and timm share names
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5) or [n for n in known if name in n][:4]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return InputError(
        f"no model is called {name!r}{hint} (ours: {', '.join(OWN)}; torchvision and timm names; "
        "or an import path like package.module:attribute)"
    )


def model_info(name: str) -> ModelInfo:
    """Input shape and normalisation usual for ``name``; ImageNet's where nothing better is known."""
    if name in OWN:
        return OWN[name]
    base = name.partition(":")[2] or name
    if base.startswith("inception_v3"):
        return ModelInfo(name, (3, 299, 299), *_IMAGENET[1:])
    return ModelInfo(name, *_IMAGENET)


def find_weights(ref: str | os.PathLike[str]) -> Path:
    """The weights file ``ref``: a path, or a file name looked for under the shared weights folders.

    Looked for as given, then in ``$ACTZIP_SHARED/weights``, ``$ACTZIP_DATA/weights`` and
    ``../shared/weights``; ``.safetensors`` may be left out.

    Raises:
        DataError: there is no such file; the places tried are named.
    """
    given = Path(ref).expanduser()
    names = [given] if given.suffix else [given, given.with_suffix(".safetensors")]
    roots = [Path()]
    if not given.is_absolute():
        for root in (os.environ.get("ACTZIP_SHARED"), os.environ.get("ACTZIP_DATA"), "../shared"):
            if root:
                roots += [Path(root) / "weights", Path(root)]
    tried = [root / n for root in roots for n in names]
    for path in tried:
        if path.is_file():
            return path
    places = ", ".join(dict.fromkeys(str(p) for p in tried))
    raise DataError(f"no weights file {str(ref)!r}; looked for {places}")


def load_weights(model: nn.Module, ref: str | os.PathLike[str], *, strict: bool = True) -> dict[str, str]:
    """Load a safetensors file into ``model`` (values are cast to each parameter's dtype).

    Returns:
        The metadata stored in the file.

    Raises:
        DataError: the file is missing or not safetensors, or keys or shapes do not fit (they are named).
    """
    from safetensors import SafetensorError, safe_open

    path = find_weights(ref)
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error
    load_state(model, state, path, strict=strict)
    return metadata


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str], *, strict: bool = True
) -> None:
    """``model.load_state_dict(state)`` whole or not at all; ``path`` is named where it does not fit.

    Raises:
        DataError: keys or shapes do not fit; how many, and the first of them.
    """
    own = model.state_dict()
    misfits = _misfits(own, state, strict)
    before = copy.deepcopy(own) if misfits else {}  # load_state_dict would stop half-way
    try:
        model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        if before:
            model.load_state_dict(before)
        why = "; ".join(misfits) or error
        raise DataError(f"{path} does not fit this {type(model).__name__}: {why}") from error


def _misfits(own: Mapping[str, Any], state: Mapping[str, Any], strict: bool) -> list[str]:
    """What of ``state`` has no place in ``own``, and the other way round, a few words a kind."""

    def named(keys: Sequence[str], what: str) -> list[str]:
        first = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        return [f"{len(keys)} {what} ({first})"] if keys else []

    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and hasattr(v, "shape") and state[k].shape != v.shape
    ]
    found = named(shapes, "of another shape")
    if strict:
        found += named([k for k in own if k not in state], "missing")
        found += named([k for k in state if k not in own], "that the model has no place for")
    return found


def save_weights(
    state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's state dict as safetensors, whole or not at all (temporary name, then renamed).

    ``metadata`` values that are not strings are stored as JSON.

    Raises:
        DataError: the folder cannot be written.
    """
    from safetensors.torch import save
    from torch import nn

    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    # shared or non-contiguous storage is written out once per key, in NCHW order
    flat = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    blob = save(flat, metadata={"format": "pt", **text})
    write_bytes(path, blob)
