"""The networks by name. A new one is a file beside this one and a line in ``NETWORKS``.

A network is a module with three attributes:

- ``stem``, the paper's f_0, which images [B, 3, H, W] in [-1, 1] go through first;
- ``trunk``, the paper's g, an ``nn.Sequential`` that makes logits [B, K] of the stem's output, its
  last part the linear layer: what comes before are the penultimate features [B, D];
- ``config``, the words its class is called with to build it again. ``n_classes`` is one.

f(x) = trunk(stem(x)). PYLD costs as little as it does where the stem is affine (one convolution or
linear layer): for another stem, train with --literal_pyld. The class gives each word a default. A
word that has a flag of its name (--depth, --width, --norm, --bn_momentum, --stride_first) is set by
it. A ValueError for words that make no sense becomes the user's one line. A class may also have
``title(words)``, its name for people as a function of its words.
"""

import inspect

from models.resnet18 import ResNet18
from models.wide_resnet import WideResNet

NETWORKS = {
    "wrn": WideResNet,
    "resnet18": ResNet18,
}


def network_class(name):
    """The class of a network; ValueError for a name that is not in the table."""
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r}: there are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def network_words(name):
    """{word: its default} of a network, but for the number of classes, which the data decide."""
    parameters = inspect.signature(network_class(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "n_classes"}


def network_name(words):
    """A network's name for people, "WRN-28-10", from its config or from arguments with its words.
    Those of before there was a choice are a Wide-ResNet's."""
    name = words.get("network") or "wrn"
    title = getattr(NETWORKS.get(name), "title", None)
    return title(words) if title else name
