"""ONNX QuantizeLinear / DequantizeLinear, both ways.

``export_qdq`` writes a quantized model as a float ONNX graph with a (Clip, QuantizeLinear,
DequantizeLinear) triple at each quantized map, and 8-bit weights as int8 initialisers with
DequantizeLinear. Clip keeps ranges that are narrower than the integer type (4 to 7, 9 to 15 bits;
symmetric signed ones) exact: ONNX rounds half to even and divides, as actzip does, so the integers
are the same. Maps of more than 8 bits need opset 21.

``import_qdq`` reads the scales of any QDQ graph and puts them onto a PyTorch model. A map is found
by the name that ``export_qdq`` gave its QuantizeLinear node, else by ``names``, else by the module
path in the name of the node before it (as PyTorch's exporter writes it), else by order where there
are as many as the model has activations.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Site, eval_mode, find_sites
from actzip.errors import ActzipWarning, DataError, InputError, LayerError
from actzip.quantize.linear import MAX_BITS, MIN_BITS, QuantRange
from actzip.quantize.model import (
    INPUT,
    WEIGHT,
    Quantization,
    SiteQuantizer,
    quantization,
    remove_quantization,
)
from actzip.quantize.torch_onnx import TRACED_OPSET, write_traced

__all__ = ["QdqMap", "export_qdq", "import_qdq", "read_qdq"]

PREFIX = "actzip:"
_DOMAIN = "actzip.export"


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise DataError("onnx is not installed; `pip install actzip[onnx]` brings it") from error
    return onnx


class _Mark(torch.autograd.Function):
    """The identity; in an exported graph a node that bears the map's name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, name: str) -> Any:
        return g.op(f"{_DOMAIN}::Mark", x, name_s=name).setType(x.type())


def _mark(x: Tensor, name: str) -> Tensor:
    return _Mark.apply(x, name)  # type: ignore[no-untyped-call, no-any-return]


def export_qdq(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
) -> None:
    """Writes a quantized model as ONNX with QuantizeLinear and DequantizeLinear nodes.

    Args:
        model: quantized by :func:`actzip.quantize`; left as it is.
        example: an input (a tensor or a tuple of tensors).
        opset: 13 or later; 17 by default, 21 where a map has more than 8 bits.
        dynamic_batch: the first dimension of inputs and outputs may vary.

    Raises:
        InputError: the model is not quantized, or the opset is too old for its bits.
        DataError: onnx is not installed.
    """
    onnx = _onnx()
    quantizers = quantization(model)
    wide = any(q.bits > 8 for q in (*quantizers.sites.values(), *quantizers.weights.values()))
    target = opset or (21 if wide else 17)
    if target < (21 if wide else 13):
        raise InputError(f"opset {target} is too old: {'21 for more than 8 bits' if wide else '13 or later'}")
    plain = copy.deepcopy(model).eval()
    held = remove_quantization(plain)
    assert held is not None
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.__dict__["inplace"] = False  # a plain attribute of torch's own modules

    def activation(site: Site, y: Tensor) -> Tensor | None:
        return _mark(y, site.name) if site.name in held.sites else None

    def compute(site: Site, call: ComputeCall) -> ComputeCall | None:
        x, w = call.input, call.weight
        if site.name + INPUT in held.sites:
            x = _mark(x, site.name + INPUT)
        if site.name + WEIGHT in held.weights:
            w = _mark(w, site.name + WEIGHT)
        if x is call.input and w is call.weight:
            return None
        return ComputeCall(
            x, w, call.stride, call.padding, call.dilation, call.output_padding, call.groups, call.transposed
        )

    inputs = example if isinstance(example, tuple) else (example,)
    names_in = input_names or (["input"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))])
    with torch.no_grad():
        result = plain(*inputs)
    count = len(result) if isinstance(result, (tuple, list)) else 1
    names_out = output_names or (["output"] if count == 1 else [f"output{i}" for i in range(count)])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / "raw.onnx"
        with ActivationTap(plain, activation, compute), torch.no_grad():
            write_traced(
                plain,
                inputs,
                raw,
                (names_in, names_out),
                target,
                dynamic_batch,
                training=torch.onnx.TrainingMode.PRESERVE,
                custom_opsets={_DOMAIN: 1},
            )
        graph = onnx.load(str(raw))
        marked = _marks_to_identity(onnx, graph)
        if target > TRACED_OPSET:
            graph = onnx.version_converter.convert_version(graph, target)
        _insert_qdq(onnx, graph, held, marked)
        onnx.checker.check_model(graph)
        done = Path(folder) / "done.onnx"
        onnx.save(graph, str(done))
        done.replace(path)


