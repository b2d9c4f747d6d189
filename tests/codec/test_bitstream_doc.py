"""The examples of docs/bitstream.md are executed, and every codec has a section there and a Python face."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from actzip.codec import codecs

DOC = Path(__file__).resolve().parents[2] / "docs" / "bitstream.md"


def test_examples() -> None:
    result = doctest.testfile(str(DOC), module_relative=False)
    assert result.attempted > 20 and result.failed == 0


@pytest.mark.parametrize("name", codecs())
def test_every_codec_is_documented(name: str) -> None:
    text = DOC.read_text()
    assert re.search(rf"^### {codecs()[name].id} `{name}`", text, re.M)
    face = importlib.import_module(f"actzip.codec.{name}")
    assert name == face.NAME and ">>>" in (face.__doc__ or "")
