"""Known answers for the chains, the replay buffer and p_0."""

import math
from argparse import Namespace

import pytest
import torch

from models import JEM
from samplers import (
    ClassGaussians,
    ReplayBuffer,
    UniformInit,
    make_sampler,
    pyld,
    pyld_collapsed,
    sgld,
)
from samplers.informative_init import to_pixels
from utils.seeding import generator


@pytest.fixture
def model():
    torch.manual_seed(0)
    return JEM.build(depth=10, width=1).double().train()


def start(scale=1.0, n=6, size=12):
    noise = torch.rand(n, 3, size, size, dtype=torch.float64, generator=generator("cpu", "x"))
    return scale * (noise * 2 - 1)


# scale > 1 starts outside the pixels; noise puts chains outside between the outer steps
@pytest.mark.parametrize("case", [
    {"clip": 1.0}, {"clip": 1e-3}, {"clip": math.inf}, {"noise_std": 0.3}, {"pixels": None},
    {"y": torch.arange(6)}, {"scale": 1.5, "noise_std": 0.5}, {"step_decay": 0.7}])
def test_literal_algorithm_1_equals_its_collapsed_form(model, case):
    case = dict(case)
    x = start(case.pop("scale", 1.0))
    settings = {"n_outer": 10, "n_inner": 5, "step_size": 0.2, "clip": 1.0} | case
    # untrained gradients are tiny: a louder energy makes moves and clamps of ordinary size
    model.trunk.head.weight.data.mul_(300)
    literal = pyld(model, x, **settings, generator=generator("cpu", 7))
    collapsed = pyld_collapsed(model, x, **settings, generator=generator("cpu", 7))
    assert (literal - x).abs().max() > 1e-3
    assert (literal - collapsed).abs().max() <= 1e-10


def test_one_inner_step_is_proximal_sgld(model):
    x = start()
    one = pyld(model, x, n_outer=4, n_inner=1, step_size=0.3, clip=0.01)
    proximal = sgld(model.energy, x, n_steps=4, step_size=0.3, clip=0.01)
    assert (one - proximal).abs().max() <= 1e-10


def test_n_inner_steps_are_one_step_n_times_as_long(model):
    x = start()
    pyld_10_5 = pyld_collapsed(model, x, n_outer=10, n_inner=5, step_size=0.2, clip=1.0)
    proximal = sgld(model.energy, x, n_steps=10, step_size=1.0, clip=1.0)
    assert (pyld_10_5 - proximal).abs().max() <= 1e-10


def test_sgld_on_a_gaussian_energy_has_the_stationary_variance_of_its_recursion():
    """E = x^2 / (2 s^2): x' = (1 - a/s^2) x + sigma n settles at sigma^2 / (1 - (1 - a/s^2)^2)."""
    s2, step, noise = 0.5, 0.1, 0.3
    x = sgld(lambda x: x.pow(2).sum((1, 2, 3)) / (2 * s2), torch.zeros(200_000, 1, 1, 1).double(),
             n_steps=60, step_size=step, noise_std=noise, pixels=None,
             generator=generator("cpu", "gauss"))
    expected = noise**2 / (1 - (1 - step / s2) ** 2)
    # the variance of n draws has a relative standard error of sqrt(2/n) = 0.3 %
    assert abs(x.var().item() / expected - 1) < 0.015
    assert abs(x.mean().item()) < 5 * math.sqrt(expected / len(x))


def test_a_langevin_step_samples_the_density():
    """alpha/2 with noise sqrt(alpha), small: the variance is the energy's own."""
    alpha, s2 = 0.01, 0.04
    x = sgld(lambda x: x.pow(2).sum((1, 2, 3)) / (2 * s2), torch.zeros(200_000, 1, 1, 1),
             n_steps=80, step_size=alpha / 2, noise_std=math.sqrt(alpha), pixels=None,
             generator=generator("cpu", "langevin"))
    assert abs(x.var().item() / s2 - 1) < 0.1  # the step's own bias is alpha / (4 s2) = 6 %


