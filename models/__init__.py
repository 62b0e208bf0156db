"""Networks and the densities they define."""

from models.jem import JEM, energy, frozen, has_batch_norm, statistics_kept
from models.networks import NETWORKS, network_name, network_words
from models.wide_resnet import NORMS, WideResNet

__all__ = ["JEM", "NETWORKS", "NORMS", "WideResNet", "energy", "frozen", "has_batch_norm",
           "network_name", "network_words", "statistics_kept"]
