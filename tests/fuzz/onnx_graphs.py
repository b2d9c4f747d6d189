"""Random small CNN-like ONNX graphs: actzip.compile beside ONNX Runtime and ONNX's own reference.

    python tests/fuzz/onnx_graphs.py --cases 20000 --seed 1 [--only SEED]

Each graph has a dynamic batch and is run at three. What it prints last is what was found; a graph
that goes wrong is printed by its seed, with its nodes.
"""

from __future__ import annotations

import argparse
import collections
import math
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import actzip
from actzip.errors import ActzipWarning, InputError, UnsupportedError

ACTS = [
    ("Relu", {}), ("LeakyRelu", {"alpha": 0.2}), ("Elu", {"alpha": 0.7}), ("Selu", {}), ("Sigmoid", {}),
    ("HardSigmoid", {"alpha": 0.3}), ("HardSwish", {}), ("Tanh", {}), ("Softplus", {}), ("Softsign", {}),
    ("Celu", {"alpha": 1.5}), ("Abs", {}), ("Neg", {}), ("Erf", {}), ("Floor", {}), ("Ceil", {}),
    ("Sign", {}), ("ThresholdedRelu", {"alpha": 0.5}), ("Sin", {}), ("Cos", {}), ("Mish", {}), ("Round", {}),
]  # fmt: skip
ENDS = [np.int64(2**63 - 1), np.int64(2**31 - 1), np.int64(2**31), np.int32(2**31 - 1)]


