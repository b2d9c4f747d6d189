"""``torch.compile(model, backend="actzip")``: whole graphs where the engine has every operator,
else the largest parts.

Registered through the ``torch_dynamo_backends`` entry point, so nothing has to be imported.
Inference runs on the engine; a graph that needs gradients, another device or another type than
float32 is left to PyTorch, with one warning that says why. The batch may change without a new
compilation of the engine, also where torch.compile traces the model again. Weights that change
afterwards (an optimiser's step, ``load_state_dict``, another tensor in their place) are noticed,
and the engine is made again; only writing through ``weight.data`` in place is not, as nothing tells
of it.
"""

from __future__ import annotations

import operator
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from actzip.errors import ActzipError, ActzipWarning, UnsupportedError
from actzip.runtime.blame import reasons
from actzip.runtime.program_parts import Closed, engine_of, growing, parts_of, trace_closed

__all__ = ["backend", "effect_of", "last_report", "reports"]

_REPORTS: deque[dict[str, Any]] = deque(maxlen=256)
#: Why a graph is left to PyTorch that holds weights of its own: their changes would go unnoticed.
_INSIDE = (
    "its weights lie inside the graph (torch._dynamo.config.inline_inbuilt_nn_modules = True, the default "
    "from PyTorch 2.5 on, hands them over)"
)


def reports() -> list[dict[str, Any]]:
    """What became of the graphs that torch.compile handed over in this process, oldest first (the
    last 256): see :func:`last_report`."""
    return [dict(r) for r in _REPORTS]


def last_report() -> dict[str, Any]:
    """What became of the last graph that torch.compile handed over: ``mode`` (whole, parts, eager),
    ``why``, ``parts``."""
    return dict(_REPORTS[-1]) if _REPORTS else {}


def _source(node: fx.Node) -> Any:
    arg = node.meta.get("grapharg")
    return getattr(arg, "source", None)


def _name(source: Any) -> str:
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _close(gm: fx.GraphModule, examples: Sequence[Any]) -> tuple[Closed, list[int], list[int]]:
    """The closed module, the positions of its inputs among the arguments, and those of the static tensors.

    Raises:
        UnsupportedError: an argument that is neither a tensor nor a size of one.
    """
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    static: list[Tensor] = []
    places: list[int] = []
    dynamic: list[int] = []
    by_source: dict[str, int] = {}
    plan: list[tuple[str, int, int]] = []
    later: list[tuple[int, Any]] = []
    for position, (node, value) in enumerate(zip(nodes, examples, strict=True)):
        if isinstance(value, Tensor):
            if (
                isinstance(value, nn.Parameter)
                or getattr(value, "_dynamo_static_input_type", None) is not None
            ):
                plan.append(("static", len(static), 0))
                static.append(value)
                places.append(position)
            else:
                by_source[_name(_source(node))] = len(dynamic)
                plan.append(("tensor", len(dynamic), 0))
                dynamic.append(position)
        elif isinstance(value, (torch.SymInt, int)):
            later.append((len(plan), _source(node)))
            plan.append(("size", -1, -1))
        else:
            raise UnsupportedError(f"an argument of type {type(value).__name__}")
    for place, source in later:
        base, index = getattr(source, "base", None), getattr(source, "idx", None)
        owner = by_source.get(_name(base)) if base is not None else None
        if owner is None or index is None:
            raise UnsupportedError("a symbolic number that is no dimension of an input")
        plan[place] = ("size", owner, int(index))
    return Closed(gm, plan, static), dynamic, places


