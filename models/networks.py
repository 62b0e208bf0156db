"""The networks by name. A new one is a file beside this one and a line in ``NETWORKS``.

A network is a module with three attributes:

- ``stem``, the paper's f_0, the layers that images [B, 3, H, W] in [-1, 1] pass first.
- ``trunk``, the paper's g, an ``nn.Sequential`` from the stem's output to logits [B, K]. Its last
  part is the linear layer, whose inputs are the penultimate features [B, D].
- ``config``, the class's arguments that build it again. ``n_classes`` is one of them.

f(x) = trunk(stem(x)). PYLD's short cut needs an affine stem (one convolution or linear layer). For
another stem, train with --literal_pyld. The class gives each argument a default. Flags of the same
name (--depth, --width, --norm, --bn_momentum, --stride_first, --stem_stride) set it. A ValueError
for impossible arguments becomes a one-line message. A class may also have ``title(words)``, its
display name as a function of its arguments.
"""

import inspect

from models.resnet18 import ResNet18
from models.wide_resnet import WideResNet

NETWORKS = {
    "wrn": WideResNet,
    "resnet18": ResNet18,
}


def network_class(name):
    """The class of a network. ValueError for a name that is not in the table."""
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r}: there are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def network_words(name):
    """{argument: default} of a network, without ``n_classes``, which the data set determines."""
    parameters = inspect.signature(network_class(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "n_classes"}


def network_name(words):
    """A network's display name, such as "WRN-28-10", from its config or a run's arguments.

    Old configs do not name their network. They are Wide-ResNets.
    """
    name = words.get("network") or "wrn"
    title = getattr(NETWORKS.get(name), "title", None)
    return title(words) if title else name
