"""How activation maps are found, watched and changed, in any ``nn.Module``, without touching its code.

A :class:`ActivationTap` puts a torch function mode around the model's forward pass. It therefore sees every
call, whether it comes from a module (``nn.ReLU``), a function (``F.relu``, ``torch.clamp``) or a method, in place
or not, and can put another tensor in the place of its result. The model's class, ``state_dict`` and code stay
as they are. Everything else of the project (penalties, thresholds, quantizers, the profiler) stands on this.

Names of sites
    A site is one activation (or one convolution or linear) call of a forward pass. Its name is the path of the
    innermost module that runs it, as in ``named_modules()``; later calls of the same kind inside the same module
    in the same pass get ``:1``, ``:2`` ... So ``nn.ReLU`` called ``layer1.0.relu`` twice gives
    ``layer1.0.relu`` and ``layer1.0.relu:1``; a functional ``F.relu`` in ``Conv2d_1a_3x3`` gives that name. Calls in
    the root module itself are named ``(model)``. Activations and computations are counted apart.

Choosing sites
    ``layers`` and ``ignore`` take any mix of: an exact name, a glob (``layer1.*``), a regular expression (``re:...``,
    full match), a module type (``nn.ReLU``, matched against the innermost module) or its class name (``type:ReLU``).
    ``ignore`` wins. A plain name that no site has raises :class:`~actzip.errors.LayerError` with near matches.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actzip.errors import DataError, InputError, LayerError

__all__ = [
    "ROOT",
    "ActivationFn",
    "ActivationTap",
    "ComputeCall",
    "ComputeFn",
    "Selector",
    "Site",
    "clear_thresholds",
    "count_macs",
    "find_sites",
    "get_thresholds",
    "load_thresholds",
    "output_size",
    "select_sites",
    "set_thresholds",
    "threshold_activation",
    "without_thresholds",
]

#: Name of the root module in site names.
ROOT = "(model)"

Selector = Union[str, type[nn.Module]]


@dataclass(frozen=True)
class Site:
    """One activation or computation call of a forward pass: its name, kind and the module that runs it.

    Attributes:
        name: see "Names of sites" in the module's documentation.
        kind: ``relu``, ``relu6`` (clipped to [0, 6] or any [0, hi]), ``threshold``, or for activations that are not
            zero for half of their inputs their own name (``silu``, ``gelu``, ``leaky_relu`` ...); for computations
            ``conv1d`` .. ``conv3d``, ``conv_transpose1d`` .. ``conv_transpose3d`` or ``linear``.
        module: path of the innermost module (``""`` for the root).
        module_type: class name of that module.
        high: upper clip value (``relu6``), else None.
    """

    name: str
    kind: str
    module: str
    module_type: str
    high: float | None = field(default=None, compare=False)

    @property
    def sparse(self) -> bool:
        """True for activations that give exact zeros and can be made sparser (ReLU and its kin)."""
        return self.kind in ("relu", "relu6", "threshold")


@dataclass(frozen=True)
class ComputeCall:
    """The operands of one convolution or linear call, normalised.

    Attributes:
        input: ``N, C, *spatial`` (convolutions, batch dimension always there) or ``..., features`` (linear).
        weight: as the operator has it: ``OC, IC / groups, *kernel`` (transposed: ``IC, OC / groups, *kernel``), or
            ``out, in``.
        stride, padding, dilation, output_padding: one int a spatial dimension; ``padding`` holds (before, after).
        groups: number of groups.
        transposed: a transposed convolution.
    """

    input: Tensor
    weight: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False


ActivationFn = Callable[[Site, Tensor], "Tensor | None"]
ComputeFn = Callable[[Site, ComputeCall], "Tensor | ComputeCall | None"]


# --- which functions are activations ------------------------------------------------------------------------------

_RELU = {torch.relu, torch.relu_, F.relu, Tensor.relu, Tensor.relu_}
_RELU6 = {F.relu6, torch.nn.functional.relu6}
_HARDTANH = {F.hardtanh, F.hardtanh_}
_THRESHOLD = {F.threshold, getattr(F, "threshold_"), torch.threshold, torch.threshold_}
_CLAMP = {
    torch.clamp,
    torch.clamp_,
    torch.clip,
    torch.clip_,
    Tensor.clamp,
    Tensor.clamp_,
    Tensor.clip,
    Tensor.clip_,
}
_CLAMP_MIN = {torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_}
_OTHER: dict[Any, str] = {
    F.silu: "silu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.prelu: "prelu",
    torch.prelu: "prelu",
    F.elu: "elu",
    F.elu_: "elu",
    F.selu: "selu",
    F.celu: "celu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.softplus: "softplus",
    F.mish: "mish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
}

_CONV: dict[Any, tuple[str, bool]] = {
    torch.conv1d: ("conv1d", False),
    torch.conv2d: ("conv2d", False),
    torch.conv3d: ("conv3d", False),
    F.conv1d: ("conv1d", False),
    F.conv2d: ("conv2d", False),
    F.conv3d: ("conv3d", False),
    torch.conv_transpose1d: ("conv_transpose1d", True),
    torch.conv_transpose2d: ("conv_transpose2d", True),
    torch.conv_transpose3d: ("conv_transpose3d", True),
    F.conv_transpose1d: ("conv_transpose1d", True),
    F.conv_transpose2d: ("conv_transpose2d", True),
    F.conv_transpose3d: ("conv_transpose3d", True),
}
_LINEAR = {F.linear}
#: What the operators of exported programs are called in ``torch``.
_ATEN: dict[str, Any] = {
    f"aten::{name}": found
    for name in (
        "relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_", "threshold", "threshold_", "prelu", "sigmoid", "tanh",
        "relu6", "hardtanh", "hardtanh_", "silu", "gelu", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu",
        "hardswish", "hardsigmoid", "softplus", "mish", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "linear",
    )
    if (found := getattr(torch, name, None) or getattr(F, name, None)) is not None
}  # fmt: skip
_ATEN |= {f"aten::{n}": getattr(F, n) for n in ("selu", "celu")}
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_T_ARGS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _arg(args: Sequence[Any], kwargs: dict[str, Any], index: int, *names: str, default: Any = None) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[index] if len(args) > index else default


def _with_arg(
    args: Any, kwargs: dict[str, Any], index: int, name: str, value: Any
) -> tuple[Any, dict[str, Any]]:
    """The arguments with another value in one place."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:index], value, *args[index + 1 :]), kwargs


