"""What tests leave out with older versions of PyTorch."""

import pytest
import torch

needs_2_6 = pytest.mark.skipif(
    not hasattr(torch.export, "default_decompositions"),
    reason="torch.export before PyTorch 2.6 takes operators apart and does not tell calls",
)

needs_2_5 = pytest.mark.skipif(
    torch.__version__.startswith("2.4"),
    reason="torch.compile of PyTorch 2.4 keeps weights in its graphs and traces hooks wrongly",
)
