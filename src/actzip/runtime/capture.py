"""The torch.export front end: any ``nn.Module`` -> :class:`~actzip.runtime.graph.Graph`.

The model is exported in eval mode with a symbolic batch and decomposed to a small set of aten operators; those
with a node of their own (hard-swish, layer norm, attention ...) are kept whole. What depends on parameters alone is
computed here and becomes a constant. Shapes are those that torch.export inferred.

Thresholded ReLUs (``actzip.activations.set_thresholds``) are seen as they run: ``where(y <= t, 0, y)``. In code of
one's own ``where(y > t, y, 0)`` is taken for the same, though PyTorch makes 0 of a NaN there, which the engine keeps.
"""

from __future__ import annotations

import inspect
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from actzip.errors import InputError, UnsupportedError
from actzip.quantize.model import marked
from actzip.runtime import graph as g

__all__ = ["capture", "flat_inputs", "from_exported"]


@dataclass(frozen=True)
class Ref:
    """A value of the graph under construction."""

    name: str


@dataclass
class Compare:
    """``x <op> t`` with a constant ``t``, kept until the ``where`` that makes a threshold of it."""

    op: str
    x: Ref
    t: Tensor


Handler = Callable[["_Builder", dict[str, Any]], Any]
_HANDLERS: dict[str, Handler] = {}
_NAMES: set[str] = set()


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(f: Handler) -> Handler:
        for n in names:
            _HANDLERS[n] = f
        return f

    return register


