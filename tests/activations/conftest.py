import pytest
import torch
from nets import Mixed


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().eval()
