"""A small network and data that it learns in a second."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from actzip.data import Images, Loader


class Net(nn.Module):
    """A module ReLU in place, a functional one, pooling and a concatenation between maps and consumers."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.bn = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(20, 16, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.relu(self.bn(self.conv1(x)))
        b = F.relu(self.conv2(a))
        c = torch.cat([F.max_pool2d(a, 2), b], 1)
        return self.fc(F.relu(self.conv3(c)).mean((2, 3)))


def net(norm: bool = True, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(norm)


def images(n: int = 192, seed: int = 0) -> Images:
    """Four classes that a small network learns: one colour, or none, a little brighter, under noise."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, n)
    x = random.integers(0, 200, (n, 3, 8, 8))
    for i, label in enumerate(y):
        if label < 3:
            x[i, label] += 30
    return Images(x.astype(np.uint8), y.astype(np.int64), 4, (0.4,) * 3, (0.2,) * 3, "toy", "made here")


def loader(**kwargs) -> Loader:
    return Loader(images(), 32, seed=3, shuffle=True, **kwargs)