def _marks_to_identity(onnx: Any, graph: Any) -> dict[str, str]:
    """Every Mark becomes an Identity, which any tool knows; gives {its output: the map's name}."""
    marked = {}
    nodes = []
    for node in graph.graph.node:
        if node.domain == _DOMAIN:
            marked[node.output[0]] = next(a.s.decode() for a in node.attribute if a.name == "name")
            node = onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]])
        nodes.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    kept = [o for o in graph.opset_import if o.domain != _DOMAIN]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)
    return marked


def _insert_qdq(onnx: Any, graph: Any, held: Quantization, marked: Mapping[str, str]) -> None:
    """Identities of ``marked`` become Clip, QuantizeLinear, DequantizeLinear (maps) or
    DequantizeLinear (weights)."""
    g = graph.graph
    arrays = {t.name: t for t in g.initializer}
    built = _Built(onnx, graph)
    for node in g.node:
        name = marked.get(node.output[0]) if node.op_type == "Identity" else None
        if name is None:
            built.nodes.append(node)
        else:
            weight = held.weights.get(name)
            q = weight or held.sites[name]
            stored = arrays.get(node.input[0]) if weight is not None else None
            built.quantized(node, q, PREFIX + name, axis=0 if weight else 1, stored=stored)
    del g.node[:]
    g.node.extend(built.nodes)
    reads = {i for n in built.nodes for i in n.input} | {o.name for o in g.output}
    kept = [t for t in g.initializer if t.name in reads]
    del g.initializer[:]
    g.initializer.extend(kept)
    g.initializer.extend(built.constants.values())


