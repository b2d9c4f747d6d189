"""A short round of random PyTorch modules; `make fuzz-interop N=...` runs thousands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch_modules


def test_compiled_modules_are_as_in_eager_mode() -> None:
    tally = torch_modules.run(1, 20, every=10)
    assert tally["modules"] == 20
    assert tally["compiled"] >= 3 and tally["refused"] >= 3
    assert any(k.startswith("torch.compile") for k in tally)