def _real(value: Any) -> Tensor:
    """A real tensor like an example: its own numbers where it has some, random ones where it is a
    fake tensor."""
    from torch._subclasses.fake_tensor import FakeTensor

    shape = [int(d) for d in value.shape]
    if isinstance(value, FakeTensor) or not value.is_floating_point():
        own = torch.Generator().manual_seed(0)  # the caller's stays as it is
        drawn: torch.Tensor = torch.randn(shape, generator=own).to(value.dtype)
        return drawn
    copied: torch.Tensor = value.detach().clone()
    return copied


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend: see the module's documentation.

    Args:
        options: given to :func:`actzip.compile` (``threads`` ...).
        mode: torch.compile's; ignored.
    """
    chosen = dict(options or {})
    tensors = [v for v in example_inputs if isinstance(v, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _eager(
            gm,
            "gradients are wanted (use torch.no_grad() or torch.inference_mode() for inference)",
            quiet=_training(gm),
        )
    for t in tensors:
        if t.device.type != "cpu":
            return _eager(gm, f"a tensor is on {t.device}; the engine runs on the CPU")
    if _training(gm):
        return _eager(gm, "the model is in training mode", quiet=True)
    if any(True for kept in (gm.parameters(), gm.buffers()) for _ in kept):
        return _eager(gm, _INSIDE)
    try:
        closed, dynamic, places = _close(gm, example_inputs)
    except UnsupportedError as error:
        return _eager(gm, str(error))
    if not dynamic:
        return _eager(gm, "the graph has no tensor input", quiet=True)
    runner = _Runner(gm, closed.plan, dynamic, places, chosen)
    static = [example_inputs[i] for i in places]
    examples = tuple(_real(example_inputs[i]) for i in dynamic)
    try:
        report = runner.add(static, examples)
    except Exception as error:
        return _eager(gm, f"{type(error).__name__}: {error}")
    if report["mode"] == "eager":
        return _eager(gm, str(report["why"]))
    _REPORTS.append(report)
    _RUNNERS.append(weakref.ref(runner))
    return runner


@dataclass
class _Built:
    """An engine with what it was made for: these weights, as they were then, and inputs of these
    shapes, the first dimension of those that grow with the batch aside."""

    call: Callable[..., Any]
    static: list[Tensor]
    stamps: list[tuple[int, int]]
    shapes: list[torch.Size]
    grows: list[bool]
    batches: tuple[int, int | None]
    report: dict[str, Any]

    def fits(self, static: Sequence[Tensor], shapes: list[torch.Size]) -> bool:
        return (
            all(
                a == b or (g and a[1:] == b[1:] and len(a) == len(b) and self._holds(a[0]))
                for a, b, g in zip(shapes, self.shapes, self.grows, strict=True)
            )
            and all(map(operator.is_, static, self.static))
            and all(_stamp(t) == s for t, s in zip(static, self.stamps, strict=True))
        )

    def _holds(self, n: int) -> bool:
        least, most = self.batches
        return least <= n and (most is None or n <= most)


def _stamp(t: Tensor) -> tuple[int, int]:
    """Another one once a tensor was written to in place or got other storage (tensors of inference
    mode tell only the latter)."""
    return (-1 if t.is_inference() else t._version), t.data_ptr()


class _Runner:
    """The compiled graph: picks the tensors out of the arguments, and the engine that was made for such ones.

    torch.compile calls a graph with other weights too (another instance of the module) and, once it
    took sizes for symbols, with other heights and widths: each gets an engine of its own, the last
    few are kept. Where another runner of the same computation has an engine that fits it is taken:
    that torch.compile traced again for another batch makes none.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        plan: list[tuple[str, int, int]],
        dynamic: list[int],
        places: list[int],
        options: dict[str, Any],
    ) -> None:
        self.gm = gm
        self.plan = plan
        self.dynamic = dynamic
        self.places = places
        self.options = options
        self.text = _text(gm, plan)
        self.engines: deque[_Built] = deque(maxlen=_KEPT)
        self.seen: set[tuple[torch.Size, ...]] = set()
        self.lock = threading.Lock()

    def add(self, static: list[Tensor], examples: tuple[Tensor, ...]) -> dict[str, Any]:
        """Takes or makes the engine for such tensors; what became of it."""
        shapes = [t.shape for t in examples]
        for other in self._kin():
            for built in tuple(other.engines):
                if built.fits(static, shapes):
                    self.engines.appendleft(built)
                    return {**built.report, "reused": True}
        closed = Closed(self.gm, self.plan, static)
        stamps = [_stamp(t) for t in static]
        call, report, grows, batches = _apart(_build)(closed, examples, self.options)
        if report["mode"] != "eager":
            for old in tuple(self.engines):
                if all(map(operator.is_, static, old.static)) and old.stamps != stamps:
                    self.engines.remove(old)  # of weights that are no more
            self.engines.appendleft(_Built(call, static, stamps, shapes, grows, batches, report))
        return dict(report)

    def _kin(self) -> list[_Runner]:
        """Living runners of the same computation."""
        found = [self]
        if self.text is not None:
            others = [r for ref in tuple(_RUNNERS) if (r := ref()) is not None and r is not self]
            found += [r for r in others if r.options == self.options and r.text == self.text]
        return found

    def __call__(self, *args: Any) -> Any:
        inputs = [args[i] for i in self.dynamic]
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return self.gm(*args)
        static = [args[i] for i in self.places]
        shapes = [t.shape for t in inputs]
        for built in tuple(self.engines):
            if built.fits(static, shapes):
                return built.call(*inputs)
        self.seen.add(tuple(shapes))
        if len(self.seen) > _MOST_SHAPES:
            warnings.warn(
                f"torch.compile backend actzip leaves a graph to PyTorch: more than {_MOST_SHAPES} "
                "sizes of its inputs",
                ActzipWarning,
                stacklevel=2,
            )
            return self.gm(*args)
        with self.lock:
            report = self.add(static, tuple(t.detach().clone() for t in inputs))
            call = self.gm if report["mode"] == "eager" else self.engines[0].call
        return call(*(args if call is self.gm else inputs))