def flat_inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example`` as positional and keyword arguments: a tuple or list is several inputs, a dict keywords.

    numpy arrays become tensors.
    """
    example = pytree.tree_map_only(np.ndarray, _tensor, example)
    if isinstance(example, dict):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def _tensor(a: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(a, order="C"))  # a copy: the array may be read-only
    except (TypeError, ValueError) as error:
        raise InputError(f"example of type {a.dtype}; the engine takes float32") from error


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with suppress(NotImplementedError):  # an exported program's module has no modes
        model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, training in was.items():
            m.training = training


def capture(model: nn.Module, example: Any, *, dynamic: bool = True) -> g.Graph:
    """Exports ``model`` on ``example`` and builds its Graph (eval mode; training flags are put back).

    Args:
        example: a float32 tensor or array (N, ...); a tuple of several; a dict of keyword arguments.
        dynamic: keep the batch symbolic. Where the model itself fixes it (a reshape to a constant, say) the graph
            is made for the example's batch.

    Raises:
        InputError: ``model`` or ``example`` is of another kind, or the model does not run on it.
        UnsupportedError: an operator or type that the engine does not have, with its place in the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    args, kwargs = flat_inputs(example)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors:
        raise InputError("example holds no tensor")
    for t in tensors:
        if t.dtype != torch.float32:
            raise InputError(f"example of type {t.dtype}; the engine takes float32")
        if t.device.type != "cpu":
            raise InputError(f"example on {t.device}; the engine runs on the CPU")
    for name, p in model.named_parameters():
        if p.device.type != "cpu":
            raise InputError(f"parameter {name!r} is on {p.device}; the engine runs on the CPU")
    batch = tensors[0].shape[0] if tensors[0].ndim else None
    if batch is not None and batch < 1:
        raise InputError(f"example of shape {tuple(tensors[0].shape)} has no image")
    with _eval_mode(model), torch.no_grad(), marked(model):
        exported = None
        if dynamic and batch is not None:
            exported = _export(model, args, kwargs, batch, dynamic=True)
        if exported is None:
            exported = _export(model, args, kwargs, batch, dynamic=False)
        assert exported is not None
        graph = from_exported(exported, name=type(model).__name__)  # reads the parameters
    graph.meta["call"] = _call(model, exported, graph)
    graph.meta["example_batch"] = batch
    return graph


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None, *, dynamic: bool
) -> Any:
    def grown(t: Any) -> Any:  # a batch of one would be taken for a constant
        if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch and batch == 1:
            return torch.cat([t, t])
        return t

    grows = [
        t
        for t in pytree.tree_leaves((args, kwargs))
        if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch
    ]
    # several inputs have one batch in common, whether the model brings them together or not
    dimension = torch.export.Dim.AUTO if len(grows) == 1 else torch.export.Dim("batch")

    def spec(t: Any) -> Any:
        if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch:
            return {0: dimension}
        return {} if isinstance(t, Tensor) else None

    shapes = None
    if dynamic:
        # torch.export wants dynamic_shapes by parameter, *args and **kwargs nested
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
            shapes = {k: pytree.tree_map(spec, v) for k, v in bound.items()}
        except TypeError as error:
            raise InputError(f"the model does not take this example: {error}") from error
        except ValueError:  # a module without a signature
            return None
        args, kwargs = pytree.tree_map(grown, args), pytree.tree_map(grown, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions(_decompositions())
        except Exception as error:
            if dynamic:
                return None
            try:
                model(*args, **kwargs)
            except Exception as plain:
                first = str(plain).strip().partition("\n")[0]
                raise InputError(
                    f"the model does not run on this example: {type(plain).__name__}: {first}"
                ) from plain
            raise _export_error(error) from error


@dataclass(frozen=True)
class _Fixed:
    """An argument that is no tensor."""

    value: Any


def _call(model: nn.Module, exported: Any, graph: g.Graph) -> dict[str, Any]:
    """How calls are bound: names of the positional parameters, the place (a path in the bound arguments) of every graph input,
    and what else was given, or is the default, and therefore fixed."""
    from torch.export.graph_signature import ConstantArgument, InputKind

    specs = [s.arg for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    leaves = [_Fixed(a.value) if isinstance(a, ConstantArgument) else a.name for a in specs]
    args, kwargs = pytree.tree_unflatten(leaves, exported.call_spec.in_spec)
    try:
        signature = inspect.signature(model.forward)
        bound = dict(signature.bind(*args, **kwargs).arguments)
        parameters = list(signature.parameters.values())
    except (TypeError, ValueError):  # a module without a signature
        parameters, bound = [], {}
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    var = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
    for p in parameters:
        if p.kind == p.VAR_KEYWORD:
            bound.update(bound.pop(p.name, {}))
    if not bound:
        bound = {v: v for v in graph.inputs}
        names = list(graph.inputs)
    places, constants = {}, {}
    for path, leaf in pytree.tree_flatten_with_path(bound)[0]:
        if isinstance(leaf, _Fixed):
            constants[pytree.keystr(path)] = leaf.value
        else:
            places[pytree.keystr(path)] = leaf
    plain = (bool, int, float, str, type(None))
    defaults = {
        f"[{p.name!r}]": p.default
        for p in parameters
        if p.default is not p.empty and isinstance(p.default, plain)
    }
    return {"names": names, "var": var, "places": places, "constants": constants, "defaults": defaults}


def _export_error(error: Exception) -> Exception:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = f"torch.export cannot capture this model: {type(error).__name__}: {first}"
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and f.filename != __file__
    ]
    if frames:  # the model's own line
        f = frames[-1]
        text += f" (at {f.filename.rsplit('/', 1)[-1]}:{f.lineno} in {f.name}: {f.line})"
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        text += "; control flow that depends on the numbers in a tensor has no graph"
    return UnsupportedError(text)


def _decompositions() -> Any:
    """torch's core decompositions but for the operators that have a handler here."""
    try:
        table = torch.export.default_decompositions()
    except AttributeError:  # torch < 2.6
        from torch._decomp import core_aten_decompositions

        table = core_aten_decompositions()
    for op in list(table.keys()):  # type: ignore[no-untyped-call]
        name = str(getattr(op, "_schema", op)).partition("(")[0].partition(".")[0]
        if name.removeprefix("aten::") in _HANDLERS:
            table.pop(op)  # type: ignore[no-untyped-call]
    return table


def _place(node: Any) -> str:
    """ "layer1.0.conv1: aten.convolution.default (resnet.py:92)" """
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for p, _ in stack.values():
        path = p
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [(f, n) for f, n in lines if "/torch/" not in f] or lines
    at = f" ({lines[-1][0].rsplit('/', 1)[-1]}:{lines[-1][1]})" if lines else ""
    return f"{path or '(model)'}: {node.target}{at}"


def _path(node: Any) -> str:
    path = ""
    for p, _ in (node.meta.get("nn_module_stack") or {}).values():
        path = p
    return path


def from_exported(exported: Any, name: str = "graph") -> g.Graph:
    """A Graph from a decomposed ``torch.export.ExportedProgram``.

    Raises:
        UnsupportedError: an operator or type that the engine does not have, with its place in the model.
    """
    return _Builder(exported, name).build()


class _Builder:
    def __init__(self, exported: Any, name: str) -> None:
        self.exported = exported
        self.graph = g.Graph(name)
        self.env: dict[Any, Any] = {}
        self.node: Any = None
        self.symbol: Any = None
        self.interned: dict[int, tuple[Tensor, Ref]] = {}
        self.node_names: set[str] = set()

    # shapes

    def dim(self, d: Any) -> g.Dim:
        if isinstance(d, int):
            return d
        expr = d.node.expr
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
        return tuple(x.shape)

    # building

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{_place(self.node)}: {why}")

    def ref(self, x: Any) -> str:
        """The value's name; a constant tensor becomes one."""
        if isinstance(x, Ref):
            return x.name
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            x = torch.tensor(float(x))
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
        if t.is_floating_point():
            t = t.to(torch.float32)
        elif t.dtype == torch.bool or t.is_complex():
            raise self.refuse(f"a constant of type {t.dtype}")
        else:
            t = t.to(torch.float32)
        return np.ascontiguousarray(t.detach().numpy())

    def maybe(self, t: Any) -> g.Array | None:
        return None if t is None else self.array(t)

    def emit(self, cls: type[g.Node], *inputs: Any, **fields: Any) -> Ref:
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
            self.graph.add(node)
        except InputError as error:
            raise UnsupportedError(str(error)) from error
        return Ref(output)

    def reshape(self, x: Any, shape: g.Shape) -> Any:
        if g.same_shape(self.shape(x), shape):
            return x
        return self.emit(g.Reshape, x, shape=shape)

    def act(self, x: Any, kind: str, **numbers: Any) -> Any:
        return self.emit(g.Activation, x, act=g.Act.of(kind, **numbers))

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
        for node in self.exported.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                if node.name in lifted:
                    self.env[node] = lifted[node.name].detach()
                elif node.name in user:
                    val = node.meta.get("val")
                    if isinstance(val, Tensor):
                        self.env[node] = Ref(self.graph.add_input(node.name, self.shape_of(node)))
                    else:
                        self.env[node] = val
                else:
                    raise self.refuse("an input that is neither a tensor nor a parameter")
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                self.finish(node, sig)
            else:
                raise self.refuse(f"a graph node {node.op!r}")
        self.graph.validate()
        return self.graph

    def finish(self, node: Any, sig: Any) -> None:
        if sig.buffers_to_mutate or sig.user_inputs_to_mutate:
            what = ", ".join([*sig.buffers_to_mutate.values(), *sig.user_inputs_to_mutate.values()])
            raise UnsupportedError(f"the model changes {what} as it runs")
        outputs = [self.env[n] if isinstance(n, torch.fx.Node) else n for n in node.args[0]]
        slots: list[Any] = []
        for o in outputs:
            if isinstance(o, (Ref, Tensor)):
                name = self.ref(o)
                slots.append(len(self.graph.outputs))
                self.graph.outputs.append(name)
            elif o is None or isinstance(o, (int, float, str)):
                slots.append([o])
            else:
                raise self.refuse("an output that is no tensor")
        spec = self.exported.call_spec.out_spec
        single = len(slots) == 1 and spec == pytree.tree_structure(0)
        self.graph.meta["out_spec"] = None if single else pytree.treespec_dumps(spec)
        self.graph.meta["out_slots"] = slots
        self.graph.meta["in_spec"] = pytree.treespec_dumps(self.exported.call_spec.in_spec)

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
            return args[0][args[1]]
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, int)) and not isinstance(val, bool):
            return self.dim(val)
        if isinstance(val, (bool, torch.SymBool, torch.SymFloat, float)) or val is None:
            if getattr(target, "__name__", "").startswith(("_assert", "sym_constrain")) or val is None:
                return None  # torch.export's own guards on the batch
            if isinstance(val, (bool, float)):
                return val
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(a, (Ref, Compare, g.Sym)) for a in leaves):
            return self.evaluate(target, args, kwargs)
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
        name = schema.name.partition("::")[2]
        handler = _HANDLERS.get(name)
        if handler is None or not schema.name.startswith(("aten::", "actzip::")):
            raise self.refuse(f"operator {target} is not supported")
        if isinstance(val, Tensor) and val.dtype != torch.float32 and name not in _ANY_TYPE:
            raise self.refuse(f"gives {val.dtype}; the engine computes in float32")
        return handler(self, bound)

    def evaluate(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise self.refuse("random numbers are other ones in each call")
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
        try:
            return target(*args, **kwargs)
        except Exception as error:
            raise self.refuse(f"a constant cannot be computed: {error}") from error


_ANY_TYPE = {
    "gt",
    "ge",
    "lt",
    "le",
    "full",
    "full_like",
    "zeros_like",
    "ones_like",
    "scalar_tensor",
    "arange",
}


def _two(v: Any) -> tuple[int, int]:
    v = [v] if isinstance(v, int) else list(v)
    return (int(v[0]), int(v[0])) if len(v) == 1 else (int(v[0]), int(v[1]))


def _four(v: Any) -> tuple[int, int, int, int]:
    a, b = _two(v)
    return (a, b, a, b)


# convolution and matrix products


@_handles("convolution")
def _convolution(b: _Builder, a: dict[str, Any]) -> Any:
    w = b.array(a["weight"])
    x = a["input"]
    if w.ndim not in (3, 4):
        raise b.refuse(f"{w.ndim - 2}-dimensional convolution is not supported")
    bias = b.maybe(a["bias"])
    stride, padding, dilation = list(a["stride"]), list(a["padding"]), list(a["dilation"])
    one = w.ndim == 3
    if one:  # as a convolution of height 1
        n, c, length = b.shape(x)
        x = b.reshape(x, (n, c, 1, length))
        w = w.reshape(w.shape[0], w.shape[1], 1, w.shape[2])
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    if a["transposed"]:
        out = list(a["output_padding"])
        y = b.emit(
            g.ConvTranspose2d, x, weight=w, bias=bias, stride=_two(stride), padding=_four(padding),
            output_padding=_two([0, *out] if one else out), dilation=_two(dilation), groups=int(a["groups"]),
        )  # fmt: skip
    else:
        y = b.emit(
            g.Conv2d, x, weight=w, bias=bias, stride=_two(stride), padding=_four(padding),
            dilation=_two(dilation), groups=int(a["groups"]),
        )  # fmt: skip
    return b.reshape(y, b.out_shape) if one else y


@_handles("linear")
def _linear(b: _Builder, a: dict[str, Any]) -> Any:
    if isinstance(a["weight"], Ref):
        raise b.refuse("a weight that is computed from the input")
    return b.emit(g.Linear, a["input"], weight=b.array(a["weight"]), bias=b.maybe(a["bias"]))


@_handles("addmm")
def _addmm(b: _Builder, a: dict[str, Any]) -> Any:
    if a["beta"] == 1 and a["alpha"] == 1 and isinstance(a["mat2"], Tensor) and isinstance(a["self"], Tensor):
        bias = a["self"]
        if bias.ndim == 1:
            return b.emit(g.Linear, a["mat1"], weight=b.array(a["mat2"].t()), bias=b.array(bias))
    y = _matmul(b, {"self": a["mat1"], "mat2": a["mat2"]})
    if a["alpha"] != 1:
        y = b.emit(g.Binary, y, float(a["alpha"]), kind="mul")
    z = a["self"]
    if a["beta"] != 1:
        z = b.emit(g.Binary, z, float(a["beta"]), kind="mul")
    return b.emit(g.Binary, z, y, kind="add")


@_handles("mm", "bmm", "matmul")
def _matmul(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    y = a["mat2"] if "mat2" in a else a["other"]
    if isinstance(y, Tensor) and y.ndim == 2 and isinstance(x, Ref):
        return b.emit(g.Linear, x, weight=b.array(y.t()), bias=None)
    if len(b.shape(x)) < 2 or len(b.shape(y)) < 2:
        raise b.refuse("a matrix product with a vector is not supported")
    return b.emit(g.MatMul, x, y)


@_handles("baddbmm")
def _baddbmm(b: _Builder, a: dict[str, Any]) -> Any:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise b.refuse("baddbmm with beta or alpha is not supported")
    return b.emit(g.Binary, a["self"], b.emit(g.MatMul, a["batch1"], a["batch2"]), kind="add")


@_handles("scaled_dot_product_attention")
def _attention(b: _Builder, a: dict[str, Any]) -> Any:
    q, k, v = a["query"], a["key"], a["value"]
    if a["is_causal"] or a.get("enable_gqa"):
        raise b.refuse("causal or grouped attention is not supported")
    head = b.shape(q)[-1]
    assert isinstance(head, int)
    scale = float(a["scale"]) if a["scale"] is not None else head**-0.5
    perm = list(range(len(b.shape(k))))
    perm[-1], perm[-2] = perm[-2], perm[-1]
    s = b.emit(g.MatMul, b.emit(g.Binary, q, scale, kind="mul"), b.emit(g.Transpose, k, perm=tuple(perm)))
    mask = a["attn_mask"]
    if mask is not None:
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        s = b.emit(g.Binary, s, mask, kind="add")
    return b.emit(g.MatMul, b.emit(g.Softmax, s, axis=-1), v)


# normalisation


@_handles("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm")
def _batch_norm(b: _Builder, a: dict[str, Any]) -> Any:
    mean, var = a["running_mean"], a["running_var"]
    if a.get("training") or mean is None or var is None:
        raise b.refuse("batch norm with the batch's own statistics is not supported")
    m, v = b.array(mean).astype(np.float64), b.array(var).astype(np.float64)
    scale = 1.0 / np.sqrt(v + float(a["eps"]))
    if a["weight"] is not None:
        scale = scale * b.array(a["weight"])
    shift = -m * scale
    if a["bias"] is not None:
        shift = shift + b.array(a["bias"])
    y = b.emit(g.BatchNorm, a["input"], scale=scale.astype(np.float32), shift=shift.astype(np.float32))
    return y if "cudnn_enabled" in a else (y, None, None)


@_handles("layer_norm", "native_layer_norm")
def _layer_norm(b: _Builder, a: dict[str, Any]) -> Any:
    shape = tuple(int(d) for d in a["normalized_shape"])
    y = b.emit(
        g.LayerNorm, a["input"], shape=shape, weight=b.maybe(a["weight"]), bias=b.maybe(a["bias"]),
        eps=float(a["eps"]),
    )  # fmt: skip
    return y if "cudnn_enable" in a else (y, None, None)


@_handles("group_norm")
def _group_norm(b: _Builder, a: dict[str, Any]) -> Any:
    return b.emit(
        g.GroupNorm, a["input"], groups=int(a["num_groups"]), weight=b.maybe(a["weight"]),
        bias=b.maybe(a["bias"]), eps=float(a["eps"]),
    )  # fmt: skip


@_handles("instance_norm")
def _instance_norm(b: _Builder, a: dict[str, Any]) -> Any:
    if not a["use_input_stats"]:
        raise b.refuse("instance norm with running statistics is not supported")
    c = b.shape(a["input"])[1]
    assert isinstance(c, int)
    return b.emit(
        g.GroupNorm,
        a["input"],
        groups=c,
        weight=b.maybe(a["weight"]),
        bias=b.maybe(a["bias"]),
        eps=float(a["eps"]),
    )


# elementwise


def _unary(kind: str) -> Handler:
    return lambda b, a: b.act(a["self"], kind)


for _name in (
    "relu", "selu", "sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "neg", "abs", "sign",
    "floor", "ceil", "round", "erf", "sin", "cos", "silu", "hardswish", "hardsigmoid", "mish",
):  # fmt: skip
    _HANDLERS[_name] = _unary(_name)
_HANDLERS["log_sigmoid"] = _HANDLERS["log_sigmoid_forward"] = _unary("logsigmoid")
_HANDLERS["softsign"] = _unary("softsign")
_HANDLERS["relu6"] = lambda b, a: b.act(a["self"], "clip", lo=0.0, hi=6.0)


@_handles("gelu")
def _gelu(b: _Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "gelu_tanh" if a["approximate"] == "tanh" else "gelu")


@_handles("hardtanh")
def _hardtanh(b: _Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "clip", lo=float(a["min_val"]), hi=float(a["max_val"]))


@_handles("clamp", "clamp_min", "clamp_max")
def _clamp(b: _Builder, a: dict[str, Any]) -> Any:
    lo, hi = a.get("min"), a.get("max")
    for t in (lo, hi):
        if isinstance(t, Ref) or (isinstance(t, Tensor) and t.numel() > 1):
            raise b.refuse("clamping by a tensor is not supported")
    return b.act(
        a["self"],
        "clip",
        lo=-float("inf") if lo is None else float(lo),
        hi=float("inf") if hi is None else float(hi),
    )


@_handles("leaky_relu")
def _leaky(b: _Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "leaky_relu", alpha=float(a["negative_slope"]))


@_handles("elu")
def _elu(b: _Builder, a: dict[str, Any]) -> Any:
    alpha, scale, inside = float(a["alpha"]), float(a["scale"]), float(a["input_scale"])
    if inside != 1.0:  # celu: max(0, x) + min(0, alpha * (exp(x / alpha) - 1))
        if scale == 1.0 and abs(alpha * inside - 1.0) < 1e-6:
            return b.act(a["self"], "celu", alpha=alpha)
        raise b.refuse("this form of elu is not supported")
    if scale != 1.0:
        if abs(scale - 1.0507009873554805) < 1e-6 and abs(alpha - 1.6732632423543772) < 1e-6:
            return b.act(a["self"], "selu")
        return b.emit(g.Binary, b.act(a["self"], "elu", alpha=alpha), scale, kind="mul")
    return b.act(a["self"], "elu", alpha=alpha)


@_handles("celu")
def _celu(b: _Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "celu", alpha=float(a["alpha"]))


@_handles("softplus")
def _softplus(b: _Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "softplus", beta=float(a["beta"]), limit=float(a["threshold"]))


@_handles("prelu", "_prelu_kernel")
def _prelu(b: _Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "prelu", param=b.array(a["weight"]))


@_handles("threshold")
def _threshold(b: _Builder, a: dict[str, Any]) -> Any:
    if float(a["value"]) != 0.0:
        raise b.refuse("a threshold that gives another value than 0 is not supported")
    return b.act(a["self"], "threshold", param=np.array([float(a["threshold"])], np.float32))


@_handles("quantized_map")
def _quantized_map(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["x"]
    if not isinstance(x, Ref):
        raise b.refuse("a quantized constant is not supported")
    b.graph.values[x.name].quant = (float(a["scale"]), int(a["bits"]))
    return x


@_handles("gt", "ge", "lt", "le")
def _compare(b: _Builder, a: dict[str, Any]) -> Any:
    name = b.node.target._schema.name.partition("::")[2]
    x, t = a["self"], a["other"]
    if not isinstance(x, Ref) and isinstance(t, Ref):
        x, t = t, x
        name = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}[name]
    t = torch.tensor(float(t)) if isinstance(t, (int, float)) else t
    if not isinstance(x, Ref) or not isinstance(t, Tensor):
        raise b.refuse("a comparison of two values is not supported")
    return Compare(name, x, t)


@_handles("where")
def _where(b: _Builder, a: dict[str, Any]) -> Any:
    c, yes, no = a["condition"], a["self"], a["other"]

    def zero(t: Any) -> bool:
        return isinstance(t, Tensor) and not bool((t != 0).any())

    if isinstance(c, Compare):
        if c.op in ("lt", "le"):
            yes, no = no, yes
        kept = yes == c.x and zero(no)
        if kept and c.op in ("gt", "le"):
            t = c.t.to(torch.float32)
            flat = t.reshape(-1)
            shape = b.shape(c.x)
            channels = t.numel() > 1 and list(t.shape) == [1] * (t.ndim - len(shape) + 1) + [
                t.numel(), *[1] * (len(shape) - 2)
            ]  # fmt: skip
            if t.numel() == 1 or channels:
                return b.act(c.x, "threshold", param=flat.numpy())
    raise b.refuse("`where` is supported only as a threshold, where(x <= t, 0, x)")


def _binary(kind: str) -> Handler:
    def handler(b: _Builder, a: dict[str, Any]) -> Any:
        x, y = a["self"], a["other"]
        alpha = a.get("alpha")
        if a.get("rounding_mode"):
            raise b.refuse(f"division with rounding mode {a['rounding_mode']!r} is not supported")
        if alpha is not None and alpha != 1:
            y = b.emit(g.Binary, y, float(alpha), kind="mul") if isinstance(y, Ref) else y * alpha
        if isinstance(x, Compare) or isinstance(y, Compare):
            raise b.refuse("arithmetic on a comparison is not supported")
        if kind in ("add", "sub") and _all(y, 0.0, b.shape(x) if isinstance(x, Ref) else None):
            return x
        if kind in ("mul", "div") and _all(y, 1.0, b.shape(x) if isinstance(x, Ref) else None):
            return x
        return b.emit(g.Binary, x, y, kind=kind)

    return handler


def _all(y: Any, number: float, shape: Any) -> bool:
    """Whether ``y`` is that number and nothing would be broadcast."""
    if shape is None:
        return False
    if isinstance(y, (int, float)):
        return float(y) == number
    return isinstance(y, Tensor) and y.numel() == 1 and y.ndim <= len(shape) and float(y) == number


for _name, _kind in (
    ("add", "add"), ("sub", "sub"), ("mul", "mul"), ("div", "div"), ("true_divide", "div"), ("maximum", "max"),
    ("minimum", "min"),
):  # fmt: skip
    _HANDLERS[_name] = _binary(_kind)


@_handles("rsub")
def _rsub(b: _Builder, a: dict[str, Any]) -> Any:
    if a.get("alpha", 1) != 1:
        raise b.refuse("rsub with alpha is not supported")
    return b.emit(g.Binary, a["other"], a["self"], kind="sub")


@_handles("pow")
def _pow(b: _Builder, a: dict[str, Any]) -> Any:
    x, e = a["self"], a["exponent"]
    if isinstance(e, (int, float)):
        kinds = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
        if float(e) in kinds:
            return b.act(x, kinds[float(e)])
        if float(e) == 1.0:
            return x
    return b.emit(g.Binary, x, e, kind="pow")


# pooling, resizing


@_handles("max_pool2d", "max_pool2d_with_indices")
def _max_pool(b: _Builder, a: dict[str, Any]) -> Any:
    k = _two(a["kernel_size"])
    y = b.emit(
        g.Pool, a["self"], kind="max", kernel_size=k, stride=_two(a["stride"]) if a["stride"] else k,
        padding=_four(a["padding"]), dilation=_two(a["dilation"]), ceil_mode=bool(a["ceil_mode"]),
    )  # fmt: skip
    return (y, None) if "indices" in b.node.target._schema.name else y


@_handles("avg_pool2d")
def _avg_pool(b: _Builder, a: dict[str, Any]) -> Any:
    k = _two(a["kernel_size"])
    return b.emit(
        g.Pool, a["self"], kind="avg", kernel_size=k, stride=_two(a["stride"]) if a["stride"] else k,
        padding=_four(a["padding"]), ceil_mode=bool(a["ceil_mode"]), count_include_pad=bool(a["count_include_pad"]),
        divisor=int(a["divisor_override"] or 0),
    )  # fmt: skip


@_handles("avg_pool3d")
def _avg_pool3d(b: _Builder, a: dict[str, Any]) -> Any:
    """Only windows along the first of the three dimensions, which is what local response norm is made of."""
    k, s, p = [list(a[n]) for n in ("kernel_size", "stride", "padding")]
    n, c, d, h, w = b.shape(a["self"])
    if (
        k[1:] != [1, 1]
        or (s and set(s) != {1})
        or any(p[1:])
        or not isinstance(h, int)
        or not isinstance(w, int)
    ):
        raise b.refuse("3-dimensional pooling is not supported")
    x = b.reshape(a["self"], (n, c, d, h * w))
    y = b.emit(
        g.Pool, x, kind="avg", kernel_size=(k[0], 1), padding=(p[0], 0, p[0], 0),
        count_include_pad=bool(a["count_include_pad"]), divisor=int(a["divisor_override"] or 0),
    )  # fmt: skip
    return b.reshape(y, b.out_shape)


@_handles("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")
def _adaptive_pool(b: _Builder, a: dict[str, Any]) -> Any:
    is_max = "max" in b.node.target._schema.name
    h, w = b.shape(a["self"])[2:]
    size = [int(o if o is not None else d) for o, d in zip(a["output_size"], (h, w), strict=True)]  # type: ignore[arg-type]
    y: Any = a["self"]
    if (h, w) != tuple(size):
        y = b.emit(g.AdaptivePool, y, kind="max" if is_max else "avg", output_size=_two(size))
    return (y, None) if is_max else y


@_handles("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d")
def _upsample(b: _Builder, a: dict[str, Any]) -> Any:
    name = b.node.target._schema.name
    oh, ow = b.out_shape[2:]
    x = a["input"] if "input" in a else a["self"]
    scale = None
    given = a.get("scale_factors") or ([a.get("scales_h"), a.get("scales_w")] if a.get("scales_h") else None)
    if given and all(given):
        scale = (float(given[0]), float(given[1]))
    if not isinstance(oh, int) or not isinstance(ow, int):
        raise b.refuse("a size that depends on the batch")
    if "bilinear" in name:
        coordinates = "align_corners" if a["align_corners"] else "half_pixel"
        return b.emit(g.Resize, x, size=(oh, ow), mode="bilinear", coordinates=coordinates, scale=scale)
    if "exact" in name:
        raise b.refuse("interpolation 'nearest-exact' is not supported")
    return b.emit(g.Resize, x, size=(oh, ow), mode="nearest", coordinates="asymmetric", scale=scale)


@_handles("upsample_bicubic2d", "grid_sampler_2d", "upsample_linear1d", "upsample_trilinear3d")
def _refused(b: _Builder, a: dict[str, Any]) -> Any:
    raise b.refuse(f"operator {b.node.target} is not supported")


# shapes


@_handles("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "unflatten")
def _reshape(b: _Builder, a: dict[str, Any]) -> Any:
    return b.reshape(a["self"], b.out_shape)


@_handles(
    "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "dropout", "feature_dropout", "native_dropout",
    "_to_copy", "to", "alpha_dropout",
)  # fmt: skip
def _same(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"] if "self" in a else a["input"]
    return (x, None) if b.node.target._schema.name == "aten::native_dropout" else x


@_handles("copy")
def _copy(b: _Builder, a: dict[str, Any]) -> Any:
    if g.same_shape(b.shape(a["src"]), b.out_shape):
        return a["src"]
    return b.emit(g.Expand, a["src"], shape=b.out_shape)


@_handles("permute", "transpose", "t", "movedim")
def _permute(b: _Builder, a: dict[str, Any]) -> Any:
    rank = len(b.shape(a["self"]))
    perm = list(range(rank))
    if "dims" in a:
        perm = [int(d) % rank for d in a["dims"]]
    elif "dim0" in a:
        i, j = int(a["dim0"]) % rank, int(a["dim1"]) % rank
        perm[i], perm[j] = perm[j], perm[i]
    elif rank == 2:
        perm = [1, 0]
    if perm == list(range(rank)):
        return a["self"]
    return b.emit(g.Transpose, a["self"], perm=tuple(perm))


@_handles("expand")
def _expand(b: _Builder, a: dict[str, Any]) -> Any:
    if g.same_shape(b.shape(a["self"]), b.out_shape):
        return a["self"]
    return b.emit(g.Expand, a["self"], shape=b.out_shape)


@_handles("repeat")
def _repeat(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    out = b.out_shape
    shape: g.Shape = tuple([1] * (len(out) - len(b.shape(x)))) + b.shape(x)
    x = b.reshape(x, shape)
    for i, (d, o) in enumerate(zip(shape, out, strict=True)):
        if d == o:
            continue
        if isinstance(o, g.Sym):
            raise b.refuse("repeating along the batch is not supported")
        x = b.emit(g.Concat, *[x] * (o // int(d)), axis=i)  # type: ignore[arg-type]
    return x


@_handles("cat", "concat")
def _cat(b: _Builder, a: dict[str, Any]) -> Any:
    parts = [t for t in a["tensors"] if 0 not in b.shape(t)]
    axis = int(a["dim"]) % len(b.out_shape)
    return parts[0] if len(parts) == 1 else b.emit(g.Concat, *parts, axis=axis)


def _slice_of(b: _Builder, x: Any, axis: int, start: int, stop: int, step: int = 1) -> Any:
    d = b.shape(x)[axis]
    if isinstance(d, int) and (start, stop, step) == (0, d, 1):
        return x
    return b.emit(g.Slice, x, axis=axis, start=start, stop=stop, step=step)


@_handles("slice")
def _slice(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    if g.same_shape(shape, b.out_shape) and (a["step"] or 1) == 1:
        return x
    axis = int(a["dim"]) % len(shape)
    d = shape[axis]
    if not isinstance(d, int):
        raise b.refuse("slicing the batch is not supported")
    if isinstance(a["start"], g.Sym) or isinstance(a["end"], g.Sym):
        raise b.refuse("a slice whose bounds depend on the batch is not supported")
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(d)
    return _slice_of(b, x, axis, start, max(start, stop), step)


@_handles("select")
def _select(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    axis = int(a["dim"]) % len(shape)
    d = shape[axis]
    if not isinstance(d, int):
        raise b.refuse("choosing one image of the batch is not supported")
    i = int(a["index"]) % d
    return b.reshape(_slice_of(b, x, axis, i, i + 1), b.out_shape)


@_handles("split", "split_with_sizes", "chunk", "unsafe_split", "tensor_split", "unsafe_chunk")
def _split(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    axis = int(a["dim"]) % len(b.shape(x))
    out, at = [], 0
    for val in b.node.meta["val"]:
        d = b.dim(val.shape[axis])
        if not isinstance(d, int):
            raise b.refuse("splitting the batch is not supported")
        out.append(_slice_of(b, x, axis, at, at + d))
        at += d
    return out


@_handles("unbind")
def _unbind(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    axis = int(a["dim"]) % len(shape)
    d = shape[axis]
    if not isinstance(d, int):
        raise b.refuse("splitting the batch is not supported")
    rest = (*shape[:axis], *shape[axis + 1 :])
    return [b.reshape(_slice_of(b, x, axis, i, i + 1), rest) for i in range(d)]


@_handles("roll")
def _roll(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    if not a["dims"]:
        raise b.refuse("rolling the flattened tensor is not supported")
    for s, axis in zip(a["shifts"], a["dims"], strict=True):
        d = shape[axis]
        if not isinstance(d, int):
            raise b.refuse("rolling the batch is not supported")
        s = int(s) % d
        if s:
            parts = [
                _slice_of(b, x, axis % len(shape), d - s, d),
                _slice_of(b, x, axis % len(shape), 0, d - s),
            ]
            x = b.emit(g.Concat, *parts, axis=axis % len(shape))
    return x


@_handles("index", "index_select")
def _index(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    if "dim" in a:
        axis, index = int(a["dim"]) % len(b.shape(x)), a["index"]
    else:
        used = [(i, t) for i, t in enumerate(a["indices"]) if t is not None]
        if len(used) != 1:
            raise b.refuse("indexing by several tensors is not supported")
        axis, index = used[0]
    if (
        not isinstance(index, Tensor)
        or index.dtype == torch.bool
        or index.ndim != 1
        or not isinstance(x, Ref)
    ):
        raise b.refuse("indexing by anything but a constant list of integers is not supported")
    d = b.shape(x)[axis]
    if not isinstance(d, int):
        raise b.refuse("indexing the batch is not supported")
    at = [int(i) % d for i in index.tolist()]
    runs: list[list[int]] = []
    for i in at:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    if len(runs) > 64:
        raise b.refuse(f"indexing in {len(runs)} pieces is not supported")
    parts = [_slice_of(b, x, axis, s, e) for s, e in runs]
    return parts[0] if len(parts) == 1 else b.emit(g.Concat, *parts, axis=axis)


@_handles(
    "constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d"
)
def _pad(b: _Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    name = b.node.target._schema.name
    mode = a.get("mode") or (
        "reflect" if "reflection" in name else "edge" if "replication" in name else "constant"
    )
    mode = {"replicate": "edge"}.get(mode, mode)
    rank = len(b.shape(x))
    flat = a["pad"] if "pad" in a else a["padding"]
    before, after = [0] * rank, [0] * rank
    for i in range(len(flat) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = int(flat[2 * i]), int(flat[2 * i + 1])
    if not any(before) and not any(after):
        return x
    value = float(a.get("value") or 0.0)
    return b.emit(g.Pad, x, before=tuple(before), after=tuple(after), mode=mode, value=value)


@_handles("pixel_shuffle")
def _pixel_shuffle(b: _Builder, a: dict[str, Any]) -> Any:
    x, r = a["self"], int(a["upscale_factor"])
    n, c, h, w = b.shape(x)
    assert isinstance(c, int) and isinstance(h, int) and isinstance(w, int)
    x = b.reshape(x, (n, c // (r * r), r, r, h, w))
    return b.reshape(b.emit(g.Transpose, x, perm=(0, 1, 4, 2, 5, 3)), b.out_shape)


@_handles("channel_shuffle")
def _channel_shuffle(b: _Builder, a: dict[str, Any]) -> Any:
    x, k = a["self"], int(a["groups"])
    n, c, h, w = b.shape(x)
    assert isinstance(c, int)
    x = b.reshape(x, (n, k, c // k, h, w))
    return b.reshape(b.emit(g.Transpose, x, perm=(0, 2, 1, 3, 4)), b.out_shape)


@_handles(
    "full",
    "zeros",
    "ones",
    "full_like",
    "zeros_like",
    "ones_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "empty_like",
)
def _full(b: _Builder, a: dict[str, Any]) -> Any:
    name = b.node.target._schema.name
    fill = 1.0 if "ones" in name else 0.0 if ("zeros" in name or "empty" in name) else a["fill_value"]
    shape = b.out_shape
    if any(isinstance(d, g.Sym) for d in shape):
        if b.node.meta["val"].dtype != torch.float32:
            raise b.refuse(f"gives {b.node.meta['val'].dtype}; the engine computes in float32")
        return b.emit(g.Expand, torch.full([1] * len(shape), float(fill)), shape=shape)
    return torch.full([int(d) for d in shape], fill, dtype=b.node.meta["val"].dtype)  # type: ignore[arg-type]


# reductions


def _axes(a: dict[str, Any], rank: int) -> tuple[int, ...]:
    dim = a.get("dim")
    if dim is None or dim == []:
        return tuple(range(rank))
    dims = [dim] if isinstance(dim, int) else dim
    return tuple(sorted(int(d) % rank for d in dims))


def _reduce(kind: str) -> Handler:
    def handler(b: _Builder, a: dict[str, Any]) -> Any:
        if "other" in a:  # max and min of two tensors
            return _binary(kind)(b, a)
        x = a["self"]
        axes = _axes(a, len(b.shape(x)))
        keep = bool(a.get("keepdim"))
        y = b.emit(g.Reduce, x, kind=kind, axes=axes, keepdims=keep)
        return (y, None) if isinstance(b.node.meta["val"], (tuple, list)) else y

    return handler


for _name, _kind in (
    ("mean", "mean"), ("sum", "sum"), ("amax", "max"), ("amin", "min"), ("prod", "prod"), ("logsumexp", "log_sum_exp"),
    ("max", "max"), ("min", "min"),
):  # fmt: skip
    _HANDLERS[_name] = _reduce(_kind)


@_handles("linalg_vector_norm")
def _norm(b: _Builder, a: dict[str, Any]) -> Any:
    kind = {1: "l1", 2: "l2"}.get(a["ord"])
    if kind is None:
        raise b.refuse(f"norm of order {a['ord']} is not supported")
    return _reduce(kind)(b, a)


@_handles("softmax", "_softmax", "log_softmax", "_log_softmax", "special_softmax")
def _softmax(b: _Builder, a: dict[str, Any]) -> Any:
    log = "log" in b.node.target._schema.name
    axis = int(a["dim"]) % len(b.out_shape)
    return b.emit(g.Softmax, a["self"], axis=axis, log=log)
