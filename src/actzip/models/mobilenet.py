"""MobileNet-V1 for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MobileNetV1", "mobilenet_v1"]

# (output channels, stride of the depthwise convolution) of the 13 depthwise-separable blocks
_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1),
    (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


def _conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class MobileNetV1(nn.Module):
    """MobileNet-V1: (N, 3, 32, 32) -> (N, classes) logits; 3.2 M parameters, 46.3 MMACs an image.

    The stem has stride 1 and the network strides at the first 128, 256, 512 and 1024 channels, so that a
    32x32 image ends at 2x2. Source: Howard et al., arXiv:1704.04861, Table 1, without the first stride.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 3, 1)
        blocks: list[nn.Module] = []
        inputs = 32
        for outputs, stride in _BLOCKS:
            blocks.append(
                nn.Sequential(_conv(inputs, inputs, 3, stride, groups=inputs), _conv(inputs, outputs, 1, 1))
            )
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def mobilenet_v1(classes: int = 10) -> MobileNetV1:
    """:class:`MobileNetV1` with fresh weights."""
    return MobileNetV1(classes)
