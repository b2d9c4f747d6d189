"""LeNet-5 for 28x28 digits: the widely used 20-50-500 variant with a ReLU after every hidden layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LeNet5", "lenet5"]


class LeNet5(nn.Module):
    """LeNet-5: (N, 1, 28, 28) -> (N, classes) logits; 431 k parameters, 2.29 MMACs an image.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998, in the sizes that
    Caffe made usual (conv 20, conv 50, linear 500).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)  # type: ignore[no-any-return]


def lenet5(classes: int = 10) -> LeNet5:
    """:class:`LeNet5` with fresh weights."""
    return LeNet5(classes)
