"""What tests leave out with older versions of PyTorch."""

import pytest
import torch

needs_2_6 = pytest.mark.skipif(
    not hasattr(torch.export, "default_decompositions"),
    reason="torch.export before PyTorch 2.6 takes operators apart and does not tell calls",
)
