"""Operators of ONNX that ONNX itself defines by simpler ones, written out where the engine has the
simpler ones alone: RMSNormalization, Attention and what else new opsets bring."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from actzip.runtime.onnx_file import onnx_package

__all__ = ["defined"]

#: Those that are written out. What the engine has by itself, and what is defined in a way that it
#: lacks, is not here.
_OPERATORS = {
    "Attention", "CenterCropPad", "MeanVarianceNormalization", "RMSNormalization", "RotaryEmbedding",
    "Shrink", "Swish",
}  # fmt: skip
_DOMAIN = "actzip.defined"


def defined(model: Any) -> Any:
    """``model``, or a copy in which such nodes are what ONNX defines them to be."""
    wanted = [n for n in model.graph.node if n.op_type in _OPERATORS and n.domain in ("", "ai.onnx")]
    if not wanted:
        return model
    onnx = onnx_package()
    opset = max((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=0)
    types = _types(onnx, model)
    copied = type(model)()
    copied.CopyFrom(model)
    for k, node in enumerate(copied.graph.node):
        if node.op_type not in _OPERATORS or node.domain not in ("", "ai.onnx"):
            continue
        body = _body(onnx, node, opset, types)
        if body is None:
            continue
        body.domain, body.name = _DOMAIN, f"{node.op_type}_{k}"
        copied.functions.append(body)
        node.domain, node.op_type = body.domain, body.name
    if len(copied.functions) == len(model.functions):
        return model
    copied.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    with suppress(Exception):  # a definition that cannot be put in: the node stays as it is
        from onnx import inliner

        return inliner.inline_selected_functions(
            copied, [(f.domain, f.name) for f in copied.functions if f.domain == _DOMAIN]
        )
    return model


def _types(onnx: Any, model: Any) -> dict[str, Any]:
    """Types and shapes of values, as far as ONNX can tell."""
    bare = type(model)()
    bare.CopyFrom(model)
    with suppress(Exception):
        bare = onnx.shape_inference.infer_shapes(bare)
    graph = bare.graph
    types = {v.name: v.type for v in (*graph.value_info, *graph.input, *graph.output)}
    for t in graph.initializer:
        types[t.name] = onnx.helper.make_tensor_type_proto(t.data_type, list(t.dims))
    return types


def _body(onnx: Any, node: Any, opset: int, types: dict[str, Any]) -> Any:
    """The definition of a node as a function of its own; None where there is none."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
        plain = [v for v in schema.function_opset_versions if v <= opset]
        depending = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        if plain:
            data = schema.get_function_with_opset_version(max(plain))
        elif depending:
            given = [types[n].SerializeToString() if n else b"" for n in node.input]
            data = schema.get_context_dependent_function_with_opset_version(
                max(depending), node.SerializeToString(), given
            )
        else:
            return None
    except Exception:  # an operator of another opset, or operands of types that ONNX cannot tell
        return None
    made = onnx.FunctionProto()
    made.ParseFromString(data)
    for entry in made.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset  # what it is made of means the same there
    said = {a.name for a in node.attribute}
    defaults = {a.name: a.default_value for a in schema.attributes.values() if a.default_value.name}
    node.attribute.extend(defaults[n] for n in made.attribute if n in defaults and n not in said)
    return made
