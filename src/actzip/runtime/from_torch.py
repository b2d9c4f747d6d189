"""The torch.export front end: an exported program -> :class:`~actzip.runtime.graph.Graph`.

:mod:`actzip.runtime.tracing` makes the program. What depends on parameters alone is computed here
and becomes a constant. Shapes are those that torch.export inferred.

Thresholded ReLUs (``actzip.activations.set_thresholds``) are seen as they run:
``where(y <= t, 0, y)``. In code of one's own ``where(y > t, y, 0)`` is taken for the same, though
PyTorch makes 0 of a NaN there, which the engine keeps.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.effects import draws
from actzip.runtime.registry import PROBES, TORCH, Absent, Compare, Probed, Ref, Stacked

__all__ = ["Builder", "from_exported", "refused_nodes"]


def _place(node: Any) -> str:
    """ "layer1.0.conv1: aten.convolution.default (resnet.py:92)" """
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for p, _ in stack.values():
        path = p
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [(f, n) for f, n in lines if not f.startswith("<")]  # code that torch.fx wrote
    lines = [(f, n) for f, n in lines if "/torch/" not in f] or lines
    at = f" ({lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]})" if lines else ""
    return f"{path or '(model)'}: {node.target}{at}"


def _path(node: Any) -> str:
    path = ""
    for p, _ in (node.meta.get("nn_module_stack") or {}).values():
        path = p
    return path


def from_exported(exported: Any, name: str = "graph", sizes: Mapping[Any, int] | None = None) -> g.Graph:
    """A Graph from a decomposed ``torch.export.ExportedProgram``; ``sizes``: numbers for its symbols.

    Raises:
        UnsupportedError: an operator or type that the engine does not have, with its place in the model.
    """
    return Builder(exported, name, sizes).build()


class _Broken:
    """A value of an operator that was refused, or that reads one."""


_MOST_PROBED = 1 << 22  # elements of a constant that depends on the batch
_MOST_SAID = 6  # refusals of one model


def _same_or_probed(values: Sequence[Tensor]) -> Any:
    """A tensor where all are the same, else :class:`Probed`."""
    first = values[0]
    return first if all(torch.equal(v, first) for v in values) else Probed(tuple(values))


def _said(value: Any) -> str:
    """Why an output or argument cannot be had."""
    if isinstance(value, Absent):
        return f"{value.what} are not computed by the engine"
    return "a size that depends on the batch is an output"


def _as_text(spec: Any) -> Any:
    """A tree's specification as JSON; as it is where JSON cannot say it."""
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError):
        return spec


_NAMESPACES = ("aten::", "actzip::", "quantized_decomposed::")


