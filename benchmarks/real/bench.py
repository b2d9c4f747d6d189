"""Real model files of ordinary packages against other engines, all in one run:

    python benchmarks/real/bench.py                       # every file of files.py
    python benchmarks/real/bench.py craft vgg16_tumor     # these
    python benchmarks/real/bench.py craft --avx2          # no engine beyond AVX2, OpenVINO in int8 too
    python benchmarks/real/bench.py timm --engines onnxruntime openvino actzip
    python benchmarks/real/bench.py timm:rexnet_100       # any network of timm's

Fetches the packages that are not here (files.py), then measures as benchmarks/engine/run.py does,
whose workers and turns these are: float32, batch 1, one thread, each engine in a process of its
own. ONNX files run as they are in their packages; where a file declares another size of input, the
rivals get a copy that declares this one. ncnn runs what pnnx converts, torch.compile the PyTorch
networks. The input is what the file's own package makes of a photograph, a line of text or a sound;
densities are its own. Errors are of the first output, against ONNX Runtime or PyTorch, relative to
the largest value. actzip compiles with an empty tuning cache. Writes
benchmarks/results/real/<machine>/<file>-b1-t1.json, then docs/results/real.md by tables.py.

timm's networks have seeded random weights and statistics (engine/coverage.py makes them) and see a
photograph: their zeros are those of random weights, and say nothing of trained ones. They go to
benchmarks/results/timm/.

--avx2 runs the engines that can be told to use AVX2 at most (AVX2_AT_MOST in actzip.cli._workers),
and OpenVINO on the network that ONNX Runtime's quantizer makes of 8 bits: a scale a channel of the
weights, in 7 bits, because the sums of AVX2's 8-bit instruction saturate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "engine")]
import files  # noqa: E402
from run import machine_folder, measure  # noqa: E402

from actzip.cli._workers import (  # noqa: E402
    AVX2_AT_MOST,
    NO_AVX2_CAP,
    convert_ncnn,
    export_ncnn,
    export_onnx,
)

RESULTS = HERE.parent / "results" / "real"
ENGINES = ("onnxruntime", "openvino", "ncnn", "torch.compile", "actzip")
INT8 = "openvino int8"
#: Networks of timm's that ``timm`` stands for, each of another family; none is a file's.
TIMM = (
    "mobilenetv4_conv_small", "ghostnet_050", "repvgg_a0", "regnetx_002", "resnet18d", "hgnet_tiny",
    "rexnet_100", "repvit_m0_9", "fastvit_t8", "poolformer_s12", "mobilevit_xxs", "levit_128s",
    "convnext_atto", "efficientformerv2_s0", "efficientvit_b0", "vit_tiny_patch16_224", "pvt_v2_b0",
    "mobilenetv4_hybrid_medium", "swin_tiny_patch4_window7_224",
)  # fmt: skip


def onnx_of_size(source: Path, shape: tuple[int, ...], target: Path) -> None:
    """A copy of an ONNX file whose one input has this shape."""
    import onnx

    model = onnx.load(str(source))
    known = {t.name for t in model.graph.initializer}
    value = next(v for v in model.graph.input if v.name not in known)
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        dim.Clear()
        dim.dim_value = size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    onnx.save(model, str(target))


def quantize(source: Path, inputs: list[np.ndarray], target: Path) -> str:
    """Writes the ONNX file in 8 bits, calibrated on ``inputs``; why not, else ''."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.left = iter([{name: x} for x in inputs])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    import onnxruntime

    try:
        quant_pre_process(str(source), str(target))
        name = onnxruntime.InferenceSession(str(target)).get_inputs()[0].name
        quantize_static(
            str(target), str(target), Reader(name), QuantFormat.QDQ, per_channel=True, reduce_range=True
        )
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """What the engines load, as engine/run.py's ``prepare`` gives it."""
    file = _of_timm(name) if name.startswith("timm:") else files.BY_NAME[name]
    photos = files.photographs(3) if file.kind in ("photo", "page") else None
    x, other = (files.make_input(file, seed, photos) for seed in (2, 0))  # some files take a batch of 1 only
    onnx, answer = folder / "model.onnx", folder / "answer.npy"
    row = {
        "label": "natural", "thresholds": None, "weights": None, "density": None, "unseen": None,
        "agreement": None, "output_error": None, "onnx": str(onnx), "answer": str(answer),
    }  # fmt: skip
    made: dict[str, Any] = {
        "rows": [row], "lacks": {}, "folder": folder, "input": str(folder / "x.npy"),
        "calibration": str(folder / "calibration.npy"),
    }  # fmt: skip
    np.save(made["input"], x)
    np.save(made["calibration"], other)
    lacks = made["lacks"]
    if file.onnx:
        import onnxruntime

        made["model"] = str(files.path(file))
        onnx_of_size(files.path(file), x.shape, onnx)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
        np.save(answer, session.run(None, {session.get_inputs()[0].name: x})[0])
        made["ncnn"], lacks["ncnn"] = convert_ncnn(onnx, x.shape)
        lacks["torch.compile"] = "the model is an ONNX file"
        return made
    import modules
    import torch

    if file.package == "timm":
        from coverage import build  # engine/coverage.py

        made["model"], net, row["state"] = name, build(name), str(folder / "state.pt")
        row["label"] = "random weights"
        torch.save(net.state_dict(), row["state"])
    else:
        made["model"], net = f"modules:{file.name}", getattr(modules, file.name)()
    given = torch.from_numpy(x)
    with torch.no_grad():
        y = net(given)
    np.save(answer, (y if isinstance(y, torch.Tensor) else y[0]).numpy())
    lacks |= dict.fromkeys(("onnxruntime", "openvino"), export_onnx(net, given, onnx))
    made["ncnn"], lacks["ncnn"] = export_ncnn(net, given, folder)
    return made


