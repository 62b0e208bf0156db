"""The pre-activation Wide-ResNet of JEM and JEM++ (Zagoruyko & Komodakis, 2016), split for YOPO.

f(x) = trunk(stem(x)): ``stem`` is the first convolution, the paper's f_0, and ``trunk`` is
everything behind it, the paper's g. The released network's particulars are kept: LeakyReLU(0.2),
the *second* convolution of a block carries the stride, a bare 1x1 shortcut, biases everywhere,
and a batch norm momentum of 0.9 in PyTorch's sense (running = 0.1 old + 0.9 batch).
"""

from collections import OrderedDict

from torch import nn

NORMS = ("batch", "none", "group", "layer", "instance")
STEM_WIDTH = 16
GROUPS = 8


def make_norm(norm, channels, bn_momentum):
    """One normalisation layer over ``channels`` maps; ``layer`` is a group norm of one group."""
    return {
        "batch": lambda: nn.BatchNorm2d(channels, momentum=bn_momentum),
        "none": nn.Identity,
        "group": lambda: nn.GroupNorm(GROUPS, channels),
        "layer": lambda: nn.GroupNorm(1, channels),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
    }[norm]()


def make_act(norm):
    """LeakyReLU(0.2), in place if there is a norm layer, whose output nothing else reads.

    Without a norm layer, the shortcut reads the same input, so it must not change.
    """
    return nn.LeakyReLU(0.2, inplace=norm != "none")


class Block(nn.Module):
    """Twice (norm, LeakyReLU, 3x3 conv), plus the identity or, if shapes differ, a 1x1 conv."""

    def __init__(self, in_channels, channels, stride, norm, bn_momentum, stride_first):
        super().__init__()
        first, second = (stride, 1) if stride_first else (1, stride)
        self.norm1 = make_norm(norm, in_channels, bn_momentum)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=first, padding=1)
        self.norm2 = make_norm(norm, channels, bn_momentum)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=second, padding=1)
        self.act = make_act(norm)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x):
        out = self.conv1(self.act(self.norm1(x)))
        out = self.conv2(self.act(self.norm2(out)))
        return out.add_(self.shortcut(x))


class WideResNet(nn.Module):
    """WRN-``depth``-``width``: images [B, 3, H, W] (H, W >= 8, any range) to logits [B, K].

    ``depth`` is 6n + 4 (10, 16, 22, 28, 34, 40, ...); WRN-28-10 with batch norm and ten classes
    has 36,489,290 parameters. ``stride_first`` puts the stride into a block's first convolution, as
    the original Wide-ResNet has it: 40 % fewer products at WRN-10-k, 22 % at WRN-16-4.
    ``stem_stride`` 2 halves the sides of all feature maps, a quarter of the products, by a 4x4
    stem. Raises ValueError for a depth, norm or stem_stride that does not exist.
    """

    def __init__(self, depth=28, width=10, n_classes=10, norm="batch", bn_momentum=0.9,
                 stride_first=False, stem_stride=1):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is 6n + 4 (10, 16, 22, 28, ...), got {depth}")
        if width < 1 or n_classes < 1:
            raise ValueError(f"width and classes start at 1, got {width} and {n_classes}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride is 1 or 2, got {stem_stride}")
        if norm not in NORMS:
            raise ValueError(f"norm is one of {', '.join(NORMS)}, got {norm}")
        self.config = {"depth": depth, "width": width, "n_classes": n_classes, "norm": norm,
                       "bn_momentum": bn_momentum, "stride_first": stride_first,
                       "stem_stride": stem_stride}
        # 4x4 for stride 2, so that each pixel lies under equally many kernels
        self.stem = nn.Conv2d(3, STEM_WIDTH, 2 + stem_stride, stem_stride, padding=1)
        trunk, in_channels = OrderedDict(), STEM_WIDTH
        for number, stride in ((1, 1), (2, 2), (3, 2)):
            channels, blocks = STEM_WIDTH * 2 ** (number - 1) * width, []
            for index in range((depth - 4) // 6):
                blocks.append(Block(in_channels, channels, stride if index == 0 else 1, norm,
                                    bn_momentum, stride_first))
                in_channels = channels
            trunk[f"layer{number}"] = nn.Sequential(*blocks)
        trunk["norm"] = make_norm(norm, in_channels, bn_momentum)
        trunk["act"] = make_act(norm)
        trunk["pool"] = nn.AdaptiveAvgPool2d(1)
        trunk["flatten"] = nn.Flatten()
        trunk["head"] = nn.Linear(in_channels, n_classes)
        self.trunk = nn.Sequential(trunk)

    @staticmethod
    def title(words):
        """"WRN-28-10"."""
        first = ", stride first" if words.get("stride_first") else ""
        stem = ", stem stride 2" if words.get("stem_stride") == 2 else ""
        return f"WRN-{words['depth']}-{words['width']}{first}{stem}"

    def forward(self, x):
        return self.trunk(self.stem(x))