class Maker:
    """One random graph. ``values``: name -> shape, the batch as -1."""

    def __init__(self, seed: int) -> None:
        self.r = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.x = (-1, int(self.r.integers(1, 7)), int(self.r.integers(4, 13)), int(self.r.integers(4, 13)))
        self.values: list[tuple[str, tuple[int, ...]]] = [("x", self.x)]
        self.integers: list[str] = []

    def pick(self, *choices):
        return choices[int(self.r.integers(len(choices)))]

    def between(self, low: int, high: int) -> int:
        return int(self.r.integers(low, high + 1))

    def const(self, array, dtype=np.float32) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def normal(self, *shape: int) -> str:
        return self.const(self.r.standard_normal(shape) * 0.5)

    def node(self, op: str, inputs: list[str], shape, count: int = 1, **attributes):
        names = [f"v{len(self.nodes)}_{k}" for k in range(count)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        if shape is not None:
            self.values.append((names[0], tuple(shape)))
        return names[0] if count == 1 else names

    def any(self, rank: int | None = None):
        fit = [v for v in self.values[-4:] if rank is None or len(v[1]) == rank]
        return fit[int(self.r.integers(len(fit)))] if fit else None

    # operators: each adds nodes, or nothing where no value fits

    def conv(self) -> None:
        if (v := self.any(4)) is None:
            return
        x, (n, c, h, w) = v
        k = [self.between(1, min(3, h)), self.between(1, min(3, w))]
        s, d = [self.between(1, 2), self.between(1, 2)], [self.pick(1, 1, 2), 1]
        p = [self.between(0, 2) for _ in range(4)]
        out = [(size + p[i] + p[i + 2] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i, size in enumerate((h, w))]
        if min(out) < 1:
            return
        groups = self.pick(1, 1, c)
        o = groups * self.between(1, 4)
        inputs = [x, self.normal(o, c // groups, *k)] + ([self.normal(o)] if self.pick(0, 1) else [])
        self.node("Conv", inputs, (n, o, *out), kernel_shape=k, strides=s, dilations=d, pads=p, group=groups)

    def conv_transpose(self) -> None:
        if (v := self.any(4)) is None:
            return
        x, (n, c, h, w) = v
        k, s = [self.between(1, 3), self.between(1, 3)], [self.between(1, 2), self.between(1, 2)]
        p = [self.between(0, k[i % 2] - 1) for i in range(4)]
        out = [(size - 1) * s[i] + k[i] - p[i] - p[i + 2] for i, size in enumerate((h, w))]
        if min(out) < 1 or max(out) > 40:
            return
        o = self.between(1, 4)
        self.node(
            "ConvTranspose", [x, self.normal(c, o, *k)], (n, o, *out), strides=s, pads=p, kernel_shape=k
        )

    def act(self) -> None:
        x, shape = self.any()
        op, attributes = ACTS[int(self.r.integers(len(ACTS)))]
        if op in ("Floor", "Ceil", "Sign", "Round"):  # a rounding error becomes a whole one: not after sums
            x, shape = self.values[0]
        self.node(op, [x], shape, **attributes)

    def clip(self) -> None:
        x, shape = self.any()
        low = self.const(self.r.standard_normal() - 0.5) if self.pick(0, 1) else ""
        self.node("Clip", [x, low, self.const(self.r.standard_normal() + 1)], shape)

    def norm(self) -> None:
        x, shape = self.any()
        if len(shape) < 3:
            return
        c = shape[1]
        if self.pick(0, 1):
            var = self.const(self.r.uniform(0.5, 2, c))
            self.node("BatchNormalization", [x, self.normal(c), self.normal(c), self.normal(c), var], shape)
        else:
            self.node("InstanceNormalization", [x, self.normal(c), self.normal(c)], shape)

    def layer_norm(self) -> None:
        x, shape = self.any()
        axis = self.between(1, len(shape) - 1) if len(shape) > 1 else 0
        if axis:
            tail = shape[axis:]
            inputs = [x, self.normal(*tail), self.normal(*tail)][: self.pick(2, 3)]
            self.node("LayerNormalization", inputs, shape, axis=self.pick(axis, axis - len(shape)))

    def lrn(self) -> None:
        if v := self.any(4):
            self.node("LRN", [v[0]], v[1], size=self.pick(1, 3, 5), alpha=0.4, beta=0.6, bias=1.5)

    def pool(self) -> None:
        if (v := self.any(4)) is None:
            return
        x, (n, c, h, w) = v
        k = [self.between(1, min(3, h)), self.between(1, min(3, w))]
        s, p = [self.between(1, 3), self.between(1, 3)], [self.between(0, k[i % 2] - 1) for i in range(4)]
        ceil = self.between(0, 1)
        out = []
        for i, size in enumerate((h, w)):
            span = size + p[i] + p[i + 2] - k[i]
            o = (-(-span // s[i]) if ceil else span // s[i]) + 1
            out.append(o - 1 if ceil and (o - 1) * s[i] >= size + p[i] else o)
        if min(out) < 1:
            return
        more = {} if self.pick(0, 1) else {"count_include_pad": self.between(0, 1)}
        op = "AveragePool" if more else "MaxPool"
        self.node(op, [x], (n, c, *out), kernel_shape=k, strides=s, pads=p, ceil_mode=ceil, **more)

    def global_pool(self) -> None:
        if v := self.any(4):
            self.node(self.pick("GlobalAveragePool", "GlobalMaxPool"), [v[0]], (*v[1][:2], 1, 1))

    def resize(self) -> None:
        if (v := self.any(4)) is None:
            return
        x, (n, c, h, w) = v
        out = [self.between(1, 2 * h), self.between(1, 2 * w)]
        if max(out) > 40:
            return
        mode = self.pick("nearest", "linear", "cubic")
        where = self.pick("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        attributes = {"mode": mode, "coordinate_transformation_mode": where}
        if mode == "nearest":
            attributes["nearest_mode"] = self.pick("floor", "round_prefer_floor", "ceil", "round_prefer_ceil")
        if self.pick(0, 1):
            scales = np.float32([1, 1, out[0] / h, out[1] / w])
            out = [math.floor(np.float32(h) * scales[2]), math.floor(np.float32(w) * scales[3])]
            if min(out) < 1 or where == "align_corners":
                return
            self.node("Resize", [x, "", self.const(scales)], (n, c, *out), **attributes)
        else:
            shape = self.node("Shape", [x], None)
            head = self.node("Slice", [shape, self.ints(0), self.ints(2)], None)
            sizes = self.node("Concat", [head, self.ints(*out)], None, axis=0)
            self.node("Resize", [x, "", "", sizes], (n, c, *out), **attributes)

    def pad(self) -> None:
        x, shape = self.any()
        if len(shape) < 2:
            return
        pads = [[0] * len(shape), [0] * len(shape)]
        mode = self.pick("constant", "reflect", "edge", "wrap")
        for i in range(2 if len(shape) > 2 else 1, len(shape)):
            most = min(2, shape[i] - 1)
            pads[0][i], pads[1][i] = self.between(0, most), self.between(0, most)
        out = [d if i == 0 else d + pads[0][i] + pads[1][i] for i, d in enumerate(shape)]
        value = [self.const(self.pick(0.0, 1.5))] if mode == "constant" else []
        self.node("Pad", [x, self.ints(*pads[0], *pads[1]), *value], out, mode=mode)

    def slice(self) -> None:
        x, shape = self.any()
        axis = self.between(0, len(shape) - 1)
        size = 10**6 if axis == 0 else shape[axis]
        start, step = (0, 1) if axis == 0 else (self.between(0, size - 1), self.pick(1, 1, 2, -1))
        end = ENDS[self.between(0, 3)] if step > 0 else np.int64(np.iinfo(np.int64).min)
        if axis and step > 0 and self.pick(0, 1):
            end = np.int64(self.between(start + 1, size))
        length = len(range(size)[start : int(end) : step])
        kind = end.dtype
        parts = [self.const([v], kind) for v in (start, end, self.pick(axis, axis - len(shape)), step)]
        self.node(
            "Slice",
            [x, *parts],
            [-1 if i == axis == 0 else length if i == axis else d for i, d in enumerate(shape)],
        )

    def split(self) -> None:
        x, shape = self.any()
        axis = self.between(1, len(shape) - 1) if len(shape) > 1 else 0
        if not axis or shape[axis] < 2:
            return
        first = self.between(1, shape[axis] - 1)
        a, b = self.node("Split", [x, self.ints(first, shape[axis] - first)], None, count=2, axis=axis)
        for name, size in ((a, first), (b, shape[axis] - first)):
            self.values.append((name, (*shape[:axis], size, *shape[axis + 1 :])))

    def concat(self) -> None:
        x, shape = self.any()
        axis = self.between(1, len(shape) - 1) if len(shape) > 1 else 0
        fits = [
            v for v in self.values
            if len(v[1]) == len(shape) and all(a == b for i, (a, b) in enumerate(zip(v[1], shape,
            strict=True)) if i != axis)
        ]  # fmt: skip
        if axis and fits:
            other = fits[int(self.r.integers(len(fits)))]
            out = (*shape[:axis], shape[axis] + other[1][axis], *shape[axis + 1 :])
            self.node("Concat", [x, other[0]], out, axis=self.pick(axis, axis - len(shape)))

    def binary(self) -> None:
        x, shape = self.any()
        op = self.pick("Add", "Sub", "Mul", "Div", "Max", "Min")
        same = [v for v in self.values if v[1] == shape]
        if self.pick(0, 1) and op != "Div":
            other = same[int(self.r.integers(len(same)))][0]
        else:
            keep = self.between(0, len(shape) + (self.pick(0, 0, 1)))
            dims = [1 if i == 0 or self.pick(0, 1) else d for i, d in enumerate(shape)]
            dims = dims[len(shape) - keep :] if keep <= len(shape) else [1, *dims]
            other = self.const(self.r.uniform(0.5, 2, dims))
            shape = shape if keep <= len(shape) else (1, *shape)
        if shape[0] == -1:  # a batch that is no longer in front is not what networks do
            self.node(op, [x, other] if self.pick(0, 1) or op == "Div" else [other, x], shape)

    def where(self) -> None:
        x, shape = self.any()
        rank = self.between(0, len(shape))
        limit = self.const(np.full([1] * rank, self.r.standard_normal()))
        zero = self.const(np.zeros(self.pick((), (1,) * len(shape), shape[1:][-1:])))
        mask = self.node(self.pick("Greater", "GreaterOrEqual"), [x, limit], None)
        self.node("Where", [mask, x, zero], shape)

    def transpose(self) -> None:
        x, shape = self.any()
        perm = [0, *(1 + self.r.permutation(len(shape) - 1)).tolist()]
        self.node("Transpose", [x], [shape[i] for i in perm], perm=perm)

    def reshape(self) -> None:
        """To (n, -1) or a split of the last dimension, by a constant or by arithmetic on the shape."""
        x, shape = self.any()
        if len(shape) < 2:
            return
        tail = math.prod(shape[1:])
        kind = self.between(0, 3)
        if kind == 0:
            self.node("Flatten", [x], (-1, tail), axis=1)
        elif kind == 1:
            self.node("Reshape", [x, self.ints(0, -1)], (-1, tail))
        elif kind == 2:
            s = self.node("Shape", [x], None)
            n = self.node("Gather", [s, self.const(0, np.int64)], None)
            u = self.node("Unsqueeze", [n, self.ints(0)], None)
            f = self.node("Cast", [u], None, to=TensorProto.FLOAT)
            i = self.node("Cast", [self.node("Floor", [f], None)], None, to=TensorProto.INT64)
            self.node("Reshape", [x, self.node("Concat", [i, self.ints(-1)], None, axis=0)], (-1, tail))
        else:
            s = self.node("Shape", [x], None)
            p = self.node(
                "ReduceProd", [self.node("Slice", [s, self.ints(1), self.ints(9)], None)], None, keepdims=1
            )
            n = self.node("Slice", [s, self.ints(0), self.ints(1)], None)
            self.node("Reshape", [x, self.node("Concat", [n, p], None, axis=0)], (-1, tail))

    def to_map(self) -> None:
        if v := self.any(2):
            width = v[1][1]
            c = self.pick(*[d for d in range(1, width + 1) if width % d == 0])
            self.node("Reshape", [v[0], self.ints(-1, c, 1, width // c)], (-1, c, 1, width // c))

    def squeeze(self) -> None:
        x, shape = self.any()
        ones = [i for i, d in enumerate(shape) if d == 1]
        if ones and self.pick(0, 1):
            axis = ones[int(self.r.integers(len(ones)))]
            self.node(
                "Squeeze",
                [x, self.ints(self.pick(axis, axis - len(shape)))],
                (*shape[:axis], *shape[axis + 1 :]),
            )
        elif len(shape) < 5:
            axis = self.between(1, len(shape))
            self.node("Unsqueeze", [x, self.ints(axis)], (*shape[:axis], 1, *shape[axis:]))

    def gather(self) -> None:
        x, shape = self.any()
        axis = self.between(1, len(shape) - 1) if len(shape) > 1 else 0
        if axis:
            at = self.r.integers(-shape[axis], shape[axis], self.pick((), (1,), (3,), (2, 2)))
            self.node(
                "Gather",
                [x, self.const(at, np.int64)],
                (*shape[:axis], *at.shape, *shape[axis + 1 :]),
                axis=axis,
            )

    def reduce(self) -> None:
        x, shape = self.any()
        if len(shape) < 2:
            return
        axis, keep = self.between(1, len(shape) - 1), self.between(0, 1)
        op = self.pick("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
        out = (*shape[:axis], *((1,) if keep else ()), *shape[axis + 1 :])
        self.node(op, [x], out, axes=[self.pick(axis, axis - len(shape))], keepdims=keep)

    def softmax(self) -> None:
        x, shape = self.any()
        if len(shape) > 1:
            axis = self.between(1, len(shape) - 1)
            self.node(self.pick("Softmax", "LogSoftmax"), [x], shape, axis=self.pick(axis, axis - len(shape)))

    def matmul(self) -> None:
        x, shape = self.any()
        if len(shape) < 2:
            return
        out = self.between(1, 6)
        if len(shape) == 2 and self.pick(0, 1):
            t = self.between(0, 1)
            w = self.normal(out, shape[1]) if t else self.normal(shape[1], out)
            self.node("Gemm", [x, w, self.normal(out)], (-1, out), transB=t, alpha=0.5, beta=2.0)
        else:
            self.node("MatMul", [x, self.normal(shape[-1], out)], (*shape[:-1], out))

    def depth_space(self) -> None:
        if (v := self.any(4)) is None:
            return
        x, (n, c, h, w) = v
        if c % 4 == 0:
            self.node(
                "DepthToSpace", [x], (n, c // 4, h * 2, w * 2), blocksize=2, mode=self.pick("DCR", "CRD")
            )
        elif h % 2 == 0 and w % 2 == 0:
            self.node("SpaceToDepth", [x], (n, c * 4, h // 2, w // 2), blocksize=2)

    def expand(self) -> None:
        x, shape = self.any()
        if len(shape) > 1 and shape[-1] == 1:
            s = self.node("Shape", [x], None)
            head = self.node("Slice", [s, self.ints(0), self.ints(-1)], None)
            self.node(
                "Expand", [x, self.node("Concat", [head, self.ints(3)], None, axis=0)], (*shape[:-1], 3)
            )
        elif len(shape) > 1 and math.prod(shape[1:]) < 200:
            self.node(
                "Tile", [x, self.ints(1, 2, *[1] * (len(shape) - 2))], (shape[0], shape[1] * 2, *shape[2:])
            )

    def index(self) -> None:
        if len(self.values[0][1]) > 1:
            x, shape = self.values[0]  # of the input: near ties behind arithmetic have no one answer
            axis = self.between(1, len(shape) - 1)
            self.integers.append(
                self.node(self.pick("ArgMax", "ArgMin"), [x], None, axis=axis, keepdims=self.between(0, 1))
            )

    def model(self) -> onnx.ModelProto:
        steps = [
            self.conv, self.conv, self.conv, self.act, self.act, self.act, self.conv_transpose,
            self.clip, self.norm,
            self.layer_norm, self.lrn, self.pool, self.pool, self.global_pool, self.resize,
            self.resize, self.pad,
            self.slice, self.split, self.concat, self.binary, self.binary, self.where,
            self.transpose, self.reshape,
            self.to_map, self.squeeze, self.gather, self.reduce, self.softmax, self.matmul, self.depth_space,
            self.expand, self.index,
        ]  # fmt: skip
        for _ in range(self.between(3, 10)):
            steps[int(self.r.integers(len(steps)))]()
            if max(abs(math.prod(s)) for _, s in self.values) > 20000:
                break
        read = {i for n in self.nodes for i in n.input}
        outputs = [v for v, _ in self.values if v not in read and v != "x"] or [
            self.node("Relu", ["x"], self.x)
        ]
        infos = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        infos += [helper.make_tensor_value_info(o, TensorProto.INT64, None) for o in self.integers]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *self.x[1:]])],
            infos,
            [numpy_helper.from_array(a, k) for k, a in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def close(a, b) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    most = max(1.0, float(np.abs(b[np.isfinite(b)]).max(initial=0.0))) if b.dtype.kind == "f" else 0.0
    return bool(np.allclose(a, b, rtol=0, atol=2e-4 * most, equal_nan=True))


def _attempt(run):
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return run()
    except Exception as error:
        return error


def check(seed: int, folder: Path, tally: collections.Counter) -> str | None:
    """Runs one graph; what is wrong, or None."""
    import onnxruntime as ort

    model = Maker(seed).model()
    r = np.random.default_rng(seed + 1)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = _attempt(
        lambda: ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    )
    path = folder / "g.onnx"
    onnx.save(model, path)
    fast = None
    for n in (2, 1, 3):
        x = r.standard_normal((n, *shape)).astype(np.float32)
        theirs = (
            session if isinstance(session, Exception) else _attempt(lambda x=x: session.run(None, {"x": x}))
        )
        reference = _attempt(lambda x=x: ReferenceEvaluator(model).run(None, {"x": x})) if n == 2 else None
        known = [w for w in (theirs, reference) if isinstance(w, list)]
        if not isinstance(theirs, list) and any(map(_has_own_size, model.graph.node)):
            known = []  # sizes that the reference rounds differently: ours are ONNX Runtime's
        if not known:
            tally["neither ONNX Runtime nor the reference runs it"] += 1
            return None
        if fast is None:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", ActzipWarning)
                fast = _attempt_ours(lambda x=x: actzip.compile(path, x, tune=False, cache=False, threads=1))
            if isinstance(fast, UnsupportedError):
                tally["refused"] += 1
                print(f"seed {seed}: refused: {fast}"[:300], flush=True)
                return None
            if isinstance(fast, Exception):
                return f"compile: {type(fast).__name__}: {fast}"
            tally["in parts" if any("ONNX Runtime" in str(w.message) for w in said) else "whole"] += 1
        got = _attempt_ours(lambda x=x, fast=fast: fast(x))
        if isinstance(got, InputError) and n != 2 and "compiled for" in str(got):
            tally["for one batch alone"] += 1
            return None
        if isinstance(got, Exception):
            return f"batch {n}: {type(got).__name__}: {got}"
        got = got if isinstance(got, list) else [got]
        for k, o in enumerate(model.graph.output):  # either is right: they differ from each other
            if not any(close(got[k], want[k]) for want in known):
                op = next(v.op_type for v in model.graph.node if o.name in v.output)
                shapes = [f"{w[k].dtype}{list(w[k].shape)}" for w in (got, *known)]
                return f"batch {n}: {o.name} ({op}) is another, {shapes[0]} for {shapes[1:]}"
        if len(known) == 2 and not all(map(close, *known)):
            tally["ONNX Runtime and the reference differ"] += 1
    return None


def _has_own_size(node) -> bool:
    ceil = any(a.name == "ceil_mode" and a.i for a in node.attribute)
    return node.op_type == "Resize" or ceil


def _attempt_ours(run):
    try:
        return run()
    except Exception as error:
        return error


def run(seed: int, cases: int, seconds: float = math.inf) -> tuple[collections.Counter, list[str]]:
    """``cases`` graphs from ``seed`` on, or as many as fit the time: a tally, and what went wrong."""
    tally: collections.Counter = collections.Counter()
    wrong: list[str] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for k in range(cases):
            if time.monotonic() - start > seconds:
                break
            tally["graphs"] += 1
            problem = check(seed * 1_000_000 + k, Path(folder), tally)
            if problem:
                wrong.append(f"seed {seed * 1_000_000 + k}: {problem}")
                print(wrong[-1], flush=True)
    return tally, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one graph, printed")
    args = parser.parse_args()
    if args.only is not None:
        print(onnx.printer.to_text(Maker(args.only).model()))
        with tempfile.TemporaryDirectory() as folder:
            print(check(args.only, Path(folder), collections.Counter()) or "right")
        return
    tally, wrong = run(args.seed, args.cases)
    print(", ".join(f"{n} {what}" for what, n in tally.most_common()), f"; {len(wrong)} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
