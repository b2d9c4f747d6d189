"""Scales on disk: JSON for people and other programs, safetensors beside the weights.

    save_quantization(model, "net.quant.json")            # scales, bits and signs
    save_quantized(model, "net")                          # net.safetensors (weights), net.json (scales)
    load_quantized(model, "net")

The JSON has one entry a map:
``{"name": {"bits": 8, "signed": false, "kind": "relu", "scale": [0.0123]}}``; the decimal numbers
are exact for float32. The safetensors form holds each scale as a float32 tensor of its name, and
the rest as JSON in the metadata key ``actzip.quantization``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actzip.errors import DataError, InputError
from actzip.files import read_json, write_bytes
from actzip.models import load_state
from actzip.quantize.linear import QuantRange
from actzip.quantize.model import WEIGHT, Quantization, SiteQuantizer, quantization, remove_quantization

__all__ = [
    "load_quantization",
    "load_quantized",
    "quantization_from_dict",
    "quantization_to_dict",
    "save_quantization",
    "save_quantized",
]

FORMAT = "actzip.quantization"
VERSION = 1


def quantization_to_dict(q: Quantization) -> dict[str, Any]:
    """Plain numbers: what the JSON file holds."""

    def entry(s: SiteQuantizer) -> dict[str, Any]:
        scale = [float(v) for v in s.scale.detach().cpu()]
        return {"bits": s.bits, "signed": s.signed, "kind": s.kind, "scale": scale}

    return {
        "format": FORMAT,
        "version": VERSION,
        "maps": {n: entry(s) for n, s in q.sites.items()},
        "weights": {n.removesuffix(WEIGHT): entry(s) for n, s in q.weights.items()},
    }


def quantization_from_dict(data: Any, where: str = "quantization") -> Quantization:
    """The quantizers that :func:`quantization_to_dict` wrote.

    Raises:
        DataError: it is something else, or an entry is damaged (it is named).
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"{where}: not a file of scales (no format {FORMAT!r})")
    if data.get("version") != VERSION:
        raise DataError(f"{where}: version {data.get('version')!r}; this program reads version {VERSION}")

    def sites(key: str, suffix: str) -> list[SiteQuantizer]:
        entries = data.get(key, {})
        if not isinstance(entries, dict):
            raise DataError(f"{where}: {key!r} is not a table of layers")
        made = []
        for name, e in entries.items():
            try:
                scale = torch.tensor([float(v) for v in e["scale"]], dtype=torch.float32)
                r = QuantRange(e["bits"], bool(e["signed"]))
                made.append(SiteQuantizer(name + suffix, r, scale, str(e.get("kind", "relu"))))
            except (KeyError, TypeError, ValueError, InputError) as error:
                raise DataError(f"{where}: entry {name!r} is damaged: {error}") from error
        return made

    return Quantization(sites("maps", ""), sites("weights", WEIGHT))


def _in_folder(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
    write_bytes(path, data)


def save_quantization(model: nn.Module, path: str | Path) -> None:
    """Writes the scales of a quantized model: ``*.json``, or ``*.safetensors``.

    Raises:
        InputError: the model is not quantized, or another suffix.
    """
    path = Path(path)
    q = quantization(model)
    data = quantization_to_dict(q)
    if path.suffix == ".json":
        text = json.dumps(data, indent=1) + "\n"
        _in_folder(path, text.encode())
    elif path.suffix == ".safetensors":
        from safetensors.torch import save

        tensors = {n: s.scale.detach().cpu().contiguous() for n, s in (q.sites | q.weights).items()}
        for group in (data["maps"], data["weights"]):
            for e in group.values():
                del e["scale"]
        metadata = {FORMAT: json.dumps(data)}
        _in_folder(path, save(tensors, metadata))
    else:
        raise InputError(f"scales are written as .json or .safetensors, not {path.name!r}")


def load_quantization(model: nn.Module, path: str | Path) -> nn.Module:
    """Quantizes ``model`` in place with scales from :func:`save_quantization`; gives it back.

    Raises:
        DataError: no such file, or it is damaged.
        InputError: another suffix.
    """
    path = Path(path)
    if path.suffix == ".json":
        data = read_json(path)
    elif path.suffix == ".safetensors":
        data = _from_safetensors(path)
    else:
        raise InputError(f"scales are read from .json or .safetensors, not {path.name!r}")
    return quantization_from_dict(data, str(path)).attach(model)


def _from_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            tensors: dict[str, Tensor] = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"scales cannot be read from {path}: {error}") from error
    try:
        data = json.loads(metadata.get(FORMAT, "null"))
        for key, suffix in (("maps", ""), ("weights", WEIGHT)):
            for name, e in (data or {}).get(key, {}).items():
                e["scale"] = tensors[name + suffix].tolist()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged scales: {error!r}") from error
    return data


def save_quantized(model: nn.Module, stem: str | Path) -> None:
    """Writes ``stem.safetensors`` (the float weights, keys as they are) and ``stem.json`` (the scales)."""
    from safetensors.torch import save

    stem = Path(stem)
    data = json.dumps(quantization_to_dict(quantization(model)), indent=1) + "\n"
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    _in_folder(stem.with_name(stem.name + ".safetensors"), save(tensors))
    _in_folder(stem.with_name(stem.name + ".json"), data.encode())


def load_quantized(model: nn.Module, stem: str | Path) -> nn.Module:
    """Loads weights and scales of :func:`save_quantized` into ``model``, in place; gives it back.

    Raises:
        DataError: a file is missing or damaged, or the weights are not this model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stem = Path(stem)
    path = stem.with_name(stem.name + ".safetensors")
    remove_quantization(model)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"weights cannot be loaded from {path}: {error}") from error
    load_state(model, state, path)
    return load_quantization(model, stem.with_name(stem.name + ".json"))
