"""Every Python block of the documentation runs, page by page, in order, in an empty folder; of the
guide the shell's too."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
#: Pages whose console blocks run too.
SHELL = {"guide"}
EVERY = sorted(DOCS.rglob("*.md"))
README = DOCS.parent / "README.md"
PAGES = [p for p in [*EVERY, README] if p.exists() and "```python" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    if re.search(r"^import onnx", text, re.M):
        pytest.importorskip("onnx")
    if 'backend="actzip"' in text:
        import torch

        if (
            "actzip" not in torch.compiler.list_backends()
        ):  # run from the sources: the entry point is not installed
            from actzip.runtime.dynamo import backend

            torch._dynamo.register_backend(backend, name="actzip")
    if "to_parquet" in text:
        pytest.importorskip("pyarrow")
    if "from PIL" in text:
        pytest.importorskip("PIL")
    names: dict = {"__name__": "__docs__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for match in re.finditer(r"^```(python|console)\n(.*?)^```", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 2
            if match.group(1) == "python":
                code = "\n" * (line - 1) + match.group(2)
                exec(compile(code, str(page), "exec"), names)
            elif page.stem in SHELL:
                run_in_shell(match.group(2), f"{page}:{line}")


def run_in_shell(block, where):
    """The commands of a console block, each a line that begins with ``$ actzip``, in this process."""
    import shlex

    from typer.testing import CliRunner

    from actzip.cli import build

    commands = [c[2:] for c in block.splitlines() if c.startswith("$ ")]
    assert commands, where
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "actzip", where
        result = CliRunner().invoke(build(), arguments)
        assert result.exit_code == 0, f"{where}: {command}: {result.output}{result.exception!r}"


def test_the_guide_has_no_other_blocks():
    kinds = re.findall(r"^```(\w*)\n.*?^```", (DOCS / "guide.md").read_text(encoding="utf-8"), re.M | re.S)
    assert set(kinds) == {"python", "console"}


def test_the_navigation_leads_somewhere():
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r":\s*([\w/-]+\.md)", nav))
    pages = {
        str(p.relative_to(DOCS)) for p in EVERY if not p.name[0].isdigit()
    }  # a decision is found by its list
    assert named == pages


def test_links_between_pages_lead_somewhere():
    for page in [*EVERY, *(DOCS.parent / n for n in ("README.md", "HACKING.md", "weights/README.md"))]:
        for target in re.findall(r"\]\(([\w/.-]+)[)#]", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_tables_are_those_of_the_results():
    """`python benchmarks/tables.py` writes them into the pages."""
    if not (DOCS.parent / "README.md").exists():
        pytest.skip("tests were copied away from the sources")
    run = subprocess.run(
        [sys.executable, str(DOCS.parent / "benchmarks" / "tables.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_site_builds_without_warnings(tmp_path):
    """What `make docs` does."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=DOCS.parent,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "site" / "guide" / "index.html").exists()