def _activation_kind(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, float | None] | None:
    """The kind and upper clip of an activation call, or None where the call is not an activation."""
    if func in _RELU:
        return "relu", None
    if func in _RELU6:
        return "relu6", 6.0
    if func in _HARDTANH:
        low = _arg(args, kwargs, 1, "min_val", default=-1.0)
        high = _arg(args, kwargs, 2, "max_val", default=1.0)
        return ("relu6", float(high)) if low == 0 and high > 0 else ("hardtanh", None)
    if func in _THRESHOLD:
        cut = _arg(args, kwargs, 1, "threshold")
        value = _arg(args, kwargs, 2, "value")
        return ("threshold", None) if value == 0 and cut is not None and cut >= 0 else None
    if func in _CLAMP:
        low = _arg(args, kwargs, 1, "min")
        high = _arg(args, kwargs, 2, "max")
        if isinstance(low, (int, float)) and low == 0:
            if high is None:
                return "relu", None
            if isinstance(high, (int, float)) and high > 0:
                return "relu6", float(high)
        return None
    if func in _CLAMP_MIN:
        low = _arg(args, kwargs, 1, "min")
        return ("relu", None) if isinstance(low, (int, float)) and low == 0 else None
    kind = _OTHER.get(func)
    return None if kind is None else (kind, None)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    values = tuple(int(v) for v in value)
    return values * n if len(values) == 1 and n > 1 else values