_KEPT = 8
_MOST_SHAPES = 64
_RUNNERS: deque[weakref.ref[_Runner]] = deque(maxlen=64)


def _text(gm: fx.GraphModule, plan: list[tuple[str, int, int]]) -> Any:
    """What the graph computes, to be compared with another's: operators and arguments, nodes by
    number. Sizes that nothing uses do not count, so a graph traced for one batch may equal one for
    any. None where it holds tensors or modules of its own."""
    numbers: dict[fx.Node, int] = {}

    def value(v: Any) -> Any:
        if isinstance(v, fx.Node):
            return ("node", numbers[v])
        if isinstance(v, (tuple, list)):
            return (type(v).__name__, *(value(x) for x in v))
        if isinstance(v, dict):
            return ("dict", *((k, value(x)) for k, x in v.items()))
        if isinstance(v, slice):
            return ("slice", value(v.start), value(v.stop), value(v.step))
        return (type(v), v)

    lines: list[Any] = []
    places = iter(plan)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            place = next(places)
            if place[0] == "size" and not node.users:
                continue
            lines.append(("input", place))
        elif node.op in ("call_function", "call_method", "output"):
            lines.append((node.op, node.target, value(node.args), value(node.kwargs)))
        else:
            return None
        numbers[node] = len(numbers)
    return lines


def _training(gm: fx.GraphModule) -> bool:
    """Whether an operator of the graph acts as in training: dropout, batch statistics."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name in (
            "dropout",
            "dropout2d",
            "batch_norm",
            "feature_dropout",
            "alpha_dropout",
        ):
            position = {"batch_norm": 5}.get(name, 2)
            flag = node.kwargs.get(
                "training", node.args[position] if len(node.args) > position else name != "batch_norm"
            )
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            if flag is True and (name == "batch_norm" or p != 0):
                return True
    return False


def _eager(gm: fx.GraphModule, why: str, *, quiet: bool = False) -> Callable[..., Any]:
    _REPORTS.append({"mode": "eager", "why": why, "parts": 0})
    if not quiet:
        warnings.warn(
            f"torch.compile backend actzip leaves a graph to PyTorch: {why}", ActzipWarning, stacklevel=3
        )
    return gm.forward


def _flat(call: Callable[..., Any], single: bool) -> Callable[..., Any]:
    """torch.compile wants a tuple of outputs."""
    if single:
        return lambda *inputs: (call(*inputs),)
    return lambda *inputs: tuple(call(*inputs))


def _apart(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` away from the compilation in progress: what it runs is not compiled, what it traces
    guards nothing."""

    def run(*args: Any) -> Any:
        with torch._guards.tracing(None):
            return torch._dynamo.disable(f)(*args)

    return run


