"""A network for the tests of activation sites."""

import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """Every way of writing a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.ReLU6())
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = self.relu(self.conv(x[:, :3]))
        x = self.block(x)
        x = F.relu(x - 0.1)
        x = (x - 0.05).clamp(min=0)
        y = x - 0.01
        y.relu_()
        x = torch.clamp(y, 0, 6)
        x = F.silu(x)
        return self.fc(x.mean((2, 3)))
