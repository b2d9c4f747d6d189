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
