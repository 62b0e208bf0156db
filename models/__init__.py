"""Networks and the densities they define."""

from models.jem import JEM, energy, frozen
from models.wide_resnet import NORMS, WideResNet

__all__ = ["JEM", "NORMS", "WideResNet", "energy", "frozen",
           "network_name"]


def network_name(depth, width):
    """A Wide-ResNet in the paper's words: "WRN-28-10"."""
    return f"WRN-{depth}-{width}"
