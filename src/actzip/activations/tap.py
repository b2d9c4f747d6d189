"""The tap: a torch function mode around a model's forward pass, which sees every call in it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
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
from actzip.errors import ActzipError, InputError, UnsupportedError

__all__ = ["ActivationFn", "ActivationTap", "ComputeFn", "call_model", "eval_mode", "find_sites", "run_model"]

ActivationFn = Callable[[Site, Tensor], "Tensor | None"]
ComputeFn = Callable[[Site, ComputeCall], "Tensor | ComputeCall | None"]


class _Pass:
    """The state of one forward pass of one tap in one thread: the modules that are running,
    outermost first."""

    def __init__(self, mode: _Mode) -> None:
        self.stack: list[tuple[str, FrameType]] = []
        self.counts: dict[tuple[str, str], int] = {}
        self.mode = mode
        self.enabled = torch._C._is_torch_function_enabled()
        self.hush: Any = None

    def unseen(self) -> Any:
        """A block whose calls no tap sees: what a tap computes (a clamp, say) is no activation of
        the model."""
        self.hush = torch._C.DisableTorchFunction()
        return self.hush

    def end(self) -> None:
        """What the pass began is over, also where an interrupt kept a block from its own end."""
        if self.hush is not None and torch._C._is_torch_function_enabled() != self.enabled:
            self.hush.__exit__(None, None, None)
        while self.mode in torch.overrides._get_current_function_mode_stack():
            torch.overrides._pop_mode()  # type: ignore[no-untyped-call]


class _Passes(threading.local):
    """What runs in this thread: the passes by tap, and the module whose forward is about to be called."""

    def __init__(self) -> None:
        self.passes: dict[int, _Pass] = {}
        self.called: nn.Module | None = None

    def clear(self) -> None:
        """Modes of no pass go: PyTorch puts one back late where an interrupt met it as it set the
        mode aside."""
        running = [state.mode for state in self.passes.values()]
        while (stack := torch.overrides._get_current_function_mode_stack()) and (
            isinstance(stack[-1], _Mode) and stack[-1] not in running
        ):
            torch.overrides._pop_mode()  # type: ignore[no-untyped-call]


_PASSES = _Passes()


class _Mode(TorchFunctionMode):
    def __init__(self, tap: ActivationTap) -> None:
        super().__init__()
        self.tap = tap
        self.state = _Pass(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tap = self.tap
        if not self.state.stack:  # the pass is over
            return func(*args, **kwargs)
        known = calls.ATEN.get(func._schema.name, func) if isinstance(func, torch._ops.OpOverload) else func
        if tap._compute is not None and (known in calls.CONVOLUTIONS or known in calls.LINEARS):
            found = calls.compute_call(known, args, kwargs)
            if found is not None:
                kind, call = found
                site = tap._site(self.state, "compute", kind, None)
                if tap._wanted(site):
                    with self.state.unseen():
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
            # an in-place activation keeps its result for the backward pass, so it must not be
            # overwritten later: it works on a copy, and the caller's tensor gets the final values
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
            with self.state.unseen():
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

    Use it as a context manager, or :meth:`attach` and :meth:`detach`. Several taps may be attached
    to one model: the one attached first sees a map first. Forward passes may run in several
    threads.

    Args:
        model: any module; calls of the model and of its submodules on their own are both seen.
        activation: ``f(site, y)`` is called with the result ``y`` of each activation function
            (``N, C, H, W`` or any other shape; autograd is on as in the model); a tensor that it
            returns takes the place of ``y``.
        compute: ``f(site, call)`` is called before each convolution and linear with its operands; a
            tensor that it returns takes the place of the input, a :class:`ComputeCall` that of
            input and weight.
        layers, ignore: which sites, see the module's documentation.
        copied: whether copies and pickles of the model have the tap too.

    Attributes:
        sites: the sites seen so far, in order of first call, whether chosen or not, as a dict name -> Site
            (activations), and ``compute_sites`` likewise.

    Raises:
        LayerError: after a complete pass of ``model``: a plain name in ``layers`` or ``ignore``
            that no site has.
    """

    def __init__(
        self,
        model: nn.Module,
        activation: ActivationFn | None = None,
        compute: ComputeFn | None = None,
        *,
        layers: Selector | Iterable[Selector] | None = None,
        ignore: Selector | Iterable[Selector] | None = None,
        copied: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.model = model
        self.copied = copied
        self._activation = activation
        self._compute = compute
        self._layers = as_selectors(layers)
        self._ignore = as_selectors(ignore)
        self._checked = False
        self._decisions: dict[Site, bool] = {}
        self._watched: list[_Watched] = []
        self._modules: dict[str, nn.Module] = {}
        self.sites: dict[str, Site] = {}
        self.compute_sites: dict[str, Site] = {}

    def attach(self) -> ActivationTap:
        """Starts watching; attaching twice is the same as once.

        Raises:
            UnsupportedError: the model holds a ScriptModule, whose calls cannot be seen.
        """
        if self._watched:
            return self
        # a module that is registered under two names runs under the first one
        self._modules = dict(self.model.named_modules())
        script = next((n for n, m in self._modules.items() if isinstance(m, torch.jit.ScriptModule)), None)
        if script is not None:
            raise UnsupportedError(
                f"{script or 'the model'} is a ScriptModule, which hides what it computes; give "
                "the module it was made of"
            )
        try:
            for path, module in self._modules.items():
                found = module.__dict__.get("forward")
                watched = found if isinstance(found, _Watched) else _Watched(module)
                self._watched.append(watched)
                watched.watch(self, path)
            return self
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Stops watching and leaves the model as it was."""
        try:
            for watched in self._watched:
                watched.release(self)
        finally:  # where the first was interrupted
            for watched in self._watched:
                watched.release(self)
            self._watched = []
            self._leave(0)
            _PASSES.clear()

    def __enter__(self) -> ActivationTap:
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # -- internals

    def _depth(self) -> int:
        """How many modules of the current pass are running; what an interrupt left behind is cleared away."""
        state = _PASSES.passes.get(id(self))
        if state is None:
            return 0
        frame: FrameType | None = sys._getframe(1)
        while state.stack and frame is not None and frame is not state.stack[-1][1]:
            frame = frame.f_back
        if state.stack and frame is not None:
            return len(state.stack)
        self._leave(0)
        return 0

    def _enter(self, path: str, frame: FrameType) -> None:
        state = _PASSES.passes.get(id(self))
        if state is None:
            _PASSES.clear()
            state = _PASSES.passes[id(self)] = _Mode(self).state
            state.mode.__enter__()  # type: ignore[no-untyped-call]
        state.stack.append((path, frame))

    def _leave(self, depth: int) -> None:
        """Back to ``depth`` running modules; may be called again where an interrupt cut it short."""
        state = _PASSES.passes.get(id(self))
        if state is None:
            return
        if not depth:
            state.end()
            _PASSES.passes.pop(id(self), None)
        del state.stack[depth:]

    def _check(self) -> None:
        if not self._checked:
            self._checked = True
            seen = [*self.sites.values(), *self.compute_sites.values()]
            check_names(self._layers, seen)
            check_names(self._ignore, seen)

    def _site(self, state: _Pass, family: str, kind: str, high: float | None) -> Site:
        path = state.stack[-1][0] if state.stack else ""
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


class _Watched:
    """Stands before the forward of one module and tells the taps that watch it; it copies and
    pickles with the module.

    Forward hooks would not do: PyTorch calls none of them where a pass ends by KeyboardInterrupt or
    a cancelled task.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.taps: list[tuple[ActivationTap, str]] = []
        self.inner = module.__dict__.get("forward")
        self.handle: Any = None

    def watch(self, tap: ActivationTap, path: str) -> None:
        """The tap sees the calls of the module from here on."""
        self.taps.append((tap, path))
        if self.handle is None:
            self.module.__dict__["forward"] = self
            self.handle = self.module.register_forward_pre_hook(self.note)

    def release(self, tap: ActivationTap) -> None:
        """Forget the tap; after the last one the module is as it was."""
        self.taps = [(t, path) for t, path in self.taps if t is not tap]
        if self.taps:
            return
        for key in [k for k, hook in self.module._forward_pre_hooks.items() if hook == self.note]:
            del self.module._forward_pre_hooks[key]
        self.handle = None
        if self.module.__dict__.get("forward") is self:  # else somebody stands before it
            del self.module.__dict__["forward"]
            if self.inner is not None:
                self.module.__dict__["forward"] = self.inner

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "taps": [(tap, path) for tap, path in self.taps if tap.copied]}

    def note(self, module: nn.Module, args: Any) -> None:
        """The forward pre-hook: which module is called, which may be a replica that shares this object."""
        _PASSES.called = module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward(self.module))

    @property
    def __code__(self) -> CodeType:  # what torch.export looks at
        code: CodeType = self._forward(self.module).__code__
        return code

    def _forward(self, module: nn.Module) -> Callable[..., Any]:
        found: Callable[..., Any] = type(module).forward.__get__(module) if self.inner is None else self.inner
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _PASSES.called = _PASSES.called, None
        if (
            module is None or module.__dict__.get("forward") is not self
        ):  # forward() itself was called: not seen
            return self._forward(self.module)(*args, **kwargs)
        taps = self.taps
        depths = [(tap, tap._depth()) for tap, _ in taps]
        try:
            try:
                for tap, path in taps:
                    tap._enter(path, sys._getframe())
                result = self._forward(module)(*args, **kwargs)
            finally:
                for tap, depth in depths:
                    tap._leave(depth)
        finally:  # where the first was interrupted
            for tap, depth in depths:
                tap._leave(depth)
        for (tap, path), (_, depth) in zip(taps, depths):
            if not path and not depth:
                tap._check()
        return result


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode inside the block; afterwards each module is in the mode it was in."""
    training = {m: m.training for m in model.modules()}
    try:
        with suppress(NotImplementedError):  # the module of an exported program has no modes
            model.eval()
        yield
    finally:
        try:
            _put_back(training)
        finally:  # where the first was interrupted
            _put_back(training)


def _put_back(training: dict[nn.Module, bool]) -> None:
    for m, was in training.items():
        m.__dict__["training"] = was


def call_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``model(*args, **kwargs)``.

    Raises:
        InputError: the model itself raises; the message has its words, and what it was given. What
            actzip's own code raises inside is passed on as it is.
    """
    try:
        return model(*args, **kwargs)
    except (ActzipError, MemoryError):
        raise
    except Exception as error:
        if _is_ours(error):
            raise
        given = ", ".join([*map(_described, args), *(f"{k}={_described(v)}" for k, v in kwargs.items())])
        raise InputError(
            f"the model does not take {given}{_other_dtype(model, (*args, *kwargs.values()))}: "
            f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        ) from error