class _Built:
    """Nodes and constants of a graph with quantizers in it."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx = onnx
        self.graph = graph
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = self.onnx.numpy_helper.from_array(value, name)
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def quantized(self, node: Any, q: SiteQuantizer, tag: str, axis: int, stored: Any) -> None:
        """``q`` in the place of the identity ``node``; of a constant where one is ``stored``."""
        scale = q.scale.detach().cpu().numpy().astype(np.float32)
        many, dtype = scale.size > 1, q.range.numpy_dtype
        s = self.constant(f"{tag}/scale", scale if many else scale.reshape(()))
        z = self.constant(f"{tag}/zero", np.zeros(scale.shape if many else (), dtype))
        attributes = {"axis": axis} if many else {}
        if stored is not None:
            w = torch.from_numpy(self.onnx.numpy_helper.to_array(stored).astype(np.float32))
            integers = self.constant(f"{tag}/integers", q.integers(w.unsqueeze(0)).numpy()[0])
        else:
            source = self._bounded(node.input[0], q.range, scale, tag)
            integers = self.node("QuantizeLinear", [source, s, z], f"{tag}/integers", name=tag, **attributes)
        self.node(
            "DequantizeLinear", [integers, s, z], node.output[0], name=f"{tag}/dequantize", **attributes
        )

    def _bounded(self, source: str, r: QuantRange, scale: NDArray[Any], tag: str) -> str:
        """``source`` with what its integer type would hold, but the range does not, cut off."""
        info = np.iinfo(r.numpy_dtype)
        if r.qmax == info.max and r.qmin == info.min:
            return source
        many = scale.size > 1
        shape = [1, -1, *([1] * (_rank(self.onnx, self.graph, source) - 2))] if many else []
        if not many:
            low = self.constant(f"{tag}/low", (scale * np.float32(r.qmin)).reshape(shape))
            top = self.constant(f"{tag}/top", (scale * np.float32(r.qmax)).reshape(shape))
            return self.node("Clip", [source, low, top], f"{tag}/clip")
        # Clip takes one number; per channel, Min and Max do it
        top = self.constant(f"{tag}/top", (scale * np.float32(r.qmax)).reshape(shape))
        source = self.node("Min", [source, top], f"{tag}/min")
        if r.signed:
            low = self.constant(f"{tag}/low", (scale * np.float32(r.qmin)).reshape(shape))
            source = self.node("Max", [source, low], f"{tag}/max")
        return source


def _rank(onnx: Any, graph: Any, tensor: str) -> int:
    for value in onnx.shape_inference.infer_shapes(graph).graph.value_info:
        if value.name == tensor:
            return len(value.type.tensor_type.shape.dim)
    return 4


# --- import ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QdqMap:
    """One QuantizeLinear of an ONNX graph.

    Attributes:
        node: its name; ``tensor``: what it quantizes, before any Clip; ``producer``: name of the
            node that makes that (empty for graph inputs and initialisers) and ``producer_op``, its
            operator.
        scale: float32, 1 or C numbers; ``bits``, ``signed``: the range.
        weight: it quantizes an initialiser, or is a DequantizeLinear of one.
    """

    node: str
    tensor: str
    producer: str
    producer_op: str
    scale: NDArray[np.float32]
    bits: int
    signed: bool
    weight: bool = False


def read_qdq(path: str | Path) -> list[QdqMap]:
    """Every quantized tensor of a QDQ graph, in the order of its nodes.

    Raises:
        DataError: no such file, or it is no ONNX model.
        InputError: a zero point that is neither 0 (signed, symmetric) nor the type's least value
            (unsigned): zero would not be at the end or the middle of the range, which these
            quantizers need; the tensor is named.
    """
    onnx = _onnx()
    try:
        graph = onnx.load(str(path)).graph
    except FileNotFoundError as error:
        raise DataError(f"no ONNX model at {path}") from error
    except Exception as error:  # protobuf's errors have no common public class
        raise DataError(f"{path} is no ONNX model: {error}") from error
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    makers: dict[str, Any] = {o: node for node in graph.node for o in node.output}
    for node in graph.node:
        if node.op_type == "Constant":
            for a in node.attribute:
                if a.name == "value":
                    arrays[node.output[0]] = onnx.numpy_helper.to_array(a.t)
    read = (_read_map(node, arrays, makers, f"{path}: {node.op_type} ") for node in graph.node)
    return [m for m in read if m is not None]


def _read_map(
    node: Any, arrays: Mapping[str, NDArray[Any]], makers: Mapping[str, Any], where: str
) -> QdqMap | None:
    """What ``node`` says of a quantized tensor; None where it is no quantizer, or of a bias."""
    quantizes = node.op_type == "QuantizeLinear"
    if not quantizes and not (node.op_type == "DequantizeLinear" and node.input[0] in arrays):
        return None
    if not quantizes and arrays[node.input[0]].dtype == np.int32:
        return None  # a bias
    where += f"{node.name or node.output[0]!r}"
    scale = arrays.get(node.input[1])
    zero = arrays.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scale is None or (len(node.input) > 2 and node.input[2] and zero is None):
        raise InputError(f"{where}: its scale or zero point is no constant")
    if zero is None:
        zero = np.zeros((), np.uint8 if quantizes else arrays[node.input[0]].dtype)
    bits, signed = _integer_type(zero, where)
    scale = np.asarray(scale, np.float32).reshape(-1)
    tensor = node.input[0]
    if not quantizes:
        return QdqMap(node.name, tensor, "", "", scale, bits, signed, True)
    tensor, top = _before_clip(tensor, makers, arrays)
    if top is not None:
        levels = float((top.ravel() / scale).max())
        if 1 <= levels <= np.iinfo(zero.dtype).max - int(zero.ravel()[0]):
            bits = round(np.log2(levels + 1)) + (1 if signed else 0)
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"{where}: {bits} bits; {MIN_BITS} to {MAX_BITS} are supported")
    maker = makers.get(tensor)
    by, kind = (maker.name, maker.op_type) if maker is not None else ("", "")
    return QdqMap(node.name, tensor, by, kind, scale, bits, signed, tensor in arrays)


def _integer_type(zero: NDArray[Any], where: str) -> tuple[int, bool]:
    """Bits and sign of the integers with this zero point."""
    if zero.dtype.kind not in "iu" or zero.dtype.itemsize > 2:
        raise InputError(f"{where}: {zero.dtype} is no 8- or 16-bit integer type")
    info = np.iinfo(zero.dtype)
    if (zero == info.min).all():
        return info.bits, False
    if (zero == 0).all():
        return info.bits, True
    raise InputError(
        f"{where}: zero point {zero.ravel()[0]} of {zero.dtype}; 0 or {info.min} is needed "
        "(quantize ReLU outputs unsigned and others symmetric)"
    )


def _before_clip(
    tensor: str, makers: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> tuple[str, NDArray[Any] | None]:
    """The tensor before the Clip, or Min and Max, that ``export_qdq`` writes, and their upper bound."""
    top = None
    while True:
        node = makers.get(tensor)
        ours = node is not None and tensor.startswith(PREFIX)
        if node is None or not ours or node.op_type not in ("Clip", "Min", "Max"):
            return tensor, top
        if node.op_type == "Clip":
            top = arrays.get(node.input[2])
        elif node.op_type == "Min":
            top = arrays.get(node.input[1])
        tensor = node.input[0]


_OPERATORS = {  # kind of activation -> last operator that exporters make of it
    "relu": ("Relu", "Clip", "Max"),
    "relu6": ("Clip", "Min"),
    "threshold": ("ThresholdedRelu", "Where", "Mul"),
    "sigmoid": ("Sigmoid",),
    "hardsigmoid": ("HardSigmoid",),
    "tanh": ("Tanh",),
    "silu": ("Mul",),
    "hardswish": ("HardSwish", "Mul"),
    "gelu": ("Gelu", "Mul"),
    "mish": ("Mish", "Mul"),
    "leaky_relu": ("LeakyRelu",),
    "prelu": ("PRelu",),
    "elu": ("Elu",),
    "selu": ("Selu",),
    "celu": ("Celu",),
    "softplus": ("Softplus",),
}


def _module_path(node: str) -> str:
    """``/layer1/layer1.0/relu/Relu`` -> ``layer1.0.relu``, as PyTorch's exporter names nodes."""
    path = ""
    for part in node.strip("/").split("/")[:-1]:
        if path and part.startswith(path.rpartition(".")[2] + "."):
            path = ".".join(filter(None, [path.rpartition(".")[0], part]))
        else:
            path = f"{path}.{part}" if path else part
    return path


