"""Whether an ONNX file computes in integers where a runtime has kernels for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["is_quantized"]

#: Operators that multiply integers, of ai.onnx and of ONNX Runtime's own domain.
_INTEGER = {
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
_PRODUCTS = {"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}
#: What may stand between dequantized weights and the product that reads them.
_MOVES = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def is_quantized(model: Any) -> bool:
    """Whether integer operators occur, or weights come to a convolution or matrix product through
    DequantizeLinear."""
    graphs = [model.graph, *model.functions]
    nodes = [node for graph in graphs for node in _nodes(graph)]
    if any(n.op_type in _INTEGER for n in nodes):
        return True
    if not any(n.op_type == "DequantizeLinear" for n in nodes):
        return False
    known = {t.name for t in model.graph.initializer} | {
        o for n in nodes if n.op_type == "Constant" for o in n.output
    }
    weights: set[str] = set()
    while True:  # again where the file has a node before what it reads
        found = len(known) + len(weights)
        for node in nodes:
            read = [n for n in node.input if n]
            if not read:
                continue
            if known.issuperset(read):
                known.update(node.output)
            sources = known if node.op_type == "DequantizeLinear" else weights
            if (sources is known or node.op_type in _MOVES) and read[0] in sources:
                weights.update(node.output)
            elif node.op_type in _PRODUCTS and not weights.isdisjoint(read[:2]):
                return True
        if len(known) + len(weights) == found:
            return False


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph or function, those of the graphs inside them included."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _nodes(inner)
        yield node
