"""The network is the paper's, and its logits define the densities of Eqs. 1 to 5."""

import pytest
import torch

from models import JEM, NORMS, WideResNet, energy


def test_wrn_28_10_has_the_released_networks_parameters():
    with torch.device("meta"):
        network = WideResNet(depth=28, width=10, n_classes=10)
    assert sum(p.numel() for p in network.parameters()) == 36_489_290


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", (8, 16, 32, 40))
def test_every_norm_takes_images_of_any_size_from_8(norm, size):
    network = WideResNet(depth=10, width=1, n_classes=7, norm=norm)
    x = torch.rand(3, 3, size, size) * 2 - 1
    for mode in (True, False):
        assert network.train(mode)(x).shape == (3, 7)


def test_the_second_convolution_carries_the_stride():
    block = WideResNet(depth=16, width=2).trunk.layer2[0]
    assert block.conv1.stride == (1, 1) and block.conv2.stride == block.shortcut.stride == (2, 2)
    assert block.conv1.bias is not None and block.conv2.bias is not None


def test_running_statistics_follow_the_last_batch_at_the_released_momentum():
    norm = WideResNet(depth=10, width=1).trunk.layer1[0].norm1
    x = torch.randn(8, 16, 4, 4) * 3 + 5
    norm(x)
    assert torch.allclose(norm.running_mean, 0.9 * x.mean((0, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("config, words", [
    ({"depth": 27}, "6n \\+ 4"), ({"depth": 4}, "6n \\+ 4"), ({"width": 0}, "start at 1"),
    ({"norm": "frozen"}, "norm is one of")])
def test_a_depth_width_or_norm_that_no_network_has_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        WideResNet(**config)


def test_energies_are_those_of_the_papers_equations():
    torch.manual_seed(0)
    model = JEM.build(depth=10, width=1, n_classes=5).double().eval()
    x, y = torch.rand(4, 3, 8, 8).double(), torch.tensor([0, 4, 2, 2])
    f = model(x)
    e_x, e_xy = model.energy(x), model.energy(x, y)
    assert e_x.shape == e_xy.shape == (4,)
    assert torch.allclose(e_x, -torch.log(torch.exp(f).sum(1)))                       # Eq. 4
    assert torch.allclose(e_xy, -f[torch.arange(4), y])
    log_p = model.log_p_y_given_x(x)                                                   # Eq. 5
    assert torch.allclose(-e_xy, log_p[torch.arange(4), y] - e_x)


def test_an_energy_of_something_else_than_logits_is_refused():
    with pytest.raises(ValueError, match="logits are"):
        energy(torch.zeros(3))
