"""A PyTorch module that torch.export cannot capture, by its submodules: those that can run on the
engine do, and the module's own Python runs around them.

Detectors are such modules: what they do depends on the boxes that they find. Submodules are tried
from the outside in, on the inputs that the example gives them; one that compiles stands for all that
is in it. Where the engine refuses a call (no box at all), the submodule itself takes it.
"""

from __future__ import annotations

import copy
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from actzip.activations.tap import call_model
from actzip.errors import ActzipError, InputError, UnsupportedError, told
from actzip.runtime.binding import as_call
from actzip.runtime.explain import Explanation, elsewhere_row, together
from actzip.runtime.tracing import flat_inputs

__all__ = ["ModuleOfParts", "module_by_submodules"]

_HEAVY = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase)  # what a submodule is worth compiling for

Compiler = Callable[[nn.Module, Any], Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def module_by_submodules(
    model: nn.Module, example: Any, compiler: Compiler, threads: int, refused: UnsupportedError
) -> ModuleOfParts:
    """A module that cannot be captured whole; a warning says what of it runs on the engine.

    Args:
        compiler: compiles a submodule for its example.
        refused: why it cannot, raised where none of its submodules compiles.

    Raises:
        UnsupportedError: ``refused``.
        InputError: the model does not take the example.
    """
    made = ModuleOfParts(model, flat_inputs(example), compiler, threads, str(refused))
    if not made.stands:
        raise refused
    told(made.says())
    return made


class _Stand:
    """A submodule's ``forward``: the engine's, or its own where the engine refuses the call."""

    def __init__(self, name: str, own: nn.Module, fast: Any) -> None:
        self.name, self.own, self.fast = name, own.forward, fast
        self.seconds = 0.0
        self.calls: list[Call] | None = None  # of a run that is watched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            out = self.fast(*args, **kwargs)
        except ActzipError:
            return self.own(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        if self.calls is not None:
            self.calls.append((args, kwargs))
        return out


class ModuleOfParts:
    """A compiled module of which only submodules run on the engine: called and explained as a
    :class:`~actzip.runtime.compiled.CompiledModel`. It shares the module's weights, which should stay
    as they are.

    Attributes:
        threads: threads of a call of the engine's parts.
        stands: names of the submodules that run on the engine.
    """

    on_engine, quantized = True, False

    def __init__(
        self, model: nn.Module, example: Call, compiler: Compiler, threads: int, refused: str
    ) -> None:
        self.threads = threads
        self._name, self._refused = type(model).__name__, refused
        self._example = example
        self._model = _mirrored(model, {})
        self._stands = _compiled(self._model, example, compiler)
        self._total = 0.0
        if self._stands:
            self(*example[0], **example[1])  # warm
            self._timed(example)

    @property
    def stands(self) -> list[str]:
        return [s.name for s in self._stands]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network.

        Raises:
            InputError: the model does not take these inputs.
        """
        arrays = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, (np.ndarray, Tensor))]
        given = pytree.tree_map_only(np.ndarray, torch.as_tensor, (args, kwargs))
        with torch.no_grad():
            out = call_model(self._model, *given)
        if not arrays or any(isinstance(x, Tensor) for x in arrays):
            return out
        return pytree.tree_map_only(Tensor, lambda t: t.numpy(), out)

    def _timed(self, call: Call) -> None:
        for stand in self._stands:
            stand.seconds = 0.0
        start = time.perf_counter()
        self(*call[0], **call[1])
        self._total = time.perf_counter() - start

    def _elsewhere(self) -> float:
        return max(0.0, self._total - sum(s.seconds for s in self._stands))

    def says(self) -> str:
        """One line: which submodules run on the engine, and the share of the time of the rest."""
        names = ", ".join(self.stands[:6]) + (", ..." if len(self.stands) > 6 else "")
        share = self._elsewhere() / self._total if self._total else 0.0
        return (
            f"{len(self._stands)} submodules run on the engine ({names}), the rest in PyTorch, "
            f"{100 * share:.0f} % of the time: {self._refused}"
        )

    def explain(self, x: Any = None, *, runs: int = 10) -> Explanation:
        """What runs where and why, measured now on ``x`` (or on the example)."""
        call = self._example if x is None else as_call(x)
        for stand in self._stands:
            stand.calls = []
        self._timed(call)
        reports, rows = [], []
        for stand in self._stands:
            calls, stand.calls = stand.calls or [], None
            for args, kwargs in calls:
                report = stand.fast.explain(_as_example(args, kwargs, stand.own), runs=runs)
                reports.append(report)
                rows += report.rows
        why = f"not for the engine: {self._refused}"
        rows.append(elsewhere_row("the rest", "pytorch", why, 1e3 * self._elsewhere()))
        tensors = [t for t in pytree.tree_leaves(call) if hasattr(t, "shape")]
        shapes = {f"input {i}": list(t.shape) for i, t in enumerate(tensors)}
        return together(reports, rows, 1, self.threads, shapes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Not possible: a ``.actzip`` file holds networks of the engine alone.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{os.fspath(path)}: a part of this model runs in PyTorch, which no .actzip file holds; compile "
            f"and save a submodule ({', '.join(self.stands[:3])}): {self._refused}"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a part of this model runs in PyTorch; pickle the module and compile it where it runs"
        )

    def __repr__(self) -> str:
        return f"ModuleOfParts({self._name}: {self.says()})"


def _mirrored(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """A module in eval mode with the same parameters and buffers, and submodules of its own."""
    if id(module) in known:
        return known[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return module
    made = known[id(module)] = copy.copy(module)
    made._modules = {k: m and _mirrored(m, known) for k, m in module._modules.items()}
    made.training = False
    return made


def _compiled(model: nn.Module, example: Call, compiler: Compiler) -> list[_Stand]:
    """Compiles submodules of ``model``, from the outside in, and puts the engine in the place of their
    ``forward``."""
    stands: list[_Stand] = []
    tried = _children("", model)
    while tried:
        with _watched(tried) as seen:
            call_model(model, *example)
        inner: dict[str, nn.Module] = {}
        for name, module in tried.items():
            if name not in seen or isinstance(module, torch.jit.ScriptModule):
                continue  # not called in this pass
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    fast = compiler(module, _as_example(*seen[name], module.forward))
            except ActzipError:
                inner |= _children(f"{name}.", module)
                continue
            stands.append(_Stand(name, module, fast))
        tried = inner
    order = [name for name, _ in model.named_modules()]
    for stand in stands:
        model.get_submodule(stand.name).forward = stand
    return sorted(stands, key=lambda s: order.index(s.name))


def _children(prefix: str, module: nn.Module) -> dict[str, nn.Module]:
    """Submodules that are worth compiling, those of lists and dicts by themselves."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found |= _children(f"{prefix}{name}.", child)
        elif any(isinstance(m, _HEAVY) for m in child.modules()):
            found[prefix + name] = child
    return found


@contextmanager
def _watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """The arguments of each module's first call inside the block, as they were then."""
    seen: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in seen:
                seen[name] = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))

        return hook

    handles = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in modules.items()]
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _as_example(args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any]) -> Any:
    """A call as an example: a tuple, or a dict by name where arguments are given by name."""
    if not kwargs:
        return args
    try:
        return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"arguments of a call that cannot be bound: {error}") from error
