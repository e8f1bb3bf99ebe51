"""Residual networks: torchvision's ResNet-18 and the CIFAR ResNet-20.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016: Sec. 4.1
(ResNet-18) and Sec. 4.2 (ResNet-20).  In train mode BatchNorm needs more than one value per
channel: a batch of one example fails where the last feature map is a single pixel (ResNet-18 at
8 x 8), as it does in PyTorch.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import gcd
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedsim.data.dataset import DataSpec
from fedsim.models.building import Normalize
from fedsim.registry import register

Norm = Callable[[int], nn.Module]
SMALL = 96


def _group_norm(channels: int) -> nn.Module:
    """Eight groups: two channels or more in each from 16 channels on."""
    return nn.GroupNorm(gcd(8, channels), channels)


NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": _group_norm}


@register("model", "resnet18")
def resnet18(spec: DataSpec, *, norm: Literal["batch", "group"] = "batch") -> nn.Module:
    """Build torchvision's ResNet-18, untrained.

    Inputs whose shorter side is below 96 pixels get the usual stem for small images: one 3 x 3
    convolution of stride 1 and no max-pooling.

    Parameters
    ----------
    spec : DataSpec
        Shape, number of classes, mean and standard deviation.
    norm : {"batch", "group"}
        BatchNorm, or GroupNorm (Wu and He 2018) with eight groups.
    """
    from torchvision.models import resnet18 as torchvision_resnet18  # slow to import

    network = torchvision_resnet18(num_classes=spec.num_classes, norm_layer=NORMS[norm])
    channels = spec.shape[0]
    if min(spec.shape[1:]) < SMALL:
        network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    else:
        network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # a hook on the layer before must see that layer's output
    return nn.Sequential(OrderedDict(normalize=Normalize(spec), network=network))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters (option A of the paper)."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = norm(after)
        self.stride, self.added = stride, after - before

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, before, H, W]`` to ``[B, after, H / stride, W / stride]``, rounded up."""
        hidden = functional.relu(self.norm1(self.conv1(features)))
        # Option A: every stride-th pixel, new channels zero, half of them on either side.
        shortcut = features[:, :, :: self.stride, :: self.stride]
        low = self.added // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, low, self.added - low))
        return functional.relu(self.norm2(self.conv2(hidden)) + shortcut)


class ResNet20(nn.Module):
    """Stem, three stages of three blocks (``width``, ``2 width``, ``4 width``), average, linear."""

    def __init__(self, spec: DataSpec, width: int, norm: Norm) -> None:
        super().__init__()
        self.normalize = Normalize(spec)
        self.conv1 = nn.Conv2d(spec.shape[0], width, 3, padding=1, bias=False)
        self.norm1 = norm(width)
        blocks, before = [], width
        for stage in range(3):
            for block in range(3):
                after, stride = width * 2**stage, 2 if stage and not block else 1
                blocks.append(BasicBlock(before, after, stride, norm))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, spec.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` in ``[0, 1]`` to logits ``[B, classes]``."""
        features = functional.relu(self.norm1(self.conv1(self.normalize(images))))
        logits: Tensor = self.fc(self.blocks(features).mean(dim=(2, 3)))
        return logits


@register("model", "resnet20")
def resnet20(
    spec: DataSpec,
    *,
    width: Annotated[int, Field(gt=0)] = 16,
    norm: Literal["batch", "group"] = "batch",
) -> nn.Module:
    """Build the CIFAR ResNet of depth 20; 0.27 million parameters at width 16.

    Parameters
    ----------
    spec : DataSpec
        Shape, number of classes, mean and standard deviation.
    width : int
        Channels of the first stage.
    norm : {"batch", "group"}
        BatchNorm, or GroupNorm (Wu and He 2018) with eight groups.
    """
    return ResNet20(spec, width, NORMS[norm])
