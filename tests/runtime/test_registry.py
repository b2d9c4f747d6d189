"""The tables of operators and of elementwise functions, and that the engine's are the same."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip._native import _engine
from actzip.errors import UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops, registry
from actzip.runtime.acts import ACTS, Act
from actzip.runtime.interpret import apply_act, interpret
from actzip.runtime.lower import lower


def test_the_engine_has_the_elementwise_functions_of_the_table_and_no_others():
    kinds = {
        Act.of(kind, param=np.ones(1, np.float32) if row.param else None).kind for kind, row in ACTS.items()
    }
    assert kinds == set(_engine.activations())


@pytest.mark.parametrize("kind", list(ACTS))
def test_traits_of_a_row_are_those_of_the_function(kind):
    param = np.full(1, 0.25, np.float32) if ACTS[kind].param else None
    act = Act.of(kind, param=param)
    assert act.keeps_zero == (apply_act(act, torch.zeros(1)).item() == 0.0)
    low = apply_act(act, torch.linspace(-4.5, -3.05, 101))  # where all that cut anything off give zeros
    assert act.sparsifies == bool((low == 0).all())


def test_every_node_class_has_a_lowering_and_a_meaning():
    from actzip.runtime.interpret import _MEANING
    from actzip.runtime.ops.elsewhere import Elsewhere

    def leaves(cls):
        found = cls.__subclasses__()
        return {cls} if not found else set().union(*map(leaves, found))

    nodes = {c for c in leaves(g.Node) if c.__module__.startswith("actzip.")}
    assert nodes == {*registry.LOWER, Elsewhere}  # that one is for modules alone
    assert nodes == {*_MEANING, ops.Reshape, ops.Expand, Elsewhere}


def test_an_operator_that_nobody_has_is_refused_in_one_place():
    class Odd(g.Node):
        op = "odd"

        def infer(self, shapes):
            return shapes[0]

    graph = g.Graph()
    graph.add_input("x", (g.Sym(), 3))
    graph.add(Odd("o", ("x",), "y"))
    graph.outputs = ["y"]
    with pytest.raises(UnsupportedError, match="odd 'o': the engine does not have it"):
        lower(graph)
    with pytest.raises(UnsupportedError, match="odd 'o': the interpreter does not know it"):
        interpret(graph, {"x": torch.zeros(1, 3)})
    builder = _engine.PlanBuilder()
    a, b = (builder.value(n, [1, 3], [True, False], "plain") for n in "ab")
    builder.input(a)
    with pytest.raises(ValueError, match="is not known"):
        builder.node("odd", "o", [a], b)
        builder.output(b)
        builder.build()


def test_pickles_that_name_the_former_modules_still_load():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    fast = actzip.compile(model, x, tune=False, cache=False)
    data = pickle.dumps(fast, protocol=2)
    old = re.sub(rb"cactzip\.runtime\.(ops\.\w+|acts)\n", b"cactzip.runtime.graph\n", data)
    assert old.count(b"cactzip.runtime.graph\n") > data.count(b"cactzip.runtime.graph\n")
    assert torch.equal(pickle.loads(old)(x), fast(x))


def test_former_names_still_import():
    from actzip.runtime.capture import capture, flat_inputs, from_exported  # noqa: F401
    from actzip.runtime.compiled import advice, peak_gflops  # noqa: F401
    from actzip.runtime.graph import Act as former
    from actzip.runtime.lower import can_pack, choose_storage, packable  # noqa: F401
    from actzip.runtime.onnx_import import OPERATORS, NeedsConstant, from_onnx, load_onnx  # noqa: F401

    assert former is Act
    assert g.Conv2d is ops.Conv2d
    with pytest.raises(AttributeError, match="Nothing"):
        g.Nothing  # noqa: B018
