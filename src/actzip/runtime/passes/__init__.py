"""Rewrites of the Graph, each a function Graph -> Graph that keeps its meaning (within float rounding).

``optimize`` runs all of those that need no measurement, in order. None changes the graph that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from actzip.runtime import graph as g
from actzip.runtime.graph import Pass
from actzip.runtime.passes.branches import merge_branches, split_multipliers
from actzip.runtime.passes.edit import drop_dead
from actzip.runtime.passes.fold import (
    channel_affine,
    fold_affine_at_borders,
    fold_affine_forward,
    fold_batch_norm,
    fold_constants,
    fold_crops,
    fold_padding,
    sink_affine,
    spread_batch_norm,
)
from actzip.runtime.passes.fuse import fuse_activations, fuse_residuals, pool_means, sink_average_pools
from actzip.runtime.passes.moves import (
    channels_last,
    flatten_linear,
    lines_as_maps,
    merge_moves,
    place_concats,
    tokens_as_maps,
)
from actzip.runtime.passes.norms import recompose_norms
from actzip.runtime.passes.pointwise import merge_pointwise, split_upsampled
from actzip.runtime.passes.quantizers import recompose_quantizers
from actzip.runtime.passes.recompose import merge_acts, recompose_activations, scale_activations
from actzip.runtime.passes.repeats import repeats_as_resizes
from actzip.runtime.passes.shared import share_weights
from actzip.runtime.passes.signals import signals_as_channels
from actzip.runtime.passes.transposed import split_transposed
from actzip.runtime.passes.volumes import volumes_as_frames

__all__ = [
    "PASSES",
    "channel_affine",
    "channels_last",
    "drop_dead",
    "flatten_linear",
    "fold_affine_at_borders",
    "fold_affine_forward",
    "fold_batch_norm",
    "fold_constants",
    "fold_crops",
    "fold_padding",
    "fuse_activations",
    "fuse_residuals",
    "lines_as_maps",
    "merge_acts",
    "merge_branches",
    "merge_moves",
    "merge_pointwise",
    "optimize",
    "place_concats",
    "pool_means",
    "recompose_activations",
    "recompose_norms",
    "recompose_quantizers",
    "repeats_as_resizes",
    "scale_activations",
    "share_weights",
    "signals_as_channels",
    "sink_affine",
    "sink_average_pools",
    "split_multipliers",
    "split_transposed",
    "split_upsampled",
    "spread_batch_norm",
    "tokens_as_maps",
    "volumes_as_frames",
]

PASSES: tuple[Pass, ...] = (
    fold_constants,
    drop_dead,
    merge_moves,
    recompose_quantizers,
    recompose_activations,
    recompose_norms,
    repeats_as_resizes,
    tokens_as_maps,
    channels_last,
    recompose_activations,  # what transposes stood in
    recompose_norms,
    lines_as_maps,
    volumes_as_frames,
    channel_affine,
    fold_padding,
    fold_crops,
    spread_batch_norm,
    fold_batch_norm,
    merge_branches,
    scale_activations,
    fuse_activations,
    fuse_residuals,
    fuse_activations,
    sink_affine,
    fold_affine_forward,
    fold_affine_at_borders,
    split_transposed,
    merge_pointwise,
    split_upsampled,
    split_multipliers,
    signals_as_channels,
    sink_average_pools,
    pool_means,
    merge_moves,
    flatten_linear,
    merge_moves,
    place_concats,
    drop_dead,
    share_weights,
)


def optimize(graph: g.Graph, passes: Sequence[Pass] = PASSES) -> g.Graph:
    """``graph`` after every pass of ``passes``; validated."""
    for p in passes:
        graph = p(graph)
    graph.validate()
    return graph