def test_chains_descend_and_leave_parameters_alone(model):
    x = start()
    before = model.energy(x).mean().item()
    end = pyld_collapsed(model, x, n_outer=5, n_inner=5, step_size=50.0, clip=1.0)
    assert not end.requires_grad and end.abs().max() <= 1
    assert all(p.grad is None for p in model.parameters())
    assert model.energy(end).mean().item() < before


def test_proximity_bounds_every_outer_step(model):
    model.trunk.head.weight.data.mul_(1e6)
    x = start()
    moved = pyld_collapsed(model, x, n_outer=1, n_inner=5, step_size=0.01, clip=0.5, pixels=None)
    assert torch.isclose((moved - x).abs().max(), torch.tensor(5 * 0.01 * 0.5).double())


# -- p_0 ------------------------------------------------------------------------------------------
def correlated_images(n_classes=2, n=400, size=2):
    g = generator("cpu", "images")
    mixing = torch.randn(n_classes, 3 * size**2, 3 * size**2, generator=g)
    x = torch.randn(n_classes, n, 3 * size**2, generator=g) @ mixing * 6 + 128
    x = x.round().clamp(0, 255).to(torch.uint8).view(-1, 3, size, size)
    return x, torch.arange(n_classes).repeat_interleave(n)


def test_class_gaussians_have_the_datas_mean_and_covariance():
    x, y = correlated_images()
    p0 = ClassGaussians.fit(x, y, 2)
    n = 40_000
    draws = p0.sample(n, torch.ones(n).long(), host=None, generator=generator("cpu", 1)).flatten(1)
    data = to_pixels(x[y == 1]).flatten(1).double()
    covariance = torch.cov(data.T, correction=0) + 1e-4 * torch.eye(12)
    spread = covariance.diagonal().sqrt()
    assert ((draws.double().mean(0) - data.mean(0)) / spread).abs().max() < 5 / math.sqrt(n)
    error = (torch.cov(draws.double().T) - covariance) / torch.outer(spread, spread)
    assert error.abs().max() < 5 * math.sqrt(2 / n)
    assert torch.allclose(p0.means()[1].flatten().double(), data.mean(0), atol=1e-5)


def test_the_ridge_is_there_where_the_data_has_no_spread():
    x = torch.full((10, 3, 4, 4), 100, dtype=torch.uint8)
    p0 = ClassGaussians.fit(x, torch.zeros(10).long(), 1)
    draws = p0.sample(2000, host=generator("cpu", 0), generator=generator("cpu", 1))
    assert abs(draws.std().item() - 0.01) < 2e-4


def test_classes_are_drawn_by_their_frequency_and_every_class_needs_images():
    x, y = correlated_images()
    p0 = ClassGaussians.fit(x[200:], y[200:], 2)
    assert torch.allclose(p0.pi, torch.tensor([200 / 600, 400 / 600]))
    with pytest.raises(ValueError, match="class 2 has no training image"):
        ClassGaussians.fit(x, y, 3)


def test_compiled_draws_are_those_of_the_matrix_product():
    x, y = correlated_images()
    mixed = torch.randperm(len(y), generator=generator("cpu", 5))  # fit sorts them by class
    plain, compiled = (ClassGaussians.fit(x[mixed], y[mixed], 2, compiled=c) for c in (False, True))
    assert compiled.weighted_sum is not None and plain.weighted_sum is None
    for n in (1, 5, 2 * ClassGaussians.few + 10):  # one pass a draw, and too many for that
        a, b = (p0.sample(n, host=generator("cpu", 0), generator=generator("cpu", 1))
                for p0 in (plain, compiled))
        assert torch.allclose(a, b, atol=1e-5) and len(a) == n
    assert len(a.unique(dim=0)) == n


# -- replay buffer --------------------------------------------------------------------------------
class Marked:
    """A p_0 that counts its draws and marks them with 7."""

    drawn = 0

    def sample(self, n, y=None, *, host, generator):
        self.drawn += n
        return torch.full((n, 3, 4, 4), 7.0)