#: Packages whose frames lie in a user's pass without computing anything of ours.
_LENT = ("actzip.activations.tap", "actzip.models")


def _is_ours(error: BaseException) -> bool:
    """Whether the error comes from code of actzip that a pass runs, not from the model."""
    at, ours = error.__traceback__, False
    while at is not None:
        name = at.tb_frame.f_globals.get("__name__", "")
        ours = ours or (name.startswith("actzip.") and not name.startswith(_LENT))
        at = at.tb_next
    return ours


def _described(value: Any) -> str:
    if isinstance(value, Tensor) and not value.is_nested:
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def _other_dtype(model: nn.Module, values: Iterable[Any]) -> str:
    """A hint where no tensor of ``values`` has the dtype that the model computes in."""
    want = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    kinds = [v.dtype for v in values if isinstance(v, Tensor)]
    if want is None or not kinds or want in kinds:
        return ""
    name = str(want).removeprefix("torch.")
    return f" (it computes in {name}: convert the inputs, x.to(torch.{name}), or the model)"


def run_model(model: nn.Module, example: Any) -> Any:
    """``model(example)`` where a tuple is several inputs and a dict keyword arguments.

    Raises:
        InputError: the model does not take ``example`` (:func:`call_model`).
    """
    if isinstance(example, dict):
        return call_model(model, (), example)
    if isinstance(example, (tuple, list)):
        return call_model(model, tuple(example), {})
    return call_model(model, (example,), {})


def find_sites(
    model: nn.Module,
    example: Any,
    *,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> tuple[list[Site], list[Site]]:
    """The activation sites and the computation sites that one pass of ``example`` meets, in order
    of execution.

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
