"""A classifier read as an energy-based model (paper §3, Eqs. 1 to 5).

Lower energy means higher probability, and nothing called an energy is ever negated:
E(x) = -LogSumExp_y f(x)[y], E(x, y) = -f(x)[y], p(x, y) = exp(f(x)[y]) / Z.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.networks import network_class


def energy(logits, y=None):
    """Logits [B, K] to energies [B]: E(x) by Eq. 4, or E(x, y) with labels ``y`` [B] (int64)."""
    if logits.dim() != 2:
        raise ValueError(f"logits are [B, K], got shape {tuple(logits.shape)}")
    if y is None:
        return -logits.logsumexp(dim=1)
    return -logits.gather(1, y[:, None]).squeeze(1)


def gradient_at(model, leaf, y):
    """dE/dx of the sum of energies at ``leaf`` [B, C, H, W], which requires a gradient."""
    # call forward, because a compiled model's own graph would end before the energy
    (gradient,) = torch.autograd.grad(energy(model.forward(leaf), y).sum(), leaf)
    return gradient


@contextmanager
def frozen(model):
    """Make parameters constants inside the block.

    Then autograd records nothing for them, and torch.compile leaves them out of its kernels.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def has_batch_norm(model):
    """Whether what a network makes of an image may depend on the batch, or on statistics of one."""
    return any(isinstance(layer, _BatchNorm) for layer in model.modules())


@contextmanager
def statistics_kept(model):
    """Inside the block no pass changes the running statistics of batch norm.

    In train mode a batch is still normalised by its own statistics.
    """
    layers = [layer for layer in model.modules()
              if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class JEM(nn.Module):
    """A network with a ``stem`` (f_0) and a ``trunk`` (g), and the densities its logits define.

    models/networks.py describes networks.
    ``bf16``: run all but the last layer under bfloat16 autocast. Weights, batch statistics, logits,
    energies and losses stay float32.
    """

    bf16 = False
    gradient_at = staticmethod(gradient_at)  # or a compiled one (utils/machine.py)

    def __init__(self, network):
        super().__init__()
        self.stem, self.trunk, self.config = network.stem, network.trunk, network.config

    @classmethod
    def build(cls, network="wrn", **words):
        """A JEM over the network of that name, built with the arguments ``words``.

        ``JEM.build(**model.config)`` builds another one like ``model``. ValueError for an unknown
        name or impossible arguments.
        """
        model = cls(network_class(network)(**words))
        model.config = {"network": network, **model.config}
        return model

    def forward(self, x):
        """Images [B, 3, H, W] in [-1, 1] to logits f(x) [B, K]."""
        if not self.bf16:
            return self.trunk(self.stem(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            features = self.trunk[:-1](self.stem(x))
        return self.trunk[-1](features.float())

    def energy(self, x, y=None):
        """E(x) [B], or E(x, y) [B]; -E(x) is log p(x) up to the constant log Z."""
        return energy(self(x), y)

    def energy_gradient(self, x, y=None):
        """dE/dx [B, 3, H, W] of E(x) or E(x, y), by one forward and one backward pass.

        No parameter gets a gradient.
        """
        with torch.enable_grad():
            return self.gradient_at(self, x.detach().requires_grad_(), y)

    def log_p_y_given_x(self, x):
        """log p(y|x) [B, K], the softmax of the logits."""
        return F.log_softmax(self(x), dim=1)