def import_qdq(
    model: nn.Module,
    path: str | Path,
    example: Any,
    *,
    names: Mapping[str, str] | None = None,
    weights: bool = True,
) -> nn.Module:
    """Quantizes ``model`` in place with the scales of a QDQ ONNX graph; gives it back.

    Args:
        example: an input of the model, to find its activation sites.
        names: {tensor or QuantizeLinear node: site name} where the graph's own names do not tell.
        weights: also take over weights quantized per output channel, where ``export_qdq`` named them.

    Quantized tensors that no activation of the model makes (network inputs, sums, pooled maps of
    other tools) are left out with a warning that counts them.

    Raises:
        DataError, InputError: as :func:`read_qdq`, and a site given two different scales.
        LayerError: ``names`` gives a site that the model does not have, or no map could be matched.
    """
    maps = read_qdq(path)
    matched = _Matched(model, example, path)
    left: list[QdqMap] = []
    for m in maps:
        if m.weight:
            if weights:
                matched.weight(m)
        elif not matched.by_name(m, names or {}):
            left.append(m)
    left = [m for m in left if not matched.by_producer(m)]
    if not matched.sites and matched.in_order([m for m in left if m.producer]):
        left = []
    if not matched.sites:
        raise LayerError(
            f"{path}: none of its {len(left)} quantized maps could be matched; give names={{...}}"
        )
    if left:
        warnings.warn(
            f"{path}: {len(left)} quantized tensors are no activation maps of the model and were left out "
            f"({', '.join(m.tensor for m in left[:3])} ...)",
            ActzipWarning,
            stacklevel=2,
        )
    return Quantization(matched.sites.values(), matched.weights.values()).attach(model)


