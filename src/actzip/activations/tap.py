"""The tap: a torch function mode around a model's forward pass, which sees every call in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actzip.activations import calls
from actzip.activations.calls import argument, with_argument
from actzip.activations.sites import (
    ROOT,
    ComputeCall,
    Selector,
    Site,
    as_selectors,
    check_names,
    matches,
    select_sites,
)
from actzip.errors import InputError

__all__ = ["ActivationFn", "ActivationTap", "ComputeFn", "eval_mode", "find_sites", "run_model"]

ActivationFn = Callable[[Site, Tensor], "Tensor | None"]
ComputeFn = Callable[[Site, ComputeCall], "Tensor | ComputeCall | None"]


class _Pass:
    """The state of one forward pass in one thread."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.counts: dict[tuple[str, str], int] = {}
        self.mode: _Mode | None = None


_PASSES = threading.local()


def _no_modes() -> Any:
    return torch._C.DisableTorchFunction()


class _Mode(TorchFunctionMode):
    def __init__(self, tap: ActivationTap, state: _Pass) -> None:
        super().__init__()
        self.tap = tap
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tap = self.tap
        known = calls.ATEN.get(func._schema.name, func) if isinstance(func, torch._ops.OpOverload) else func
        if tap._compute is not None and (known in calls.CONVOLUTIONS or known in calls.LINEARS):
            found = calls.compute_call(known, args, kwargs)
            if found is not None:
                kind, call = found
                site = tap._site(self.state, "compute", kind, None)
                if tap._wanted(site):
                    with _no_modes():
                        replaced = tap._compute(site, call)
                    if isinstance(replaced, ComputeCall):  # another input and another weight
                        args, kwargs = with_argument(args, kwargs, 1, "weight", replaced.weight)
                        replaced = replaced.input
                    if (
                        replaced is not None and replaced is not call.input
                    ):  # another input for this computation
                        args, kwargs = with_argument(args, kwargs, 0, "input", replaced)
        if tap._activation is not None:
            try:
                activation = calls.activation_kind(known, args, kwargs)
            except TypeError:  # an unhashable callable
                activation = None
            if activation is not None:
                return self._activate(func, known, args, kwargs, *activation)
        return func(*args, **kwargs)

    def _activate(self, func: Any, known: Any, args: Any, kwargs: Any, kind: str, high: float | None) -> Any:
        tap = self.tap
        target = argument(args, kwargs, 0, "input", "self")
        in_place = calls.is_in_place(known, args, kwargs)
        tracked = in_place and isinstance(target, Tensor) and torch.is_grad_enabled() and target.requires_grad
        if tracked:
            # an in-place activation keeps its result for the backward pass, so it must not be overwritten later:
            # it works on a copy, and the caller's tensor gets the final values
            key = next((k for k in ("input", "self") if k in kwargs), None)
            copy = target.clone()
            out = func(*args, **{**kwargs, key: copy}) if key else func(copy, *args[1:], **kwargs)
        else:
            out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        site = tap._site(self.state, "activation", kind, high)
        new = None
        if tap._activation is not None and tap._wanted(site):
            with (
                _no_modes()
            ):  # what a tap computes (a clamp, say) is no activation of the model to other taps
                new = tap._activation(site, out)
        if new is None:
            new = out
        if tracked:
            target.copy_(new)
            return new
        if (
            in_place and new is not out
        ):  # callers of an in-place function may go on with the tensor they gave it
            target.copy_(new)
            return target
        return new


