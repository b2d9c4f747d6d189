"""What training a model keeps for backward, layer by layer, and what that takes packed.

memory = training_memory(model, x)
print(memory.table())
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.errors import InputError
from actzip.training import Packing, packed_activations

__all__ = ["TrainingLayer", "TrainingMemory", "training_memory"]

#: Live beside what is saved, at the worst place, in maps of the largest size: a rule found by measuring
#: (docs/training-memory.md).
_MAPS_IN_FLIGHT = 4


@dataclass
class TrainingLayer:
    """Bytes that one module saves for backward: as PyTorch keeps them, and packed."""

    name: str
    saved: int = 0
    exact: int = 0
    bits8: int = 0
    bits4: int = 0


@dataclass
class TrainingMemory:
    """What a step keeps for backward, in bytes.

    Attributes:
        batch: samples of the step.
        model: parameters, their gradients and buffers.
        total: the sums over the layers.
        peaks: predicted peak over ``model``, by ``plain``, ``exact``, ``bits8`` and ``bits4``.
    """

    batch: int
    model: int
    total: TrainingLayer
    peaks: dict[str, int]
    layers: list[TrainingLayer] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers."""
        return asdict(self)

    def table(self) -> Any:
        """A table of it for the terminal (rich)."""
        from rich.table import Table

        table = Table(title=f"saved for backward, batch {self.batch}, MB")
        table.add_column("layer")
        for name in ("saved", "exact", "8 bits", "4 bits"):
            table.add_column(name, justify="right")
        for layer in (*self.layers, self.total):
            table.add_row(layer.name, *(_mb(v) for v in (layer.saved, layer.exact, layer.bits8, layer.bits4)))
        table.add_section()
        table.add_row("predicted peak over the model", *(_mb(v) for v in self.peaks.values()))
        table.add_row("the model and its gradients", _mb(self.model))
        return table


def _mb(value: int) -> str:
    return f"{value / 1e6:.1f}"


def training_memory(model: nn.Module, x: Any, y: Tensor | None = None) -> TrainingMemory:
    """Runs a copy of ``model`` in training mode on one batch, packs what it saves and counts bytes.

    Args:
        model: any module; it is not changed.
        x: a batch, ``N, C, H, W`` for images.
        y: labels, ``N``; the loss is cross-entropy with them, and the mean of the output where None.

    Raises:
        InputError: the model saves nothing for backward.
    """
    twin = copy.deepcopy(model)
    twin.train()
    found: dict[str, Packing] = {}
    for name, bits in (("exact", None), ("bits8", 8), ("bits4", 4)):
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            with packed_activations(twin, bits, by_layer=True, generator=generator) as found[name]:
                loss = _loss(twin(x), y)
            del loss
    plain = found["exact"]
    if not plain.saved_bytes:
        raise InputError("the model saves nothing for backward: does any parameter require a gradient?")
    layers = [
        TrainingLayer(name, memory.saved, *(_packed(found[k], name) for k in found))
        for name, memory in plain.layers.items()
    ]
    total = TrainingLayer("all", plain.saved_bytes, *(p.packed_bytes for p in found.values()))
    flight = _MAPS_IN_FLIGHT * plain.largest
    kept = {"plain": plain.saved_bytes, **{k: p.packed_bytes for k, p in found.items()}}
    own = sum(p.nbytes * (2 if p.requires_grad else 1) for p in model.parameters())
    own += sum(b.nbytes for b in model.buffers())
    batch = len(x) if isinstance(x, Tensor) else 1
    return TrainingMemory(batch, own, total, {k: v + flight for k, v in kept.items()}, layers)


def _packed(packing: Packing, name: str) -> int:
    layer = packing.layers.get(name)
    return 0 if layer is None else layer.packed


def _loss(out: Any, y: Tensor | None) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    if y is not None and out.dim() == 2 and int(y.max()) < out.shape[1]:
        return F.cross_entropy(out, y)
    return out.float().mean()
