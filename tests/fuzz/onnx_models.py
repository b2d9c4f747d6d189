"""Mutated ONNX models against the front end and the engine: python tests/fuzz/onnx_models.py CASES [SEED]

Each case damages one of a few small models that hold the operators of CNN exports: bytes of the
file, dimensions, attributes, edges between nodes (cycles among them), operators, initialisers
(lost, cut, absurd), places of external data. It must end with a typed error of
:mod:`actzip.errors`, or with a plan that runs. Nothing else may happen: no other exception, no
crash, no case of more than LIMIT seconds of CPU time, no memory beyond BYTES, no byte of a file
outside the model's folder. `make fuzz-onnx` runs it with the native modules under AddressSanitizer
and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from actzip.errors import ActzipError
from actzip.runtime.compiled import compile_graph
from actzip.runtime.from_onnx import OPERATORS, from_onnx

LIMIT = 30
BYTES = 6 << 30
RUN_BYTES = 64 << 20  # plans that want more are built, not run
SECRET = b"SECRET" * 4096


def _model(nodes: list[Any], shape: list[Any], tensors: dict[str, Any], opset: int) -> ModelProto:
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "fuzz", infos[:1], infos[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def seeds() -> list[ModelProto]:
    """The models that are damaged."""
    rng = np.random.default_rng(0)

    def w(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    n = helper.make_node
    one = np.ones(8, np.float32)
    cnn = _model(
        [
            n("Conv", ["x", "w0", "b0"], ["a0"], pads=[1, 1, 1, 1], strides=[2, 2], kernel_shape=[3, 3]),
            n("BatchNormalization", ["a0", "one", "b0", "b0", "one"], ["a1"]),
            n("ThresholdedRelu", ["a1"], ["a2"], alpha=0.1),
            n("Conv", ["a2", "w1"], ["a3"], group=4, pads=[2, 2, 2, 2], dilations=[2, 2]),
            n("Clip", ["a3", "lo", "hi"], ["a4"]),
            n("MaxPool", ["a4"], ["p0"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1], ceil_mode=1),
            n("AveragePool", ["a4"], ["p1"], kernel_shape=[2, 2], auto_pad="SAME_UPPER", strides=[1, 1]),
            n("Concat", ["p0", "p1"], ["c0"], axis=1),
            n("Split", ["c0"], ["s0", "s1"], axis=1, num_outputs=2),
            n("LRN", ["s0"], ["l0"], size=3),
            n("PRelu", ["s1", "slope"], ["l1"]),
            n("Add", ["l0", "l1"], ["d0"]),
            n(
                "ConvTranspose",
                ["d0", "w2"],
                ["d1"],
                strides=[2, 2],
                pads=[1, 1, 1, 1],
                output_padding=[1, 1],
            ),
            n(
                "Resize",
                ["d1", "", "scales"],
                ["d2"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
            n("Pad", ["d2", "pads"], ["d3"], mode="reflect"),
            n("Slice", ["d3", "from", "to", "axes"], ["d4"]),
            n("GlobalAveragePool", ["d4"], ["g0"]),
            n("Shape", ["g0"], ["sh"]),
            n("Gather", ["sh", "zero"], ["n"], axis=0),
            n("Unsqueeze", ["n", "zero1"], ["n1"]),
            n("Concat", ["n1", "minus1"], ["to2"], axis=0),
            n("Reshape", ["g0", "to2"], ["f"]),
            n("Gemm", ["f", "w3", "b3"], ["o"], transB=1),
            n("Softmax", ["o"], ["y"], axis=-1),
        ],
        ["n", 3, 12, 12],
        {
            "w0": w(8, 3, 3, 3),
            "b0": w(8),
            "one": one,
            "w1": w(8, 2, 3, 3),
            "lo": np.float32(-1),
            "hi": np.float32(6),
            "slope": w(8, 1, 1),
            "w2": w(8, 8, 3, 3),
            "scales": np.array([1, 1, 2, 2], np.float32),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "from": np.array([1, 1]),
            "to": np.array([9, 1 << 40]),
            "axes": np.array([2, 3]),
            "zero": np.array(0),
            "zero1": np.array([0]),
            "minus1": np.array([-1]),
            "w3": w(5, 8),
            "b3": w(5),
        },
        18,
    )
    mixed = _model(
        [
            n("QuantizeLinear", ["x", "s", "z"], ["q"]),
            n("DequantizeLinear", ["q", "s", "z"], ["x1"]),
            n("Conv", ["x1", "w"], ["c"], auto_pad="SAME_LOWER"),
            n("Greater", ["c", "t"], ["m"]),
            n("Where", ["m", "c", "none"], ["r"]),
            n("InstanceNormalization", ["r", "g", "g"], ["i"]),
            n("LeakyRelu", ["i"], ["lr"]),
            n("Transpose", ["lr"], ["tr"], perm=[0, 2, 3, 1]),
            n("LayerNormalization", ["tr", "g", "g"], ["ln"], axis=-1),
            n("MatMul", ["ln", "mat"], ["mm"]),
            n("Gelu", ["mm"], ["ge"]),
            n("Expand", ["ge", "ex"], ["e"]),
            n("Tile", ["e", "rep"], ["ti"]),
            n("ReduceMean", ["ti", "ax"], ["rm"], keepdims=1),
            n("Squeeze", ["rm", "ax"], ["sq"]),
            n("Flatten", ["sq"], ["y"]),
        ],
        ["n", 4, 6, 6],
        {
            "s": np.float32(0.05),
            "z": np.uint8(7),
            "w": w(4, 4, 3, 3),
            "t": np.float32(0.2),
            "none": np.float32(0),
            "g": w(4),
            "mat": w(4, 4),
            "ex": np.array([1, 6, 6, 4]),
            "rep": np.array([1, 1, 2, 1]),
            "ax": np.array([1]),
        },
        20,
    )
    return [cnn, mixed]


_NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    -(1 << 31),
    1 << 20,
    1 << 31,
    (1 << 31) - 1,
    1 << 40,
    (1 << 62) + 1,
    -(1 << 63),
    (1 << 63) - 1,
]
_FLOATS = [0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"), 0.5, -3.25e7]


def _mutate(model: ModelProto, r: random.Random) -> None:
    """One structural damage, in place."""
    graph = model.graph
    node = r.choice(graph.node) if graph.node else None
    tensor = r.choice(graph.initializer) if graph.initializer else None
    kind = r.randrange(16)
    if kind == 0 and tensor is not None and tensor.dims:
        tensor.dims[r.randrange(len(tensor.dims))] = r.choice(_NUMBERS)
    elif kind == 1 and tensor is not None:
        graph.initializer.remove(tensor)
    elif kind == 2 and tensor is not None and tensor.raw_data:
        data = bytearray(tensor.raw_data)
        for _ in range(r.randint(1, 8)):
            data[r.randrange(len(data))] = r.randrange(256)
        tensor.raw_data = bytes(data[: r.randrange(len(data) + 1)] if r.random() < 0.3 else data)
    elif kind == 3 and tensor is not None and tensor.data_type in (TensorProto.INT64, TensorProto.INT32):
        shape = tuple(
            d if 0 <= d <= 8 else 3 for d in tensor.dims
        )  # another damage may have made them absurd
        values = [r.choice(_NUMBERS) for _ in range(int(np.prod(shape)))]
        tensor.CopyFrom(numpy_helper.from_array(np.array(values, np.int64).reshape(shape), tensor.name))
    elif kind == 4 and tensor is not None:
        tensor.data_type = r.randrange(30)
    elif kind == 5 and node is not None and node.attribute:
        a = r.choice(node.attribute)
        if a.ints:
            a.ints[r.randrange(len(a.ints))] = r.choice(_NUMBERS)
        else:
            a.i, a.f = r.choice(_NUMBERS), r.choice(_FLOATS)
    elif kind == 6 and node is not None and node.attribute:
        a = r.choice(node.attribute)
        a.ints.extend(r.choice(_NUMBERS) for _ in range(r.randint(1, 4)))
    elif kind == 7 and node is not None and node.attribute:
        r.choice(node.attribute).type = r.randrange(15)
    elif kind == 8 and node is not None and node.input:
        names = [
            *(o for k in graph.node for o in k.output),
            *(t.name for t in graph.initializer),
            "x",
            "nowhere",
            "",
        ]
        node.input[r.randrange(len(node.input))] = r.choice(names)
    elif kind == 9 and node is not None and node.output:
        names = [o for k in graph.node for o in k.output]
        node.output[r.randrange(len(node.output))] = r.choice([*names, "other", ""])
    elif kind == 10 and node is not None:
        node.op_type = r.choice([*OPERATORS, "If", "Loop", "NoSuchOperator"])
    elif kind == 11 and node is not None:
        graph.node.remove(node)
    elif kind == 12 and node is not None:
        if r.random() < 0.5:
            del node.input[r.randrange(len(node.input) + 1) :]
        else:
            node.input.append(r.choice([t.name for t in graph.initializer] or ["x"]))
    elif kind == 13:
        d = r.choice(graph.input[0].type.tensor_type.shape.dim)
        d.dim_value = r.choice(_NUMBERS)
    elif kind == 14:
        model.opset_import[0].version = r.choice([0, 7, 11, 13, 17, 18, 21, 28, 10**6])
    elif tensor is not None:
        places = [
            "../secret.bin",
            "/etc/hostname",
            "link.bin",
            "ok.bin",
            "",
            ".",
            "x/../../secret.bin",
            "ok.bin/../../secret.bin",
            "\0",
        ]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (
            ("location", r.choice(places)),
            ("offset", str(r.choice(_NUMBERS))),
            ("length", str(r.choice(_NUMBERS))),
        ):
            if key == "location" or r.random() < 0.5:
                tensor.external_data.add(key=key, value=value)


def _bytes(data: bytes, r: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(r.randint(1, 6)):
        k = r.random()
        i = r.randrange(len(out))
        if k < 0.5:
            out[i] = r.randrange(256)
        elif k < 0.7:
            del out[i : i + r.randint(1, 60)]
        elif k < 0.9:
            out[i:i] = bytes(r.randrange(256) for _ in range(r.randint(1, 20)))
        else:
            del out[i:]
        if not out:
            return b""
    return bytes(out)


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {LIMIT} seconds of CPU time")


def _case(path: Path, r: random.Random) -> str:
    """What became of the model at ``path``."""
    shape = r.choice([None, None, [(2, 3, 12, 12)], [(1, 4, 6, 6)], [(2, 3)]])
    try:
        graph = from_onnx(path, shape)
        inside = [
            *graph.constants.values(),
            *(n.weight for n in graph.nodes if getattr(n, "weight", None) is not None),
        ]
        assert not any(SECRET[:16] in np.ascontiguousarray(a).tobytes() for a in inside), (
            "bytes from outside the folder"
        )
        fast = compile_graph(graph, threads=1)
        if fast.arena_bytes(2) > RUN_BYTES:
            return "built"
        inputs = []
        for v in graph.inputs:
            dims = [d if isinstance(d, int) else 2 * d.mul for d in graph.shape(v)]
            inputs.append(np.random.default_rng(0).standard_normal(dims).astype(np.float32))
        with np.errstate(all="ignore"):
            fast.run(inputs)
    except ActzipError as error:
        return type(error).__name__
    return "ran"


def run(seed: int, cases: int) -> Counter[str]:
    """How many cases ended how. Anything that should not be is raised, with the number of the case."""
    models = seeds()
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "models"
        folder.mkdir()
        (Path(name) / "secret.bin").write_bytes(SECRET)
        (folder / "ok.bin").write_bytes(bytes(1 << 16))
        (folder / "link.bin").symlink_to("../secret.bin")
        before = signal.signal(signal.SIGPROF, _late)
        try:
            for k in range(cases):
                r = random.Random(f"{seed}/{k}")
                model = ModelProto()
                model.CopyFrom(r.choice(models))
                for _ in range(r.randint(0, 3)):
                    _mutate(model, r)
                data = model.SerializeToString()
                if r.random() < 0.3:
                    data = _bytes(data, r)
                path = folder / "m.onnx"
                path.write_bytes(data)
                signal.setitimer(signal.ITIMER_PROF, LIMIT)
                try:
                    tally[_case(path, r)] += 1
                except Exception as error:
                    raise AssertionError(f"seed {seed}, case {k}: {type(error).__name__}: {error}") from error
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                    1 if sys.platform == "darwin" else 1024
                )
                assert used < BYTES, f"seed {seed}, case {k}: {used} bytes of memory"
        finally:
            signal.signal(signal.SIGPROF, before)
    return tally


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    tally = run(seed, count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{sum(tally.values())} models: {dict(tally.most_common())}; peak {peak} MB")


if __name__ == "__main__":
    main()
