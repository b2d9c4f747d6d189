"""Weights that stand in several layers are kept once."""

from __future__ import annotations

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops

__all__ = ["share_weights"]

_MANY = 1 << 12  # numbers from which on a second copy costs more than looking for it


def share_weights(graph: g.Graph) -> g.Graph:
    """Layers of equal weights (an unrolled cell's steps, one head on several maps) have one array: it is
    packed once and stays in the caches from step to step."""
    graph = graph.copy()
    found: dict[tuple[object, ...], list[g.Array]] = {}
    for node in graph.nodes:
        if not isinstance(node, (ops.Conv2d, ops.Linear)) or node.weight.size < _MANY:
            continue
        w = node.weight
        flat = w.reshape(-1)
        alike = found.setdefault((w.shape, w.dtype.str, flat[:16].tobytes(), flat[-16:].tobytes()), [])
        same = next((a for a in alike if a is w or np.array_equal(a, w)), None)
        if same is None:
            alike.append(w)
        else:
            node.weight = same
    return graph