def _build(
    closed: Closed, examples: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any], list[bool], tuple[int, int | None]]:
    output = next(n for n in closed.gm.graph.nodes if n.op == "output").args[0]
    single = not isinstance(output, (tuple, list))
    traced = trace_closed(closed, examples, options)
    batches = (traced.least, traced.most)
    why = effect_of(traced.program)
    if why:
        return closed, {"mode": "eager", "why": why, "parts": 0}, [], batches
    views = _views(traced.program)
    if views:
        why = "outputs share memory"
    else:
        try:
            call = engine_of(closed, examples, options, traced)
        except ActzipError as error:
            why = str(error)
        else:
            report = {"mode": "whole", "why": "", "parts": 1}
            return _flat(call, single), report, growing(call.graph, len(examples)), batches
    parts = parts_of(traced.program, views, examples, options)
    why = reasons([why, *parts.failed.values()])
    if parts.built == 0:
        return closed, {"mode": "eager", "why": why, "parts": 0}, [], batches
    if not views or parts.left > len(views):
        warnings.warn(
            f"torch.compile backend actzip runs {parts.built} parts of a graph; PyTorch runs the rest "
            f"({parts.left} operators): {why}",
            ActzipWarning,
            stacklevel=4,
        )
    report = {"mode": "parts", "why": why, "parts": parts.built}
    return _flat(parts.module, single), report, parts.grows, batches


def effect_of(program: Any) -> str:
    """What the program does beside giving outputs, '' for nothing: PyTorch alone repeats that exactly."""
    from actzip.runtime.effects import draws

    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        return f"it changes {len(changed)} of its inputs or buffers in place"
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        names = [a.name for a in schema.arguments]
        if draws(node.target, {**dict(zip(names, node.args, strict=False)), **node.kwargs}):
            return f"{node.target} draws random numbers"
        space = schema.name.partition("::")[0]
        if space not in _PURE:
            return f"{node.target} is no operator of PyTorch and may have effects"
    return ""


_PURE = ("aten", "prims", "prim", "actzip", "torchvision")


def _views(program: Any) -> set[str]:
    """Nodes that make views that are outputs, where an input or another output is the memory's
    owner: those PyTorch has to make, for the outputs to share memory as they do without the engine."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    roots: dict[fx.Node, list[list[fx.Node]]] = {}
    for node in dict.fromkeys(n for n in output.args[0] if isinstance(n, fx.Node)):
        chain, at = [], node
        while (source := _viewed(at)) is not None:
            chain.append(at)
            at = source
        roots.setdefault(at, []).append(chain)
    found: set[str] = set()
    for root, chains in roots.items():
        if root.op == "placeholder" or len(chains) > 1:
            found.update(n.name for chain in chains for n in chain)
            if root.op == "placeholder":
                found.add(root.name)
    return found


#: Give their input itself, or a view of it, where nothing has to be copied; their schema tells not.
_SOMETIMES = ("dropout", "feature_dropout", "alpha_dropout")


def _viewed(node: fx.Node) -> fx.Node | None:
    """What ``node`` may be a view of."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return _viewed(source) if isinstance(source, fx.Node) else None
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments or not node.args:
        return None
    info = schema.arguments[0].alias_info
    view = (info is not None and not info.is_write) or schema.name.partition("::")[2] in _SOMETIMES
    return node.args[0] if view and isinstance(node.args[0], fx.Node) else None
