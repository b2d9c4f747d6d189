"""Checkpointing with packing: what ``torch.utils.checkpoint`` recomputes is packed while it waits.

Autograd asks the innermost saved-tensor hooks alone, and in a checkpointed block these are PyTorch's.
Ours go above them and hand on a stand-in of a packed tensor: PyTorch keeps it as it would the tensor,
and what it gives back is restored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from actzip.training import packed
from actzip.training.standin import StandIn, handed

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
    first = _First(scope.session)
    return first, _Again(scope.model, scope.session, first)


def _hooks_below() -> tuple[Hook, Hook]:
    """Those in force here: checkpoint's."""
    assert packed.top_hooks is not None
    pack, unpack = packed.top_hooks(True)
    return pack, lambda kept: _given_back(unpack(kept))


def _given_back(tensor: Tensor) -> Tensor:
    return handed(tensor.slot) if isinstance(tensor, StandIn) else tensor


class _First(ExitStack):
    """Around a block's first run: what checkpointing gives back for it is restored.

    Attributes:
        convolved: how many maps its convolutions saved.
    """

    def __init__(self, session: packed.Session) -> None:
        super().__init__()
        self.session, self.convolved = session, 0

    def __enter__(self) -> _First:
        below, unpack = _hooks_below()

        def count(tensor: Tensor) -> Any:
            self.convolved += self.session.convolves(tensor)
            return below(tensor)

        self.enter_context(torch.autograd.graph.saved_tensors_hooks(count, unpack))
        return self


class _Again(ExitStack):
    """Around a block's recomputations: each packs what it saves, with the same seed."""

    def __init__(self, model: nn.Module, session: packed.Session, first: _First) -> None:
        super().__init__()
        self.first = first
        self.model, self.settings, self.stack = model, session.settings, list(session.stack)
        self.buffers = session.buffers
        self.buffers.thorough = True
        self.seed = session.next_seed()

    def __enter__(self) -> _Again:
        session = packed.Session(self.model, self.settings, self.seed)
        session.stack, session.buffers = list(self.stack), self.buffers
        session.at_once = self.first.convolved
        below, unpack = _hooks_below()

        def pack(tensor: Tensor) -> Any:
            slot = session.pack(tensor)
            if not packed.ordinary(tensor):
                return below(tensor)
            return below(StandIn.of(tensor.shape, tensor.stride(), tensor, slot))

        scope = packed.Scope(self.model, session, pack, unpack)
        try:
            scope.enter()
            self.callback(scope.leave)
            self.callback(scope.leave)  # where the other was interrupted
            return self
        except BaseException:  # an interrupt: nobody else would end it
            scope.leave()
            raise
