"""A function as a module."""

from __future__ import annotations

from torch import nn


class Of(nn.Module):
    """Calls ``f``."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *x):
        return self.f(*x)
