"""Small reference networks for tests, demos and replications; users bring their own."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.models.registry import model


@model("mlp")
class MLP(nn.Module):
    """Fully connected network over flattened inputs.

    Args:
        input_shape: Shape of one input, without batch.
        classes: Number of logits.
        width: Units in each hidden layer.
        depth: Hidden layers.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 128, depth: int = 2):
        super().__init__()
        sizes = [prod(input_shape), *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x)


@model("small_cnn")
class SmallCNN(nn.Module):
    """Two convolutions and two linear layers, without batch norm.

    Args:
        input_shape: (channels, height, width).
        classes: Number of logits.
        width: Channels of the first convolution; the second has twice as many.
        hidden: Units before the head.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 16, hidden: int = 64):
        super().__init__()
        channels, height, breadth = input_shape
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width * (height // 4) * (breadth // 4), hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(F.relu(self.fc(x.flatten(1))))


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


@model("small_resnet")
class SmallResNet(nn.Module):
    """A residual network for small images: a stem and three blocks with batch norm.

    Args:
        input_shape: (channels, height, width).
        classes: Number of logits.
        width: Channels of the first block; doubled in each further one.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 16):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
