"""Every dotted name that README and docs write exists in a fresh interpreter, whatever was imported
before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"(?<![\w./:@-])actzip(?:\.[A-Za-z_]\w*)+(?!\w*[/-])")
NOT_NAMES = {
    "md",
    "com",
    "org",
    "yaml",
    "json",
    "pt2",
    "onnx",
    "safetensors",
    "toml",
    "html",
}  # files and hosts

# Forks one process a line before anything of actzip is imported; torch may be, so that each line
# takes milliseconds.
RUNNER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
jobs, before = json.load(sys.stdin)
for module in before:
    __import__(module)
assert not any(m.split(".")[0] == "actzip" for m in sys.modules)
out = []
for code in jobs:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            exec(code, {})
            said = "ok"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        out.append(pipe.read().decode())
    os.waitpid(child, 0)
print(json.dumps(out))
"""


def each_in_a_process(lines: list[str], before: tuple[str, ...] = ()) -> dict[str, str]:
    """What each program said: ``ok`` or its error."""
    run = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([lines, before]), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(zip(lines, json.loads(run.stdout.splitlines()[-1])))


def documented() -> dict[str, list[str]]:
    """The dotted names of README and docs, and the files that write them."""
    found: dict[str, list[str]] = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for name in NAME.findall(path.read_text(encoding="utf-8")):
            if name.split(".")[1] not in NOT_NAMES:
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def installed(name: str) -> bool:
    """Whether the package that a codec for other libraries is for is there."""
    module = {"actzip.codec.zarr": "zarr", "actzip.codec.numcodecs": "numcodecs"}.get(
        ".".join(name.split(".")[:3])
    )
    if module is not None:
        try:
            __import__(module)
        except ImportError:
            return False
    return True


@needs_fork
def test_every_documented_name_exists_on_the_first_line_of_a_program() -> None:
    names = documented()
    assert {"actzip.sparsify.calibrate_thresholds", "actzip.quantize.train.finetune"} <= set(names)
    lines = {f"import actzip\n{name}": name for name in names if installed(name)}
    said = each_in_a_process(list(lines), before=("torch",))
    wrong = {lines[line]: (what, names[lines[line]]) for line, what in said.items() if what != "ok"}
    assert not wrong


@needs_fork
def test_names_of_the_codec_need_no_torch() -> None:
    names = [
        n
        for n in documented()
        if (n + ".").startswith("actzip.codec.") or n in ("actzip.encode", "actzip.decode")
    ]
    names = [*names, "actzip.codec.encode", "actzip.codec.seg", "actzip.codec.maps.MapWriter", "actzip.codec"]
    lines = [
        f"import actzip\n{n}\nimport sys\nassert 'torch' not in sys.modules"
        for n in dict.fromkeys(names)
        if installed(n) and "zarr" not in n
    ]
    assert set(each_in_a_process(lines).values()) == {"ok"}


USES = (
    "actzip.sparsify.calibrate_thresholds; actzip.sparsify.train.sparsify",
    "actzip.quantize.train.finetune; actzip.quantize.integers",
    "actzip.profile.schema; actzip.profile.report.Report",
    "from actzip import sparsify, quantize, profile; sparsify.map_costs; quantize.onnx; profile.compare",
    "from actzip.quantize import quantize; assert callable(quantize)",
)
FIRST = (
    "import actzip",
    "import actzip.sparsify.train, actzip",
    "import actzip.quantize.model, actzip.profile.stats, actzip",
    "from actzip.sparsify import sparsify; import actzip",
    "from actzip import quantize; import actzip",
    "import actzip; actzip.profile",
    "import importlib; importlib.import_module('actzip.quantize'); import actzip",
)
CHECK = """
import inspect, pickle, copy, pydoc, functools, types
for name in ("sparsify", "quantize", "profile"):
    package = getattr(actzip, name)
    function = getattr(package, name)
    assert isinstance(function, types.FunctionType) and callable(package)
    assert inspect.signature(package) == inspect.signature(function)
    assert package is __import__(f"actzip.{name}", fromlist=["x"]) and package.__name__ == f"actzip.{name}"
    assert pickle.loads(pickle.dumps(package)) is package and copy.deepcopy([package]) == [package]
    later = pickle.loads(pickle.dumps(functools.partial(package, 1)))
    assert later.func is package and later.args == (1,)
    assert f"{name}(" in pydoc.render_doc(package) and "Args:" in pydoc.render_doc(package)
    try:
        package(object(), object())
    except actzip.ActzipError as error:
        assert type(error).__name__ == "InputError"
    else:
        raise AssertionError
"""


@needs_fork
def test_callable_packages_are_the_same_in_every_order_of_imports() -> None:
    orders = [[USES[(i + j) % len(USES)] for j in range(len(USES))] for i in range(len(FIRST))]
    lines = ["\n".join([first, *uses, CHECK]) for first, uses in zip(FIRST, orders)]
    said = each_in_a_process(lines, before=("torch",))
    assert {k: v for k, v in said.items() if v != "ok"} == {}


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    import actzip
    import actzip.codec
    import actzip.quantize

    for module in (actzip, actzip.codec, actzip.quantize):
        for name in ("calibrate", "_private", "__nothing__", "x.y"):
            if module is actzip.quantize and name == "calibrate":
                continue
            assert not hasattr(module, name)
    assert {"sparsify", "codec", "activations", "__version__"} <= set(dir(actzip))


def test_type_checkers_see_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text(
        "import actzip, actzip.codec, actzip.training\n"
        "from actzip.sparsify import calibrate_thresholds as calibrate_thresholds\n"
        "from actzip.codec import encode as encode\n"
        "actzip.sparsify.calibrate_thresholds\n"
        "actzip.quantize(1)\n"  # line 5: a wrong call
        "actzip.codec.nothing\n"  # 6
        "actzip.training.nothing\n"  # 7
    )
    out = api.run([str(program), "--config-file=", "--follow-imports=silent"])[0]
    assert {int(n) for n in re.findall(r"program\.py:(\d+): error", out)} == {5, 6, 7}, out