class _Matched:
    """The quantizers of a model's sites, as far as the maps of a graph have been matched with them."""

    def __init__(self, model: nn.Module, example: Any, path: str | Path) -> None:
        self.path = path
        self.activations, computations = find_sites(model, example)
        self.kinds = {s.name: s.kind for s in self.activations}
        self.kinds.update({s.name + INPUT: "input" for s in computations})
        self.weight_names = {s.name + WEIGHT for s in computations}
        self.next = _next_activation(model, example)
        self.sites: dict[str, SiteQuantizer] = {}
        self.weights: dict[str, SiteQuantizer] = {}

    def weight(self, m: QdqMap) -> None:
        """Takes a weight that ``export_qdq`` named."""
        own = _own_name(m)
        if own in self.weight_names:
            self.weights[own] = _quantizer(own, m, "weight")

    def by_name(self, m: QdqMap, names: Mapping[str, str]) -> bool:
        """Takes ``m`` if ``names``, its own name or the module that made it says which site it is."""
        if m.tensor in names or m.node in names:
            name = names.get(m.tensor, names.get(m.node))
            if name not in self.kinds:
                raise LayerError(f"names: the model has no layer {name!r} (for {m.tensor!r} of {self.path})")
        elif _own_name(m) in self.kinds:
            name = _own_name(m)
        else:
            module = _module_path(m.producer)
            here = (s.name for s in self.activations if s.module == module and s.name not in self.sites)
            name = next((n for n in here if m.producer_op in _OPERATORS.get(self.kinds[n], ())), None)
        if name is None:
            return False
        _add(self.sites, _quantizer(name, m, self.kinds[name]), self.path)
        return True

    def by_producer(self, m: QdqMap) -> bool:
        """Takes ``m`` for the activation after its producer: other tools merge it into the quantizer."""
        name = None
        if m.producer_op in ("Conv", "Gemm", "MatMul", "BatchNormalization", "Add"):
            name = self.next.get(_module_path(m.producer))
        if name is None or name in self.sites:
            return False
        self.sites[name] = _quantizer(name, m, self.kinds[name])
        return True

    def in_order(self, maps: list[QdqMap]) -> bool:
        """Takes all ``maps`` in order, if there are as many as activations."""
        if not maps or len(maps) != len(self.activations):
            return False
        for m, s in zip(maps, self.activations):
            self.sites[s.name] = _quantizer(s.name, m, s.kind)
        return True


def _own_name(m: QdqMap) -> str:
    """The site that ``export_qdq`` wrote into the node's name; empty for other tools' nodes."""
    return m.node.removeprefix(PREFIX).removesuffix("/dequantize") if m.node.startswith(PREFIX) else ""


def _quantizer(name: str, m: QdqMap, kind: str) -> SiteQuantizer:
    return SiteQuantizer(name, QuantRange(m.bits, m.signed), torch.from_numpy(m.scale.copy()), kind)


def _add(sites: dict[str, SiteQuantizer], q: SiteQuantizer, path: str | Path) -> None:
    old = sites.get(q.name)
    if old is not None and (old.range != q.range or not torch.equal(old.scale, q.scale)):
        raise InputError(f"{path}: layer {q.name!r} is given two different scales")
    sites[q.name] = q


def _next_activation(model: nn.Module, example: Any) -> dict[str, str]:
    """Module of a convolution or linear layer -> the first activation site after it."""
    waiting: list[str] = []
    found: dict[str, str] = {}

    def activation(site: Site, y: Tensor) -> None:
        for module in waiting:
            found.setdefault(module, site.name)
        waiting.clear()

    def compute(site: Site, call: ComputeCall) -> None:
        waiting.clear()
        waiting.append(site.module)

    from actzip.activations import run_model

    with ActivationTap(model, activation, compute), eval_mode(model), torch.no_grad():
        run_model(model, example)
    return found
