"""Checkpointing with packing: what ``torch.utils.checkpoint`` recomputes is packed while it waits.

Autograd asks the innermost saved-tensor hooks alone, and in a checkpointed block these are PyTorch's.
Ours go above them and hand on a stand-in of a packed tensor: PyTorch keeps it as it would the tensor,
and what it gives back is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from actzip.training import packed
from actzip.training.saved import Slot

__all__ = ["checkpoint_contexts"]

Hook = Callable[[Any], Any]


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The ``context_fn`` that makes ``torch.utils.checkpoint`` pack what it recomputes.

    with packed_activations(model, bits=8):
        y = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)

    By the settings of the innermost :func:`packed_activations` or :func:`pack_saved` around; where there
    is none, and before PyTorch 2.5, it is plain checkpointing. Backward may run inside or outside.

    Returns:
        The context of the block's first run and that of its recomputation.
    """
    scope = packed.current_scope()
    if scope is None or packed.top_hooks is None:
        return nullcontext(), nullcontext()
    return _First(), _Again(scope.model, scope.session)


class _StandIn(Tensor):
    """Size, type and place of a packed tensor, without memory. Whatever reads it reads the tensor."""

    slot: Slot
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, tensor: Tensor, slot: Slot) -> _StandIn:
        found: _StandIn = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        found.slot = slot
        return found

    def detach(self) -> Tensor:
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, _restored, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _restored(tensor: Tensor) -> Tensor:
    return packed.restore(tensor.slot) if isinstance(tensor, _StandIn) else tensor


def _hooks_below() -> tuple[Hook, Hook]:
    """Those in force here: checkpoint's."""
    assert packed.top_hooks is not None
    pack, unpack = packed.top_hooks(True)
    return pack, lambda kept: _restored(unpack(kept))


class _First:
    """Around a block's first run: what checkpointing gives back for it is restored."""

    def __enter__(self) -> None:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(*_hooks_below())
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


class _Again:
    """Around a block's recomputations: each packs what it saves, with the same seed."""

    def __init__(self, model: nn.Module, session: packed.Session) -> None:
        self.model, self.settings, self.stack = model, session.settings, list(session.stack)
        self.buffers = session.buffers
        self.buffers.thorough = True
        self.seed = session.next_seed()

    def __enter__(self) -> None:
        session = packed.Session(self.model, self.settings, self.seed)
        session.stack, session.buffers = list(self.stack), self.buffers
        below, unpack = _hooks_below()

        def pack(tensor: Tensor) -> Any:
            slot = session.pack(tensor)
            return below(_StandIn.of(tensor, slot) if packed.ordinary(tensor) else tensor)

        scope = packed.Scope(self.model, session, pack, unpack)
        try:
            scope.enter()
        except BaseException:  # an interrupt: nobody else would end it
            scope.leave()
            raise

    def __exit__(self, *error: object) -> None:
        scope = packed.current_scope()
        assert scope is not None
        try:
            scope.leave()
        finally:  # where the first was interrupted
            scope.leave()