def _of_timm(name: str) -> files.File:
    from actzip.models._torchvision import import_timm

    found = import_timm().get_pretrained_cfg(name.removeprefix("timm:"))
    size = found.input_size if found is not None else (3, 224, 224)
    return files.File(name, "timm", "", (1, *size), "random weights", **files.IMAGENET)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "files",
        nargs="*",
        metavar="FILE",
        help=f"of {', '.join(files.BY_NAME)}, timm, timm:NAME; every file where none is named",
    )
    add("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    add("--rounds", type=int, default=6)
    add("--runs", type=int, default=5, help="runs of each engine a round")
    add("--seconds", type=float, default=60, help="no other round begins once the rounds took so long")
    add("--gate", help="as benchmarks/engine/run.py has it")
    add("--avx2", action="store_true", help="no engine beyond AVX2, and OpenVINO in int8 too")
    add("--results", type=Path, help="folder of the JSON files; by default that of this machine")
    args = parser.parse_args()
    if args.avx2:
        args.engines = [INT8, *(e for e in args.engines if e not in NO_AVX2_CAP)]
        orders = {k: v for e in ("torch.compile", "openvino", "actzip") for k, v in AVX2_AT_MOST[e].items()}
        if not orders.items() <= os.environ.items():  # they are read when a program starts
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **orders})
    names = [m for n in args.files for m in ([f"timm:{t}" for t in TIMM] if n == "timm" else [n])]
    unknown = [n for n in names if n not in files.BY_NAME and not n.startswith("timm:")]
    if unknown:
        parser.error(f"no file is called {unknown[0]!r}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    failed = False
    for name in names or files.BY_NAME:
        kind = "timm" if name.startswith("timm:") else "real"
        folder_of = args.results or RESULTS.parent / kind / machine_folder() / ("avx2" if args.avx2 else "")
        with tempfile.TemporaryDirectory(prefix="actzip-real-") as folder:
            try:
                made = prepare(name, Path(folder))
                if args.avx2:
                    made["int8"] = str(Path(folder) / "int8.onnx")
                    seen = [np.load(made["calibration"])]
                    made["lacks"][INT8] = quantize(Path(made["rows"][0]["onnx"]), seen, Path(made["int8"]))
            except Exception as error:  # a package that cannot be had does not stop the others
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                failed = True
                continue
            os.environ["ACTZIP_CACHE"] = str(Path(folder) / "cache")
            job = {
                **vars(args),
                "results": folder_of,
                "network": name.removeprefix("timm:"),
                "batch": 1,
                "threads": 1,
                "isa": [],
                "no_zeros": False,
            }
            measure(argparse.Namespace(**job), list(args.engines), made)
            del os.environ["ACTZIP_CACHE"]
    subprocess.run([sys.executable, str(HERE.parent / "tables.py")], check=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
