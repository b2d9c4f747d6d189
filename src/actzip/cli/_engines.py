"""One engine in a process of its own: makes itself ready, then times runs when asked.

Run as a script (by :class:`actzip.cli._workers.Worker`), by any Python >= 3.8 that has the engine and NumPy:
``_engines.py ENGINE SPEC``. SPEC is JSON: ``input`` (x.npy; an .npz of several), ``output`` (where
the answer on it goes), ``threads``, and what the engine needs: ``model`` (a name, as for
``actzip bench``) with
``state`` (its state dict) and ``thresholds`` (site -> number or list) where there are any,
``onnx``, ``int8`` (an ONNX file of quantized operators), ``ncnn`` (without .param and .bin),
``compiled`` (an ``.actzip`` file), ``calibration`` (a .npy), ``fallback`` (as of ``actzip.compile``;
False where it is left out).

Answers one JSON object a line: first {"ready": true, "version": ...} or {"skip": reason}; then for
each line ``run N SECONDS`` on standard input the milliseconds of N runs, or of as many as SECONDS
allow (one at least), and the peak memory of the process; for ``explain`` what the compiled model
says of itself.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # this folder has an `inspect` and a `profile` that are not the standard library's
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here]

import importlib
import json
import time
from typing import Any

import numpy as np

LONG = 0.5  # seconds: a run so long needs none before it that is not timed


def _network(spec: dict[str, Any]) -> Any:
    import torch

    from actzip.activations import set_thresholds
    from actzip.runtime.models import load_model

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    model = load_model(spec["model"], trust=spec.get("trust", False))[0]
    if spec.get("state"):
        model.load_state_dict(torch.load(spec["state"], weights_only=True))
    for m in model.modules():
        m.training = False
    if spec.get("thresholds"):
        found = {k: torch.tensor(t) if isinstance(t, list) else t for k, t in spec["thresholds"].items()}
        set_thresholds(model, found)
    return model


def _inputs(spec: dict[str, Any]) -> list[Any]:
    """The model's inputs in order."""
    found = np.load(spec["input"])
    return [found[k] for k in found.files] if hasattr(found, "files") else [found]


def _only(spec: dict[str, Any], engine: str) -> Any:
    xs = _inputs(spec)
    if len(xs) > 1:
        raise RuntimeError(f"{engine} is timed on models with one input")
    return xs[0]


def first_output(outputs: Any) -> Any:
    """Of several outputs the first: the one that answers are compared by."""
    while isinstance(outputs, (tuple, list, dict)):
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    return outputs


def _torch(spec: dict[str, Any], channels_last: bool = False, compiled: bool = False) -> tuple[Any, ...]:
    import torch

    model, xs = _network(spec), [torch.from_numpy(x) for x in _inputs(spec)]
    if channels_last and any(x.ndim == 4 for x in xs):
        model = model.to(memory_format=torch.channels_last)
        xs = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in xs]
    if compiled:
        import torch._inductor.config as config

        config.freezing = True
        config.cpp.threads = spec["threads"]
        model = torch.compile(model)

    def run() -> Any:
        with torch.no_grad() if compiled else torch.inference_mode():
            return model(*xs)

    return run, lambda: first_output(run()).numpy(), torch.__version__


def _onnxruntime(spec: dict[str, Any]) -> tuple[Any, ...]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec["threads"], 1
    session = ort.InferenceSession(spec["onnx"], options, providers=["CPUExecutionProvider"])
    feed = {i.name: x for i, x in zip(session.get_inputs(), _inputs(spec))}
    return lambda: session.run(None, feed), lambda: session.run(None, feed)[0], ort.__version__


