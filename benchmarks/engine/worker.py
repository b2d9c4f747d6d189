"""One engine in one process: makes itself ready, then times runs when asked. Python >= 3.8, engine imported alone.

    python worker.py ENGINE '{"onnx": ..., "torch": ..., "input": x.npy, "threads": 1, "output": y.npy}'

Answers on standard output, one JSON object a line: first {"ready": ...}, then for each line `run N SECONDS` on standard
input the N (or fewer, SECONDS bounds them) times in milliseconds, for `memory` the peak of the process in bytes. An
engine that cannot run here answers {"skip": reason}.
"""

import json
import os
import sys
import time

import numpy as np


def peak_bytes():
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def torch_model(spec, channels_last):
    import torch

    torch.set_num_threads(spec["threads"])
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import models

    model = models.build(spec["torch"], thresholds=spec.get("dense_thresholds"))
    x = torch.from_numpy(np.load(spec["input"]))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    return torch, model, x


def torch_eager(spec, channels_last=False):
    torch, model, x = torch_model(spec, channels_last)

    def run():
        with torch.inference_mode():
            return model(x)

    return run, lambda: run().numpy(), torch.__version__


def torch_channels_last(spec):
    return torch_eager(spec, True)


def torch_compile(spec):
    torch, model, x = torch_model(spec, True)
    import torch._inductor.config as config

    config.freezing = True
    config.cpp.threads = spec["threads"]
    fast = torch.compile(model)

    def run():
        with torch.no_grad():
            return fast(x)

    return run, lambda: run().numpy(), torch.__version__


def onnxruntime(spec):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(spec["onnx"], options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.load(spec["input"])}
    return lambda: session.run(None, feed), lambda: session.run(None, feed)[0], ort.__version__


def openvino(spec):
    import openvino as ov

    core = ov.Core()
    model = core.read_model(spec["onnx"])
    x = np.load(spec["input"])
    model.reshape(list(x.shape))
    config = {
        "INFERENCE_NUM_THREADS": spec["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))  # a copy: a shared one does not keep the array alive

    def last():
        request.infer()
        return np.array(request.get_output_tensor(0).data)

    return request.infer, last, ov.__version__


def ncnn(spec):
    import ncnn as engine

    x = np.load(spec["input"])
    net = engine.Net()
    net.opt.num_threads = spec["threads"]
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    if net.load_param(spec["ncnn"] + ".param") or net.load_model(spec["ncnn"] + ".bin"):
        raise RuntimeError("ncnn cannot load the model that pnnx converted")
    # a Mat of an array is a view that does not keep it alive: clone() has the numbers itself
    mats = [engine.Mat(np.ascontiguousarray(image)).clone() for image in x]

    def one(mat):
        with net.create_extractor() as extractor:
            extractor.input("in0", mat)
            return extractor.extract("out0")[1]

    def run():
        return [one(m) for m in mats]  # ncnn has no batch dimension

    return run, lambda: np.stack([np.array(o).reshape(-1) for o in run()]), engine.__version__


def deepsparse(spec):
    os.environ["NM_BIND_THREADS_TO_CORES"] = "0"
    import deepsparse as engine

    x = np.load(spec["input"])
    compiled = engine.compile_model(
        spec["onnx_thresholded"], batch_size=x.shape[0], num_cores=spec["threads"]
    )
    return lambda: compiled.run([x]), lambda: compiled.run([x])[0], engine.__version__


def actzip_compile(spec):
    """Compiles and pickles: what exporting is for the engines that load ONNX files."""
    import pickle

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import models

    import actzip as engine

    x = np.load(spec["input"])
    calibration = np.load(spec["calibration"]) if spec.get("calibration") else x
    model = models.build(spec["torch"], thresholds=spec.get("thresholds"))
    fast = engine.compile(
        model, x, threads=spec["threads"], calibration=calibration, **spec.get("options", {})
    )
    with open(spec["pickle"], "wb") as f:
        pickle.dump(fast, f, protocol=5)
    return lambda: fast(x), lambda: fast(x), engine.__version__


def actzip(spec):
    import pickle

    x = np.load(spec["input"])
    with open(spec["pickle"], "rb") as f:
        fast = pickle.load(f)
    import actzip as engine

    return lambda: fast(x), lambda: fast(x), engine.__version__, fast


ENGINES = {
    "actzip": actzip,
    "actzip compile": actzip_compile,
    "torch": torch_eager,
    "torch channels_last": torch_channels_last,
    "torch.compile": torch_compile,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ncnn": ncnn,
    "deepsparse": deepsparse,
}


def main():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print; the protocol has standard output for itself

    def say(answer):
        out.write(json.dumps(answer) + "\n")
        out.flush()

    name, spec = sys.argv[1], json.loads(sys.argv[2])
    try:
        started = time.perf_counter()
        made = ENGINES[name](spec)
        run, result, version = made[:3]
        y = np.asarray(result())
        seconds = time.perf_counter() - started
        np.save(spec["output"], y)
        for _ in range(3):
            run()
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        say({"skip": f"{type(error).__name__}: {first}"})
        return
    say({"ready": True, "version": version, "seconds": seconds})
    for line in sys.stdin:
        words = line.split()
        if words[0] == "run":
            times, end = [], time.perf_counter() + float(words[2])
            run()
            while len(times) < int(words[1]) and (not times or time.perf_counter() < end):
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e3)
            say({"ms": times})
        elif words[0] == "memory":
            say({"peak_bytes": peak_bytes()})
        elif words[0] == "explain":
            say({"explain": made[3].explain(np.load(spec["input"])).to_dict() if len(made) > 3 else None})
        elif words[0] == "stop":
            return


if __name__ == "__main__":
    main()