class Builder:
    """A Graph as it is built from an exported program: what
    :data:`~actzip.runtime.registry.TORCH`'s functions work with."""

    def __init__(self, exported: Any, name: str, sizes: Mapping[Any, int] | None = None) -> None:
        self.exported = exported
        self.sizes = dict(sizes or {})
        self.graph = g.Graph(name)
        self.env: dict[Any, Any] = {}
        self.node: Any = None
        self.symbol: Any = None
        self.interned: dict[int, tuple[Tensor, Ref]] = {}
        self.masks: dict[int, tuple[Compare, Ref]] = {}
        self.node_names: set[str] = set()

    # shapes

    def dim(self, d: Any) -> g.Dim:
        if isinstance(d, int):
            return d
        expr = d.node.expr
        if self.sizes:
            expr = expr.subs(self.sizes)
        free = expr.free_symbols
        if not free:
            return int(expr)
        if self.symbol is None and len(free) == 1:
            self.symbol = next(iter(free))
        if free != {self.symbol}:
            raise UnsupportedError(f"{_place(self.node)}: a second dynamic dimension, {d}")
        values = [int(expr.subs(self.symbol, n)) for n in (12, 60, 420)]
        k = values[0] // 12
        if k < 1 or any(v != k * n for v, n in zip(values, (12, 60, 420), strict=True)):
            raise UnsupportedError(f"{_place(self.node)}: dimension {d} is not a multiple of the batch")
        return g.Sym(k)

    def shape_of(self, fx_node: Any) -> g.Shape:
        val = fx_node.meta["val"]
        return tuple(self.dim(d) for d in val.shape)

    @property
    def out_shape(self) -> g.Shape:
        return self.shape_of(self.node)

    def shape(self, x: Any) -> g.Shape:
        if isinstance(x, Ref):
            return self.graph.shape(x.name)
        if isinstance(x, Compare):
            return g.broadcast([self.shape(x.x), tuple(x.t.shape)])
        if isinstance(x, Probed):
            return ops.probed_shape(x)
        return tuple(x.shape)

    # building

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{_place(self.node)}: {why}")

    def ref(self, x: Any) -> str:
        """The value's name; a constant tensor becomes one."""
        x = self.expanded(x) if isinstance(x, Probed) else self.compared(x)
        if isinstance(x, Ref):
            return x.name
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            x = torch.tensor(float(x))
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(x)
        if isinstance(x, Tensor):
            known = self.interned.get(id(x))
            if known is None:
                a = self.array(x)
                known = (x, Ref(self.graph.add_constant(a, "c_" + self.node.name)))
                self.interned[id(x)] = known
            return known[1].name
        raise self.refuse(f"an operand of type {type(x).__name__}")

    def array(self, t: Any) -> g.Array:
        if not isinstance(t, Tensor):
            raise self.refuse("a parameter that is computed from the input")
        if t.is_complex():
            raise self.refuse(f"a constant of type {t.dtype}")
        t = t.to(torch.float32)
        overlaps = 0 not in t.stride() and t.untyped_storage().nbytes() < t.element_size() * t.numel()
        if overlaps:  # a pattern in the place of a weight, which takes no memory: see origin.pattern
            pattern: g.Array = t.detach().numpy()
            return pattern
        return np.ascontiguousarray(t.detach().numpy())

    def maybe(self, t: Any) -> g.Array | None:
        return None if t is None else self.array(t)

    def emit(self, cls: type[g.Node], *inputs: Any, dtype: str = "", **fields: Any) -> Ref:
        names = tuple(self.ref(x) for x in inputs)
        path = _path(self.node)
        base = path or self.node.name
        name = base
        if name in self.node_names:
            name = f"{base}:{cls.op}"
        i = 1
        while name in self.node_names:
            name = f"{base}:{cls.op}_{i}"
            i += 1
        self.node_names.add(name)
        output = self.graph.fresh(self.node.name)
        node = cls(name, names, output, source=_place(self.node), **fields)
        try:
            self.graph.add(node, dtype)
        except InputError as error:
            raise UnsupportedError(str(error)) from error
        return Ref(output)

    def reshape(self, x: Any, shape: g.Shape) -> Any:
        if g.same_shape(self.shape(x), shape):
            return x
        return self.emit(ops.Reshape, x, shape=shape)

    def compared(self, x: Any) -> Any:
        """A comparison as the engine's value of 1 and 0; others as they are."""
        if not isinstance(x, Compare):
            return x
        known = self.masks.get(id(x))
        if known is None:
            known = self.masks[id(x)] = (x, self.emit(ops.Binary, x.x, x.t, kind=x.op, dtype="bool"))
        return known[1]

    def expanded(self, x: Probed) -> Ref:
        """A constant that depends on the batch by its size alone, as the engine's."""
        shape = ops.probed_shape(x)
        dtype = str(x.values[0].dtype).removeprefix("torch.")
        numpy = (v.float() if v.dtype is torch.bfloat16 else v for v in x.values)
        found = ops.repeated([v.detach().numpy() for v in numpy], shape)
        if found is None:
            raise self.refuse("numbers that depend on the batch are used as a tensor")
        once = torch.from_numpy(np.ascontiguousarray(found[0]))
        whole: Ref = self.reshape(self.emit(ops.Expand, once, shape=found[1], dtype=dtype), shape)
        return whole

    def is_bool(self, x: Any) -> bool:
        """Whether a value, or the result of a node, is of type bool."""
        if isinstance(x, Ref):
            return self.graph.values[x.name].dtype == "bool"
        if isinstance(x, torch.fx.Node):
            x = x.meta.get("val")
        if isinstance(x, Probed):
            x = x.values[0]
        return isinstance(x, Compare) or (isinstance(x, Tensor) and x.dtype == torch.bool)

    def as_bool(self, x: Any) -> Any:
        """Where a value is not 0."""
        if isinstance(x, Tensor):
            return x != 0
        return x if self.is_bool(x) else self.emit(ops.Binary, x, 0.0, kind="ne", dtype="bool")

    def as_float(self, x: Any) -> Any:
        """A value of integers as one of float32; others as they are."""
        x = self.compared(x)
        integers = isinstance(x, Ref) and self.graph.values[x.name].dtype != "float32"
        return self.emit(ops.Reshape, x, shape=self.shape(x), dtype="float32") if integers else x

    def act(self, x: Any, kind: str, **numbers: Any) -> Any:
        """An elementwise function; arguments as :meth:`Act.of`."""
        return self.emit(ops.Activation, x, act=Act.of(kind, **numbers))

    # running

    def build(self) -> g.Graph:
        sig = self.exported.graph_signature
        state, constants = self.exported.state_dict, self.exported.constants
        lifted: dict[str, Tensor] = {}
        for table in (sig.inputs_to_parameters, sig.inputs_to_buffers):
            for arg, target in table.items():
                lifted[arg] = state[target] if target in state else constants[target]
        for arg, target in sig.inputs_to_lifted_tensor_constants.items():
            lifted[arg] = constants[target]
        # by name: `user_inputs` has the value of an input that is no tensor in the place of its name
        user = {
            s.arg.name for s in sig.input_specs if s.kind is torch.export.graph_signature.InputKind.USER_INPUT
        }
        broken: list[UnsupportedError] = []
        if sig.buffers_to_mutate or sig.user_inputs_to_mutate:
            what = ", ".join([*sig.buffers_to_mutate.values(), *sig.user_inputs_to_mutate.values()])
            broken.append(
                UnsupportedError(
                    f"the model changes {what} as it runs; observers of numbers have to be off, and what "
                    "one call hands on to the next has to be an input and an output"
                )
            )
        for node in self.exported.graph.nodes:
            self.node = node
            if any(isinstance(self.env.get(n), _Broken) for n in node.all_input_nodes):
                self.env[node] = self.foreign(node)
            elif node.op == "placeholder":
                if node.name in lifted:
                    self.env[node] = lifted[node.name].detach()
                elif node.name in user:
                    val = node.meta.get("val")
                    if isinstance(val, Tensor):
                        kind = str(val.dtype).removeprefix("torch.")
                        self.env[node] = Ref(self.graph.add_input(node.name, self.shape_of(node), kind))
                    else:
                        self.env[node] = val
                else:
                    raise self.refuse("an input that is neither a tensor nor a parameter")
            elif node.op == "call_function":
                try:
                    self.env[node] = self.call(node)
                except UnsupportedError as error:
                    broken.append(error)
                    self.env[node] = self.foreign(node, str(error))
            elif node.op == "output":
                if not broken:
                    self.finish(node)
            else:
                raise self.refuse(f"a graph node {node.op!r}")
        if broken:
            said = list(dict.fromkeys(map(str, broken)))
            more = f"; and {len(said) - _MOST_SAID} more" if len(said) > _MOST_SAID else ""
            if not hasattr(torch.export, "default_decompositions"):
                more += "; PyTorch before 2.6 takes apart what newer ones leave whole"
            raise UnsupportedError("; ".join(said[:_MOST_SAID]) + more) from broken[0].__cause__
        self.graph.validate()
        return self.graph

    def foreign(self, node: Any, why: str = "") -> Any:
        """What stands for the result of a node that is refused (``why``), or that reads one."""
        return _Broken()

    def finish(self, node: Any) -> None:
        slots: list[Any] = []
        for n in node.args[0]:
            o = n
            if isinstance(n, torch.fx.Node):
                self.node, o = n, self.env[n]
            if isinstance(o, (Compare, Probed)):
                o = Ref(self.ref(o))
            if isinstance(o, Tensor) and o.dtype == torch.float32 and o.ndim == 0:
                o = self.emit(ops.Reshape, o, shape=())
            if isinstance(o, Tensor) and o.dtype != torch.float32:
                slots.append([self.constant(o)])
            elif isinstance(o, (Ref, Tensor)):
                name = self.ref(o)
                if name not in self.graph.outputs:
                    self.graph.outputs.append(name)
                slots.append(self.graph.outputs.index(name))
            elif isinstance(o, (Absent, g.Sym)):
                raise self.refuse(_said(o))
            elif o is None or isinstance(o, (int, float, str)):
                slots.append([o])
            else:
                raise self.refuse("an output that is no tensor")
        spec = self.exported.call_spec.out_spec
        single = len(slots) == 1 and spec == pytree.tree_structure(0)
        self.graph.meta["out_spec"] = None if single else _as_text(spec)
        self.graph.meta["out_slots"] = slots

    def constant(self, t: Tensor) -> g.Array:
        """A tensor that is an output for every input, in its own type."""
        try:
            return np.array(
                t.detach().resolve_conj().resolve_neg().numpy(), order="C"
            )  # no dimension stays none
        except TypeError as error:
            raise self.refuse(f"a constant of type {t.dtype}") from error

    def value(self, a: Any) -> Any:
        if isinstance(a, torch.fx.Node):
            return self.env[a]
        if isinstance(a, (list, tuple)):
            return type(a)(self.value(x) for x in a) if not hasattr(a, "_fields") else a
        return a

    def call(self, node: Any) -> Any:
        target = node.target
        args = [self.value(a) for a in node.args]
        kwargs = {k: self.value(v) for k, v in node.kwargs.items()}
        if target is operator.getitem:
            if isinstance(args[0], Ref):  # of several results the engine has the first
                if args[1] == 0:
                    return args[0]
                raise self.refuse(f"result {args[1]} of {node.args[0].target} is not supported")
            return args[0][args[1]]
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, int)) and not isinstance(val, bool):
            return self.dim(val)
        if isinstance(val, (bool, torch.SymBool, torch.SymFloat, float)) or val is None:
            name = getattr(target, "__name__", str(target))
            if name.startswith(("_assert", "sym_constrain")):
                return None  # torch.export's own guards on the batch
            if val is None:
                raise self.refuse(f"operator {target} gives nothing")
            if isinstance(val, (bool, float)):
                return val
        leaves = pytree.tree_leaves((args, kwargs))
        for a in leaves:
            if isinstance(a, Absent):
                raise self.refuse(_said(a))
        if not any(isinstance(a, (Ref, Compare, Stacked)) for a in leaves):
            if not any(isinstance(a, (Probed, g.Sym)) for a in leaves):
                return self.evaluate(target, args, kwargs)
            found = self.probed(node, args, kwargs)
            if found is not None:
                return found
        schema = getattr(target, "_schema", None)
        if schema is None:
            raise self.refuse(f"operator {target} is not supported")
        bound: dict[str, Any] = {}
        for i, a in enumerate(schema.arguments):
            if i < len(args):
                bound[a.name] = args[i]
            elif a.name in kwargs:
                bound[a.name] = kwargs[a.name]
            else:
                bound[a.name] = a.default_value if a.has_default_value() else None
        if draws(target, bound):
            raise self.refuse("random numbers are other ones in each call")
        name = schema.name.partition("::")[2]
        handler = TORCH.get(name)
        if handler is None or not schema.name.startswith(_NAMESPACES):
            raise self.refuse(f"operator {target} is not supported")
        try:
            result = handler(self, bound)
        except InputError as error:
            raise self.refuse(str(error)) from error
        except UnsupportedError:
            raise
        except Exception as error:
            raise self.refuse(f"cannot be taken over: {type(error).__name__}: {error}") from error
        many = isinstance(val, (tuple, list)) and isinstance(result, (tuple, list))
        for r, v in zip(result, val, strict=False) if many else [(result, val)]:
            self.check_type(r, v)
        return result

    def check_type(self, result: Any, val: Any) -> None:
        if not isinstance(result, Ref) or not isinstance(val, Tensor):
            return
        if str(val.dtype) != f"torch.{self.graph.values[result.name].dtype}":
            raise self.refuse(f"gives {val.dtype}; the engine computes in float32")

    def probed(self, node: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What depends on the batch alone, at a few batches; None where that cannot be had."""
        vals = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        try:
            shapes = [tuple(self.dim(d) for d in v.shape) for v in vals]
            if any(math.prod(g.concrete(s, PROBES[-1])) > _MOST_PROBED for s in shapes):
                return None

            def at(k: int) -> Any:
                def number(a: Any) -> Any:
                    return a.values[k] if isinstance(a, Probed) else a.mul * PROBES[k]

                filled = pytree.tree_map_only((Probed, g.Sym), number, (args, kwargs))
                return self.evaluate(node.target, *filled)

            results = [at(k) for k in range(len(PROBES))]
        except UnsupportedError:
            return None
        if isinstance(results[0], Tensor):
            return _same_or_probed(results)
        if isinstance(results[0], (tuple, list)) and all(isinstance(t, Tensor) for t in results[0]):
            return tuple(_same_or_probed(each) for each in zip(*results, strict=True))
        return None

    def evaluate(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        names = [a.name for a in getattr(getattr(target, "_schema", None), "arguments", ())]
        if draws(target, {**dict(zip(names, args, strict=False)), **kwargs}):
            raise self.refuse("random numbers are other ones in each call")
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
        if target is torch.ops.aten.view.default:  # strides may be others than when it was traced
            target = torch.ops.aten.reshape.default
        try:
            return target(*args, **kwargs)
        except Exception as error:
            raise self.refuse(f"a constant cannot be computed: {error}") from error


class Survey(Builder):
    """Reads a program on behind what is refused.

    Attributes:
        elsewhere: names of the program's nodes that the engine lacks, with the reasons; '' of those
            that read what is not for the engine.
    """

    def __init__(self, exported: Any) -> None:
        super().__init__(exported, "survey")
        self.elsewhere: dict[str, str] = {}

    def foreign(self, node: Any, why: str = "") -> Any:
        self.elsewhere[node.name] = why
        val = node.meta.get("val")
        if not isinstance(val, Tensor) or val.dtype != torch.float32:
            return super().foreign(node)
        try:
            return Ref(self.graph.add_input(f"{node.name}:elsewhere", self.shape_of(node)))
        except UnsupportedError:  # a size that depends on the batch otherwise than as its multiple
            return super().foreign(node)


def refused_nodes(exported: Any) -> dict[str, str]:
    """Names of the nodes of a decomposed program that the engine lacks, with the reasons."""
    survey = Survey(exported)
    with suppress(UnsupportedError):
        survey.build()
    return survey.elsewhere
