"""The CIFAR ResNets of He et al. 2015 (6n+2 layers, option-A shortcuts)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNetCifar", "resnet20", "resnet32", "resnet44", "resnet56"]


class _Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: subsampled in space, zero-padded in channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride = stride
        self.pad = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return self.relu2(y + x)  # type: ignore[no-any-return]


class ResNetCifar(nn.Module):
    """A CIFAR ResNet of 6 n + 2 layers: (N, 3, 32, 32) -> (N, classes) logits.

    Source: He et al., arXiv:1512.03385, section 4.2, option A. State-dict keys are those of the widely used
    `pytorch_resnet_cifar10` weights: conv1, bn1, layerN.M.{conv1,bn1,conv2,bn2}, linear.
    """

    def __init__(self, n: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(n)))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), *(_Block(32, 32, 1) for _ in range(n - 1)))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), *(_Block(64, 64, 1) for _ in range(n - 1)))
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet20(classes: int = 10) -> ResNetCifar:
    """The 20-layer CIFAR ResNet with fresh weights."""
    return ResNetCifar(3, classes)


def resnet32(classes: int = 10) -> ResNetCifar:
    """The 32-layer CIFAR ResNet with fresh weights."""
    return ResNetCifar(5, classes)


def resnet44(classes: int = 10) -> ResNetCifar:
    """The 44-layer CIFAR ResNet with fresh weights."""
    return ResNetCifar(7, classes)


def resnet56(classes: int = 10) -> ResNetCifar:
    """The 56-layer CIFAR ResNet with fresh weights."""
    return ResNetCifar(9, classes)
