import subprocess
import sys


def modules_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(out.stdout.split())


def test_codec_does_not_import_torch():
    code = (
        "import actzip.codec, numpy as np\nb = actzip.codec.encode(np.arange(9, "
        "dtype=np.uint8))\nactzip.codec.decode(b)"
    )
    found = modules_after(code)
    assert "actzip.codec" in found
    assert not {"torch", "torchvision", "onnx", "pydantic", "rich"} & found


def test_command_line_help_does_not_import_torch():
    assert "torch" not in modules_after("import actzip.cli\nactzip.cli.build()")


def test_native_modules_under_their_former_names_are_the_same_modules():
    code = "import actzip._codec, sys\nfrom actzip import _engine\n"
    code += "assert actzip._codec is sys.modules['actzip._native._codec']\n"
    code += "assert _engine is sys.modules['actzip._native._engine'] is sys.modules['actzip._engine']"
    assert "torch" not in modules_after(code)


def test_the_codec_does_not_load_the_engine():
    found = modules_after("import actzip.codec")
    assert "actzip._native._codec" in found and "actzip._native._engine" not in found


def test_one_version():
    import importlib.metadata

    import actzip

    assert actzip.__version__ == importlib.metadata.version("actzip")