def _openvino(spec: dict[str, Any]) -> tuple[Any, ...]:
    import openvino as ov

    core, xs = ov.Core(), _inputs(spec)
    model = core.read_model(spec["onnx"])
    model.reshape({i: list(x.shape) for i, x in enumerate(xs)})
    config = {
        "INFERENCE_NUM_THREADS": spec["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    for i, x in enumerate(xs):
        request.set_input_tensor(i, ov.Tensor(x))  # a copy: a shared one does not keep the array alive

    def last() -> Any:
        request.infer()
        return np.array(request.get_output_tensor(0).data)

    return request.infer, last, ov.__version__


def _ncnn(spec: dict[str, Any]) -> tuple[Any, ...]:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = spec["threads"]
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    if net.load_param(spec["ncnn"] + ".param") or net.load_model(spec["ncnn"] + ".bin"):
        raise RuntimeError("it cannot load the model that pnnx converted")
    # A Mat of an array is a view that does not keep it alive: clone() has the numbers itself.
    mats = [ncnn.Mat(np.ascontiguousarray(image)).clone() for image in _only(spec, "ncnn")]

    def one(mat: Any) -> Any:
        with net.create_extractor() as extractor:
            extractor.input("in0", mat)
            code, out = extractor.extract("out0")
        if code:
            raise RuntimeError(f"extract() gave {code}")
        return out

    def run() -> Any:
        return [one(m) for m in mats]  # ncnn has no batch dimension

    return run, lambda: np.stack([np.array(o) for o in run()]), ncnn.__version__


def _deepsparse(spec: dict[str, Any]) -> tuple[Any, ...]:
    os.environ["NM_BIND_THREADS_TO_CORES"] = "0"
    deepsparse = importlib.import_module("deepsparse")
    xs = _inputs(spec)
    engine = deepsparse.compile_model(spec["onnx"], batch_size=xs[0].shape[0], num_cores=spec["threads"])
    return lambda: engine.run(xs), lambda: engine.run(xs)[0], deepsparse.__version__


def _compile(spec: dict[str, Any]) -> tuple[Any, ...]:
    import actzip

    xs = _inputs(spec)
    calibration = np.load(spec["calibration"]) if spec.get("calibration") else None
    model = spec["model"] if spec["model"].endswith(".onnx") else _network(spec)
    chosen = {"threads": spec["threads"], "fallback": spec.get("fallback", False)}
    fast = actzip.compile(model, tuple(xs), calibration=calibration, **chosen)
    return lambda: fast(*xs), lambda: first_output(fast(*xs)), actzip.__version__, fast


def _compile_and_save(spec: dict[str, Any]) -> tuple[Any, ...]:
    """What exporting is for the engines that load ONNX files; a model in parts is pickled."""
    import pickle

    from actzip.errors import UnsupportedError

    made = _compile(spec)
    try:
        made[3].save(spec["compiled"])
    except UnsupportedError:
        with open(spec["compiled"], "wb") as f:
            pickle.dump(made[3], f, protocol=5)
    return made


def _actzip(spec: dict[str, Any]) -> tuple[Any, ...]:
    if not spec.get("compiled"):
        return _compile(spec)
    import pickle

    import actzip
    from actzip.runtime import load

    xs = _inputs(spec)
    with open(spec["compiled"], "rb") as f:
        pickled = f.read(1) == b"\x80"
        f.seek(0)
        fast = pickle.load(f) if pickled else load(spec["compiled"], threads=spec["threads"])
    return lambda: fast(*xs), lambda: first_output(fast(*xs)), actzip.__version__, fast


ENGINES = {
    "actzip": _actzip,
    "actzip compile": _compile_and_save,
    "torch": _torch,
    "torch channels_last": lambda spec: _torch(spec, True),
    "torch.compile": lambda spec: _torch(spec, True, True),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "openvino int8": lambda spec: _openvino({**spec, "onnx": spec["int8"]}),
    "ncnn": _ncnn,
    "deepsparse": _deepsparse,
}


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status") as f:
            lines = [line for line in f if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        return 0


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print; the answers have standard output for themselves

    def say(**answer: Any) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    name, spec = sys.argv[1], json.loads(sys.argv[2])
    clock = time.perf_counter
    try:
        started = clock()
        made = ENGINES[name](spec)
        run, result, version = made[:3]
        np.save(spec["output"], np.asarray(result()))
        seconds = clock() - started
        last = started = clock()
        for _ in range(3):
            if last - started < LONG:
                run()
                last = clock()
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        say(skip=f"{type(error).__name__}: {text}")
        return
    note = getattr(made[3], "note", "") if len(made) > 3 else ""
    say(ready=True, version=version, note=note, seconds=seconds, peak_bytes=_peak_bytes())
    took = 0.0
    for line in sys.stdin:
        words = line.split()
        if words[0] == "explain":
            say(explain=made[3].explain(tuple(_inputs(spec))).to_dict() if len(made) > 3 else None)
            continue
        if took < LONG:
            run()
        times: list[float] = []
        end = clock() + float(words[2])
        while len(times) < int(words[1]) and (not times or clock() < end):
            started = clock()
            run()
            took = clock() - started
            times.append(took * 1e3)
        say(ms=times, peak_bytes=_peak_bytes())


if __name__ == "__main__":
    main()