@pytest.mark.parametrize("rho", (0.0, 0.05, 1.0))
def test_only_reinitialised_chains_are_drawn_from_p0(rho):
    buffer, p0 = ReplayBuffer(torch.zeros(50, 3, 4, 4), 10), Marked()
    host, new = generator("cpu", rho), 0
    for _ in range(200):
        x_0, *_ = buffer.draw(64, p0, rho, host=host, generator=None)
        new += int((x_0[:, 0, 0, 0] == 7).sum())
    assert new == p0.drawn
    assert abs(new / 12800 - rho) <= 4 * math.sqrt(rho * (1 - rho) / 12800)


@pytest.mark.parametrize("size", (10, 23, 100))
def test_chains_per_class_stay_in_their_block(size):
    owner = torch.arange(size) * 10 // size
    buffer = ReplayBuffer(owner.float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone(), 10)
    y = torch.arange(10).repeat(300)
    slots = buffer.slots(len(y), y, host=generator("cpu", 0))
    assert torch.equal(owner[slots], y)
    assert set(slots.tolist()) == set(range(size))


def test_a_slot_drawn_twice_keeps_its_last_chain():
    buffer = ReplayBuffer(torch.zeros(5, 3, 4, 4), 1)
    chains = torch.arange(4.0).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    buffer.store(torch.tensor([2, 0, 2, 2]), chains, torch.arange(1, 5))
    assert buffer.images[:, 0, 0, 0].tolist() == [1.0, 0.0, 3.0, 0.0, 0.0]
    assert buffer.ages.tolist() == [2, 0, 4, 0, 0]


def test_step_decay_begins_again_as_it_does_at_each_visit_of_a_chain_in_training():
    args = Namespace(n_steps=5, in_steps=5, pyld_lr=0.2, sgld_lr=0.0, sgld_std=0.0, eps=1.0,
                     step_decay=0.5, pixel_clamp=True, literal_pyld=False)
    torch.manual_seed(0)
    model = JEM.build(depth=10, width=1, n_classes=10).eval()
    x_0 = 2 * torch.rand(2, 3, 16, 16) - 1
    x, y = x_0, make_sampler(args, 16, 7)(model, make_sampler(args, 7)(model, x_0))
    for n_steps in (5, 5, 5, 5, 3):
        x = make_sampler(args, n_steps)(model, x)
    assert torch.equal(make_sampler(args, 23)(model, x_0), x) and torch.equal(x, y)
    make_sampler(args, 2**62)  # takes no memory


@pytest.mark.parametrize("size, parts", ((40, 2), (120, 3), (10, 1), (100, 3), (47, 2)))
def test_shares_of_a_buffer_are_disjoint_and_keep_the_blocks_of_the_classes(size, parts):
    owner = torch.arange(size) * 10 // size
    buffer = ReplayBuffer(torch.zeros(size, 3, 4, 4), 10)
    y, written = torch.arange(10).repeat(50), torch.zeros(size)
    for part in range(parts):
        share = buffer.share(part, parts)
        before = buffer.images.clone()
        slots = share.slots(len(y), y, host=generator("cpu", part))
        share.store(slots, (1.0 + y).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), 1 + y)
        written += (buffer.images != before)[:, 0, 0, 0]
    assert (written == 1).all()
    assert torch.equal(buffer.images[:, 0, 0, 0], 1.0 + owner)
    assert torch.equal(buffer.ages, 1 + owner)


def test_a_buffer_is_filled_from_p0_class_by_class():
    x, y = correlated_images(n=50, size=4)
    x[y == 0], x[y == 1] = 0, 255  # -1 and +1
    p0 = ClassGaussians.fit(x, y, 2)
    buffer = ReplayBuffer.fill(9, p0, 2, per_class=True, host=generator("cpu", 0),
                               generator=generator("cpu", 1))
    assert (buffer.images.mean((1, 2, 3)) > 0).tolist() == [False] * 5 + [True] * 4
    uniform = UniformInit((3, 4, 4), "cpu").sample(500, host=None, generator=generator("cpu", 2))
    assert uniform.min() >= -1 and uniform.max() <= 1 and abs(uniform.var().item() - 1 / 3) < 0.02