def _compute_call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, ComputeCall] | None:
    if func in _LINEAR:
        x = _arg(args, kwargs, 0, "input")
        return "linear", ComputeCall(x, _arg(args, kwargs, 1, "weight"))
    found = _CONV.get(func)
    if found is None:
        return None
    kind, transposed = found
    order = _CONV_T_ARGS if transposed else _CONV_ARGS
    values = dict(zip(order, args)) | kwargs
    x, weight = values["input"], values["weight"]
    dims = weight.dim() - 2
    if x.dim() == dims + 1:  # unbatched
        x = x.unsqueeze(0)
    stride = _tuple(values.get("stride", 1), dims)
    dilation = _tuple(values.get("dilation", 1), dims)
    padding = values.get("padding", 0)
    if padding == "valid":
        pads: tuple[tuple[int, int], ...] = ((0, 0),) * dims
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        pads = tuple((t // 2, t - t // 2) for t in totals)
    else:
        pads = tuple((p, p) for p in _tuple(padding, dims))
    return kind, ComputeCall(
        x,
        weight,
        stride,
        pads,
        dilation,
        _tuple(values.get("output_padding", 0), dims),
        int(values.get("groups", 1)),
        transposed,
    )


# --- choosing sites -----------------------------------------------------------------------------------------------


def _matches(site: Site, module: nn.Module | None, selector: Selector) -> bool:
    if isinstance(selector, str):
        if selector.startswith("re:"):
            return re.fullmatch(selector[3:], site.name) is not None
        if selector.startswith("type:"):
            return site.module_type == selector[5:]
        return site.name == selector or fnmatch.fnmatchcase(site.name, selector)
    return module is not None and isinstance(module, selector)


def _as_list(selectors: Selector | Iterable[Selector] | None) -> list[Selector] | None:
    if selectors is None:
        return None
    chosen: list[Selector] = [selectors] if isinstance(selectors, (str, type)) else list(selectors)
    for s in chosen:
        if isinstance(s, str):
            if s.startswith("re:"):
                try:
                    re.compile(s[3:])
                except re.error as error:
                    raise InputError(f"layer selector {s!r} is not a regular expression: {error}") from error
        elif not (isinstance(s, type) and issubclass(s, nn.Module)):
            raise InputError(
                f"a layer selector is a name, a glob, 're:...', 'type:...' or a module type, not {s!r}"
            )
    return chosen


def _check_names(selectors: list[Selector] | None, sites: Iterable[Site]) -> None:
    names = [s.name for s in sites]
    for s in selectors or ():
        if not isinstance(s, str) or s.startswith(("re:", "type:")) or any(c in s for c in "*?["):
            continue
        if s not in names:
            near = difflib.get_close_matches(s, names, n=3, cutoff=0.4)
            hint = f"; near matches: {', '.join(near)}" if near else f"; there are {len(names)} sites"
            raise LayerError(f"the model has no layer {s!r}{hint}")


def select_sites(
    sites: Iterable[Site],
    model: nn.Module | None = None,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> list[Site]:
    """The sites that ``layers`` names (all where it is None) and ``ignore`` does not.

    Raises:
        LayerError: a plain name in ``layers`` or ``ignore`` that no site has; the message names near matches.
        InputError: a selector that is neither a name, a pattern nor a module type.
    """
    all_sites = list(sites)
    modules = dict(model.named_modules()) if model is not None else {}
    wanted, unwanted = _as_list(layers), _as_list(ignore)
    _check_names(wanted, all_sites)
    _check_names(unwanted, all_sites)

    def keep(site: Site) -> bool:
        module = modules.get(site.module)
        if any(_matches(site, module, s) for s in unwanted or ()):
            return False
        return wanted is None or any(_matches(site, module, s) for s in wanted)

    return [s for s in all_sites if keep(s)]


# --- the tap ------------------------------------------------------------------------------------------------------


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
        known = _ATEN.get(func._schema.name, func) if isinstance(func, torch._ops.OpOverload) else func
        if tap._compute is not None and (known in _CONV or known in _LINEAR):
            found = _compute_call(known, args, kwargs)
            if found is not None:
                kind, call = found
                site = tap._site(self.state, "compute", kind, None)
                if tap._wanted(site):
                    with _no_modes():
                        replaced = tap._compute(site, call)
                    if isinstance(replaced, ComputeCall):  # another input and another weight
                        args, kwargs = _with_arg(args, kwargs, 1, "weight", replaced.weight)
                        replaced = replaced.input
                    if (
                        replaced is not None and replaced is not call.input
                    ):  # another input for this computation
                        args, kwargs = _with_arg(args, kwargs, 0, "input", replaced)
        if tap._activation is not None:
            try:
                activation = _activation_kind(known, args, kwargs)
            except TypeError:  # an unhashable callable
                activation = None
            if activation is not None:
                return self._activate(func, known, args, kwargs, *activation)
        return func(*args, **kwargs)

    def _activate(self, func: Any, known: Any, args: Any, kwargs: Any, kind: str, high: float | None) -> Any:
        tap = self.tap
        target = _arg(args, kwargs, 0, "input", "self")
        in_place = _in_place(known, args, kwargs)
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


def _in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    index = {"relu": 1, "relu6": 1, "hardtanh": 3, "threshold": 3, "silu": 1, "elu": 2, "leaky_relu": 2}.get(
        name
    )
    if index is None or getattr(func, "__module__", "") != "torch.nn.functional":
        return bool(kwargs.get("inplace", False))
    return bool(_arg(args, kwargs, index, "inplace", default=False))


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
        self._layers = _as_list(layers)
        self._ignore = _as_list(ignore)
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
                _check_names(self._layers, seen)
                _check_names(self._ignore, seen)

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
            decision = not any(_matches(site, module, s) for s in self._ignore or ()) and (
                self._layers is None or any(_matches(site, module, s) for s in self._layers)
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
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {m: m.training for m in model.modules()}
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
    with tap, _eval_mode(model), torch.no_grad():
        run_model(model, example)
    activations, computations = list(tap.sites.values()), list(tap.compute_sites.values())
    if layers is None and ignore is None:
        return activations, computations
    chosen = set(select_sites([*activations, *computations], model, layers, ignore))
    return [s for s in activations if s in chosen], [s for s in computations if s in chosen]


# --- counting -----------------------------------------------------------------------------------------------------


def _uses(size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int) -> list[int]:
    """For each input index along one axis, how many (output position, tap) pairs read it."""
    out = (size + pad[0] + pad[1] - dilation * (kernel - 1) - 1) // stride + 1
    uses = [0] * size
    for tap in range(kernel):
        offset = tap * dilation - pad[0]
        for o in range(out):
            i = o * stride + offset
            if 0 <= i < size:
                uses[i] += 1
    return uses


def _uses_transposed(
    size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int, extra: int
) -> tuple[list[int], int]:
    out = (size - 1) * stride - pad[0] - pad[1] + dilation * (kernel - 1) + extra + 1
    return [
        sum(0 <= i * stride - pad[0] + tap * dilation < out for tap in range(kernel)) for i in range(size)
    ], out


def output_size(call: ComputeCall) -> tuple[int, ...]:
    """Height, width ... of a convolution's output; empty for a linear call."""
    out = []
    for axis, size in enumerate(call.input.shape[2:] if call.stride else ()):
        s, (before, after), d = call.stride[axis], call.padding[axis], call.dilation[axis]
        reach = d * (int(call.weight.shape[2 + axis]) - 1)
        if call.transposed:
            out.append((int(size) - 1) * s - before - after + reach + call.output_padding[axis] + 1)
        else:
            out.append((int(size) + before + after - reach - 1) // s + 1)
    return tuple(out)


def count_macs(call: ComputeCall) -> tuple[int, int, int]:
    """(MACs, border MACs, effective MACs) of one convolution or linear call, counted exactly.

    MACs is the usual count: output elements times the inputs of each, padding included. Border MACs are those of
    them whose activation operand is padding. Effective MACs are those whose activation operand is an element of the
    input and not zero (NaN counts as non-zero); stride, dilation, groups and borders are counted position by
    position. So effective MACs <= MACs - border MACs, with equality at density 1. The theoretical speed-up is MACs /
    effective MACs. For transposed convolutions, MACs is input elements times taps times output channels a group, and
    border MACs are those that fall outside the output.
    """
    x, weight = call.input, call.weight
    if weight.dim() == 2 and not call.stride:
        out_features, features = int(weight.shape[0]), int(weight.shape[1])
        rows = x.numel() // features if features else 0
        return rows * features * out_features, 0, int(torch.count_nonzero(x)) * out_features
    spatial = [int(s) for s in x.shape[2:]]
    kernel = [int(k) for k in weight.shape[2:]]
    n, channels = int(x.shape[0]), int(x.shape[1])
    axes: list[list[int]] = []
    positions = 1
    for axis, size in enumerate(spatial):
        s, p, d, k = call.stride[axis], call.padding[axis], call.dilation[axis], kernel[axis]
        if call.transposed:
            uses, _ = _uses_transposed(size, k, s, p, d, call.output_padding[axis])
            positions *= size * k
        else:
            uses = _uses(size, k, s, p, d)
            positions *= ((size + p[0] + p[1] - d * (k - 1) - 1) // s + 1) * k
        axes.append(uses)
    out_per_group = int(weight.shape[1]) if call.transposed else int(weight.shape[0]) // call.groups
    macs = n * channels * positions * out_per_group
    inside = n * channels * out_per_group
    for uses in axes:
        inside *= sum(uses)
    counts = (x.detach() != 0).sum(dim=(0, 1), dtype=torch.int64)
    for uses in reversed(axes):
        counts = (counts * torch.tensor(uses, dtype=torch.int64, device=counts.device)).sum(-1)
    return macs, macs - inside, int(counts) * out_per_group


# --- thresholded ReLU ---------------------------------------------------------------------------------------------


class _Keep(torch.autograd.Function):
    """``y`` where ``y > t``, else 0, in vectorised passes: ``where`` over a broadcast mask takes ten times as long."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
        # the sign of a rounded difference is that of the comparison, and threshold_backward keeps y beside a NaN
        kept = torch.ops.aten.threshold_backward(y, y - t, 0)
        ctx.save_for_backward(kept)
        return kept  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.ops.aten.threshold_backward(grads[0], ctx.saved_tensors[0], 0), None


def threshold_activation(y: Tensor, threshold: float | Tensor) -> Tensor:
    """0 where ``y <= threshold``, else ``y`` (FATReLU: Kurtz et al., ICML 2020, section 3).

    NaN stays NaN, as through ``torch.relu`` and ``torch.nn.Threshold``: a broken input shows in the output.

    Args:
        y: output of a ReLU, ``N, C, *``.
        threshold: one number, or one a channel (shape ``C``; dimension 1 of ``y``).
    """
    if isinstance(threshold, Tensor) and threshold.dim() == 1:
        threshold = threshold.to(y.dtype).reshape(1, -1, *([1] * (y.dim() - 2)))
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if y.requires_grad and torch.is_grad_enabled() and not traced:
            return _Keep.apply(y, threshold)  # type: ignore[no-any-return,no-untyped-call]
    return torch.where(y <= threshold, torch.zeros((), dtype=y.dtype, device=y.device), y)


class _Thresholds:
    """What a thresholded model carries: a permanent tap whose thresholds are looked up at each call."""

    def __init__(self, values: dict[str, float | Tensor]) -> None:
        self.values = values

    def __call__(self, site: Site, y: Tensor) -> Tensor | None:
        t = self.values.get(site.name)
        return None if t is None else threshold_activation(y, t)


def set_thresholds(model: nn.Module, thresholds: dict[str, float | Tensor], example: Any = None) -> nn.Module:
    """Makes the named ReLUs of ``model`` thresholded ones, in place: 0 if x <= T else x.

    The model's ``state_dict`` and class stay as they are: the thresholds are kept beside it in
    ``model._actzip_thresholds`` (a dict from site name to a float, or a tensor with one a channel) and are applied
    at every forward pass. Calling it again replaces them; :func:`clear_thresholds` removes them.

    Args:
        example: an input; where it is given the names are checked against the sites that it meets.

    Raises:
        InputError: a threshold is negative or not finite.
        LayerError: ``example`` is given and does not meet a named site, or the site is not a ReLU.
    """
    values: dict[str, float | Tensor] = {}
    for name, t in thresholds.items():
        if isinstance(t, Tensor):
            t = t.detach().clone().to(torch.float32)
            if t.dim() > 1:
                raise InputError(
                    f"threshold of {name!r} has shape {tuple(t.shape)}; it is one number, or one a channel"
                )
            bad = not bool(torch.isfinite(t).all()) or bool((t < 0).any())
        else:
            t = float(t)
            bad = not (0 <= t < float("inf"))
        if bad:
            raise InputError(f"threshold of {name!r} must be finite and >= 0")
        values[name] = t
    if example is not None:
        sites = {s.name: s for s in find_sites(model, example)[0]}
        _check_names(list(values), sites.values())
        for name in values:
            if not sites[name].sparse:
                raise LayerError(
                    f"layer {name!r} is a {sites[name].kind}, which has no zeros; a threshold needs a ReLU"
                )
    clear_thresholds(model)
    if values:
        tap = ActivationTap(model, _Thresholds(values)).attach()
        model._actzip_thresholds = values  # type: ignore[assignment]
        model._actzip_threshold_tap = tap  # type: ignore[assignment]
    return model


def get_thresholds(model: nn.Module) -> dict[str, float | Tensor]:
    """The thresholds of :func:`set_thresholds`, by site name; empty where there are none."""
    return dict(getattr(model, "_actzip_thresholds", {}))


def load_thresholds(path: str | os.PathLike[str]) -> dict[str, float | Tensor]:
    """The thresholds in a JSON file, as ``actzip reproduce`` writes them (``NAME.thresholds.json``), for :func:`set_thresholds`.

    Raises:
        DataError: the file cannot be read, is not JSON, or is no object of numbers and lists of numbers.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON file: {error}") from error
    plain = isinstance(found, dict) and all(
        isinstance(t, (int, float))
        or (isinstance(t, list) and t and all(isinstance(v, (int, float)) for v in t))
        for t in found.values()
    )
    if not plain:
        raise DataError(f"{path}: an object of thresholds is needed, {{site: number or list of numbers}}")
    return {k: torch.tensor(t) if isinstance(t, list) else float(t) for k, t in found.items()}


def clear_thresholds(model: nn.Module) -> None:
    """Makes the ReLUs of ``model`` ordinary ones again."""
    tap = model.__dict__.pop("_actzip_threshold_tap", None)
    if tap is not None:
        tap.detach()
    model.__dict__.pop("_actzip_thresholds", None)


@contextmanager
def without_thresholds(model: nn.Module) -> Iterator[dict[str, float | Tensor]]:
    """The model without its thresholds (and without hooks) inside the block, which is given them as a dict."""
    values = get_thresholds(model)
    clear_thresholds(model)
    try:
        yield values
    finally:
        if values:
            set_thresholds(model, values)
