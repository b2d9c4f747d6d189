"""Forward hooks for the time of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Hooks"]


class Hooks:
    """Forward hooks that are gone when the block ends, whatever ends it.

    A hook is noted before it is placed and found again by itself, not by the handle that PyTorch
    returns: an interrupt between the two would leave it for good.
    """

    def __init__(self) -> None:
        self._placed: list[tuple[nn.Module, Callable[..., Any]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """``hook(module, args)`` before each call of ``module``."""
        self._placed.append((module, hook))
        module.register_forward_pre_hook(hook)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """``hook(module, args, output)`` after each call; ``always``: after one that raises too."""
        self._placed.append((module, hook))
        module.register_forward_hook(hook, always_call=always)

    def remove(self) -> None:
        for module, hook in self._placed:
            for table in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, placed in table.items() if placed is hook]:
                    table.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.remove()
        finally:  # where the first was interrupted
            self.remove()

    def __del__(self) -> None:  # where an interrupt came before the first line of ``__exit__``
        self.remove()
