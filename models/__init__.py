"""Networks and the densities they define."""

from models.jem import JEM, energy, frozen
from models.wide_resnet import NORMS, WideResNet

__all__ = ["JEM", "NORMS", "WideResNet", "energy", "frozen"]