class ActivationTap:
    """Watches, and may change, the activation maps and the operands of convolutions of any ``nn.Module``.

    Use it as a context manager, or :meth:`attach` and :meth:`detach`. Several taps may be attached to one model: the
    one attached first sees a map first. Forward passes may run in several threads.

    Args:
        model: any module; calls of the model and of its submodules on their own are both seen.
        activation: ``f(site, y)`` is called with the result ``y`` of each activation function (``N, C, H, W`` or any
            other shape; autograd is on as in the model); a tensor that it returns takes the place of ``y``.
        compute: ``f(site, call)`` is called before each convolution and linear with its operands; a tensor that it
            returns takes the place of the input, a :class:`ComputeCall` that of input and weight.
        layers, ignore: which sites, see the module's documentation.

    Attributes:
        sites: the sites seen so far, in order of first call, whether chosen or not, as a dict name -> Site
            (activations), and ``compute_sites`` likewise.

    Raises:
        LayerError: after a complete pass of ``model``: a plain name in ``layers`` or ``ignore`` that no site has.
    """

    def __init__(
        self,
        model: nn.Module,
        activation: ActivationFn | None = None,
        compute: ComputeFn | None = None,
        *,
        layers: Selector | Iterable[Selector] | None = None,
        ignore: Selector | Iterable[Selector] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        self._activation = activation
        self._compute = compute
        self._layers = as_selectors(layers)
        self._ignore = as_selectors(ignore)
        self._checked = False
        self._decisions: dict[Site, bool] = {}
        self._handles: list[Any] = []
        self._modules: dict[str, nn.Module] = {}
        self.sites: dict[str, Site] = {}
        self.compute_sites: dict[str, Site] = {}

    def attach(self) -> ActivationTap:
        """Starts watching; attaching twice is the same as once."""
        if self._handles:
            return self
        # a module that is registered under two names runs under the first one
        self._modules = dict(self.model.named_modules())
        for path, module in self._modules.items():
            hook = _Hook(self, path)
            self._handles.append(module.register_forward_pre_hook(hook.before))
            self._handles.append(module.register_forward_hook(hook.after, always_call=True))
        return self

    def detach(self) -> None:
        """Stops watching and leaves the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ActivationTap:
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # -- internals

    def _state(self) -> _Pass:
        passes: dict[int, _Pass] = _PASSES.__dict__.setdefault("passes", {})
        state = passes.get(id(self))
        if state is None:
            state = passes[id(self)] = _Pass()
        return state

    def _before(self, path: str) -> None:
        state = self._state()
        if not state.stack:
            state.counts = {}
            state.mode = _Mode(self, state)
            state.mode.__enter__()  # type: ignore[no-untyped-call]
        state.stack.append(path)

    def _after(self, path: str, *, ok: bool) -> None:
        state = self._state()
        if not state.stack:
            return
        state.stack.pop()
        if not state.stack:
            mode, state.mode = state.mode, None
            _PASSES.passes.pop(id(self), None)
            if mode is not None:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if ok and path == "" and not self._checked:
                self._checked = True
                seen = [*self.sites.values(), *self.compute_sites.values()]
                check_names(self._layers, seen)
                check_names(self._ignore, seen)

    def _site(self, state: _Pass, family: str, kind: str, high: float | None) -> Site:
        path = state.stack[-1] if state.stack else ""
        n = state.counts.get((family, path), 0)
        state.counts[(family, path)] = n + 1
        name = (path or ROOT) + (f":{n}" if n else "")
        known = self.sites if family == "activation" else self.compute_sites
        site = known.get(name)
        if site is None or site.kind != kind:
            site = Site(name, kind, path, type(self._modules.get(path, self.model)).__name__, high)
            known[name] = site
        return site

    def _wanted(self, site: Site) -> bool:
        decision = self._decisions.get(site)
        if decision is None:
            module = self._modules.get(site.module)
            decision = not any(matches(site, module, s) for s in self._ignore or ()) and (
                self._layers is None or any(matches(site, module, s) for s in self._layers)
            )
            self._decisions[site] = decision
        return decision


class _Hook:
    """The two hooks of one module; a class, so that a hooked model still copies and pickles."""

    def __init__(self, tap: ActivationTap, path: str) -> None:
        self.tap = tap
        self.path = path

    def before(self, module: nn.Module, args: Any) -> None:
        self.tap._before(self.path)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        # with always_call a failed forward comes here with output None; a check must not hide its exception
        self.tap._after(self.path, ok=output is not None)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode inside the block; afterwards each module is in the mode it was in."""
    training = {m: m.training for m in model.modules()}
    with suppress(NotImplementedError):  # the module of an exported program has no modes
        model.eval()
    try:
        yield
    finally:
        for m, was in training.items():
            m.training = was


def run_model(model: nn.Module, example: Any) -> Any:
    """``model(example)`` where a tuple is several inputs and a dict keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    if isinstance(example, (tuple, list)):
        return model(*example)
    return model(example)


def find_sites(
    model: nn.Module,
    example: Any,
    *,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> tuple[list[Site], list[Site]]:
    """The activation sites and the computation sites that one pass of ``example`` meets, in order of execution.

    Args:
        example: the model's input: a tensor, a tuple of inputs or a dict of keyword arguments.
        layers, ignore: which to return (see the module's documentation).

    Raises:
        LayerError: a plain name in ``layers`` or ``ignore`` that no site has.
    """

    def watch(site: Site, value: Any) -> None:
        return None

    tap = ActivationTap(model, watch, watch)
    with tap, eval_mode(model), torch.no_grad():
        run_model(model, example)
    activations, computations = list(tap.sites.values()), list(tap.compute_sites.values())
    if layers is None and ignore is None:
        return activations, computations
    chosen = set(select_sites([*activations, *computations], model, layers, ignore))
    return [s for s in activations if s in chosen], [s for s in computations if s in chosen]
