"""torchvision's ResNet-18 for small images: a 3x3 stem of stride 1 and no max-pooling."""

from torch import nn


class ResNet18(nn.Module):
    """Images [B, 3, H, W] (any range) to logits [B, K]. 11,173,962 parameters for ten classes."""

    def __init__(self, n_classes=10):
        super().__init__()
        from torchvision.models import resnet18  # here, because the import takes seconds

        net = resnet18(num_classes=n_classes)
        self.config = {"n_classes": n_classes}
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.trunk = nn.Sequential(net.bn1, net.relu, net.layer1, net.layer2, net.layer3,
                                   net.layer4, net.avgpool, nn.Flatten(), net.fc)
