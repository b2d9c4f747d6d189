"""What every training shares: precision, mixup and how batches are read; and saved activation maps,
packed until backward.

with actzip.training.packed_activations(model):      # exact; bits=8 or 4 for less memory
    loss = criterion(model(x), y)
loss.backward()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy

if TYPE_CHECKING:
    from actzip.training.mixup import mixed as mixed
    from actzip.training.packed import PackedForward as PackedForward
    from actzip.training.packed import Packing as Packing
    from actzip.training.packed import pack_saved as pack_saved
    from actzip.training.packed import packed_activations as packed_activations
    from actzip.training.precision import autocast as autocast
    from actzip.training.recompute import checkpoint_contexts as checkpoint_contexts

#: Public names and the modules that define them, imported on first use.
_HOMES: dict[str, str] = {
    "PackedForward": "packed",
    "Packing": "packed",
    "autocast": "precision",
    "checkpoint_contexts": "recompute",
    "mixed": "mixup",
    "pack_saved": "packed",
    "packed_activations": "packed",
}

__all__ = [
    "PackedForward",
    "Packing",
    "autocast",
    "checkpoint_contexts",
    "mixed",
    "pack_saved",
    "packed_activations",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _HOMES)
