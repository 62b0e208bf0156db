"""Attacks against linear classifiers, whose robust accuracy is known in closed form."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models import JEM
from samplers import to_pixels
from utils.evaluation import robustness
from utils.evaluation.inference import predict
from utils.evaluation.robustness import autoattack_accuracy, margin_pgd_accuracy, pgd_accuracy
from utils.program import InputError

NORMS = ("linf", "l2")
SIZE, N = 6, 60


class Linear(nn.Module):
    """Logits W x + b, times ``scale``: large scales drive the softmax to one-hot, float32's 0 and
    1, where the cross-entropy has no gradient left."""

    def __init__(self, n_classes, scale=1.0, seed=0):
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, n_classes)
        self.scale = scale
        with torch.no_grad():
            noise = torch.Generator().manual_seed(seed)
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=noise) * 0.1)
            self.head.bias.zero_()

    def forward(self, x):
        return self.scale * self.head(x.flatten(1))


def images(model, seed=1):
    """Images far from black and white, so that [-1, 1] never binds; one label in ten is wrong."""
    x = torch.randint(96, 160, (N, 3, SIZE, SIZE), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(seed))
    y = model(to_pixels(x)).argmax(1)
    y[::10] = (y[::10] + 1) % model.head.out_features
    return x, y


def distances(model, x, y, norm):
    """Distance from each image in [-1, 1] to the nearest boundary, 0 where the label is wrong:
    min_j (z_y - z_j) / ||w_y - w_j||, in the dual norm (L1 for L-inf, L2 for L2)."""
    weight, bias = model.head.weight.detach().double(), model.head.bias.detach().double()
    z = to_pixels(x).double().flatten(1) @ weight.T + bias
    gaps = z.gather(1, y[:, None]) - z
    dual = (weight[y][:, None] - weight[None]).norm(1 if norm == "linf" else 2, dim=2)
    ratio = gaps / dual
    ratio[torch.arange(len(y)), y] = torch.inf
    return ratio.amin(1).clamp_min(0)


def typed(radius, norm):
    """The inverse of ``ball_radius``, written apart from it."""
    return radius / 2 * 255 if norm == "linf" else radius / 2


def budgets(distance, norm, count=4):
    """``count`` budgets among the distances, each in the middle of a wide gap, and the exact
    robust accuracy there: no image lies within 2 % of a boundary."""
    values = distance[distance > 0].sort().values
    middle, width = (values[1:] + values[:-1]) / 2, (values[1:] - values[:-1]) / values[1:]
    middle = middle[width > 0.04]
    middle = middle[torch.linspace(0, len(middle) - 1, count).long()]
    exact = (distance[None] > middle[:, None]).double().mean(1)
    return [typed(radius, norm) for radius in middle.tolist()], exact.tolist()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n_classes", (2, 5))
def test_linear_models_have_known_robust_accuracy(norm, n_classes):
    model = Linear(n_classes)
    x, y = images(model)
    distance = distances(model, x, y, norm)
    eps, exact = budgets(distance, norm)
    assert len(set(exact)) == len(exact)
    pgd = pgd_accuracy(model, x, y, eps, norm)
    margin = margin_pgd_accuracy(model, x, y, eps, norm)
    assert margin.accuracy.tolist() == exact
    assert (pgd.accuracy >= margin.accuracy).all()
    radii = torch.tensor([robustness.ball_radius(e, norm) for e in eps])
    for result in (pgd, margin):  # no image is broken that cannot be
        assert result.robust[distance[None] > radii[:, None]].all()
        assert torch.equal(result.accuracy, result.robust.double().mean(1))
    if n_classes == 2:  # with more, the cross-entropy may climb towards a class farther off
        assert pgd.accuracy.tolist() == exact
        assert pgd_accuracy(model, x, y, eps, norm, random_start=False).accuracy.tolist() == exact
        weak = pgd_accuracy(model, x, y, eps, norm, rel_stepsize=1 / 30)  # why it is no default
        assert weak.accuracy.sum() > sum(exact)


def test_margin_sees_through_saturated_softmax():
    """Scaled logits have the same robust accuracy, but no cross-entropy gradient in float32."""
    model = Linear(3, scale=1e4)
    x, y = images(model)
    eps, exact = budgets(distances(model, x, y, "linf"), "linf")
    assert margin_pgd_accuracy(model, x, y, eps, "linf").accuracy.tolist() == exact
    assert pgd_accuracy(model, x, y, eps, "linf").accuracy[-1] > exact[-1] + 0.1


def test_margin_pgd_tries_the_classes_behind_the_largest_logit():
    """Pixel u > 0 lifts the nearest rival, never enough; u < -0.2 lifts the other one."""

    class Trap(nn.Module):
        def forward(self, x):
            u = x.flatten(1)[:, 0]
            return torch.stack([0 * u, 0.1 * u - 0.1, -5 * u - 1], dim=1)

    x, y = torch.zeros(4, 3, SIZE, SIZE), torch.zeros(4, dtype=torch.long)
    broken = [Trap()(robustness.margin_pgd(Trap(), x, y, radius, norm, steps=10,
                                           starts=[torch.zeros_like(x)] * turns)).argmax(1) != y
              for norm in NORMS for radius, turns in ((0.19, 3), (0.3, 1), (0.3, 3))]
    assert [b.all().item() for b in broken] == [b.any().item() for b in broken] == [False, False,
                                                                                   True] * 2


def test_margin_pgd_leaves_an_image_alone_once_it_is_broken():
    """Wide budgets break all images within a step or two of forty; none is shown after that."""
    model, shown = Linear(3), []
    x, y = images(model)
    right = model(to_pixels(x)).argmax(1) == y
    x_0, y = to_pixels(x)[right], y[right]
    model.register_forward_hook(lambda module, inputs, logits: shown.append(len(logits)))
    x_adv = robustness.margin_pgd(model, x_0, y, 1.0, "linf", steps=40,
                                  starts=[torch.zeros_like(x_0)])
    assert (model(x_adv).argmax(1) != y).all() and sum(shown) < 6 * len(x_0)


def test_budgets_are_typed_for_zero_to_one_images():
    assert robustness.ball_radius(8, "linf") == pytest.approx(16 / 255)
    assert robustness.ball_radius(0.5, "l2") == 1.0
    # 8/255 of a [0, 1] image is 8 grey levels of a uint8 one
    x = torch.tensor([100, 108], dtype=torch.uint8)
    step = to_pixels(x).diff().item()
    assert step == pytest.approx(robustness.ball_radius(8, "linf"))


def network():
    """An untrained network in train mode."""
    torch.manual_seed(0)
    return JEM.build(depth=10, width=1)


def easy_images(n=12, size=8):
    """Images with pixels at both ends of the range, where the box binds, and the labels that
    ``network()`` gives them in eval mode, so that there is something to attack."""
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(2))
    x[:, :, :2] = 0
    x[:, :, -2:] = 255
    return x, predict(network(), x).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ("foolbox", "margin"))
def test_adversarial_images_stay_in_ball_and_box(norm, kind):
    model, (x, y) = network(), easy_images()
    x_0, radius = to_pixels(x), 0.3
    starts = [robustness.random_starts(x_0, norm, 0, torch.arange(len(x)), r) for r in range(2)]
    with robustness.under_attack(model):
        if kind == "foolbox":
            x_adv = robustness.foolbox_pgd(model, x_0, y, radius, norm, steps=5, rel_stepsize=0.5,
                                           start=starts[0])
        else:
            x_adv = robustness.margin_pgd(model, x_0, y, radius, norm, steps=5, starts=starts)
    assert x_adv.shape == x_0.shape and x_adv.abs().max() <= 1
    length = robustness.lengths(x_adv - x_0, norm).flatten()
    assert (length <= radius + 1e-5).all() and length.max() > 0.5 * radius


def test_random_starts_lie_in_the_unit_ball():
    x = torch.zeros(20, 3, SIZE, SIZE)
    for norm in NORMS:
        start = robustness.random_starts(x, norm, 0, torch.arange(20))
        length = robustness.lengths(start, norm)
        assert (length <= 1 + 1e-6).all() and length.min() > 0.9 and start.mean().abs() < 0.05
        part = robustness.random_starts(x[:3], norm, 0, torch.tensor([4, 9, 17]))
        assert torch.equal(part, start[[4, 9, 17]])
        assert not torch.equal(start, robustness.random_starts(x, norm, 0, torch.arange(20), 1))


@pytest.mark.parametrize("attack", (pgd_accuracy, margin_pgd_accuracy))
def test_same_images_break_whatever_the_batch_size(attack):
    model = Linear(3)
    x, y = images(model)
    eps, _ = budgets(distances(model, x, y, "linf"), "linf", 2)
    results = [attack(model, x, y, eps, "linf", steps=3, batch_size=b, seed=4).robust
               for b in (7, N)]
    assert torch.equal(*results)
    assert torch.equal(results[0][:, :9],
                       attack(model, x[:9], y[:9], eps, "linf", steps=3, seed=4).robust)


@pytest.mark.parametrize("attack", (pgd_accuracy, margin_pgd_accuracy))
def test_curve_falls_from_clean_accuracy_and_rows_follow_the_order_typed(attack):
    model, (x, y) = network(), easy_images(30)
    y[:6] = (y[:6] + 1) % 10
    eps = [4, 0, 1, 0.25, 1]
    result = attack(model, x, y, eps, "linf", steps=3)
    assert result.eps == eps and result.robust.shape == (5, 30)
    assert result.accuracy[1] == result.correct.double().mean() == 0.8
    assert torch.equal(result.robust[2], result.robust[4])
    rows = result.robust[[1, 3, 2, 0]].int()
    assert (rows.diff(dim=0) <= 0).all() and rows[-1].sum() < rows[0].sum()


def test_images_once_broken_stay_broken():
    """An attack that breaks image 3 at one budget, and is shown only what is still robust."""
    model = Linear(2)
    x, y = images(model)
    shown = {}

    def attack(x_0, labels, radius, indices):
        shown[radius] = indices.tolist()
        x_adv = x_0.clone()
        if radius == 200:
            x_adv[indices == 3] = to_pixels(x[y != y[3]][-1:])
        return x_adv

    result = robustness.robust_accuracy(model, x, y, [150, 50, 100], "l2", attack)
    right = result.correct.nonzero().flatten().tolist()
    left = [i for i in right if i != 3]
    assert shown == {100: right, 200: right, 300: left}
    assert [row.nonzero().flatten().tolist() for row in result.robust] == [left, right, left]


def leaves_no_trace(run):
    """``run(model)`` changes neither modes, flags, statistics, gradients nor global randomness."""
    model = network()
    model.trunk.layer2.eval()
    model.stem.bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    with torch.no_grad():  # as an evaluation script may well call it
        run(model)
    assert torch.equal(stream, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters()) and not model._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_leave_no_trace(norm):
    x, y = easy_images()
    leaves_no_trace(lambda model: pgd_accuracy(model, x, y, [1], norm, steps=2))
    leaves_no_trace(lambda model: margin_pgd_accuracy(model, x, y, [1], norm, steps=2, restarts=2))

    def fail(*_):
        torch.rand(1)
        raise KeyError

    def interrupted(model):
        with pytest.raises(KeyError):
            robustness.robust_accuracy(model, x, y, [1], norm, fail)

    leaves_no_trace(interrupted)


@pytest.mark.parametrize("change", (
    {"eps": [-1]}, {"eps": []}, {"eps": [float("nan")]}, {"eps": [float("inf")]}, {"norm": "l1"},
    {"x": torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "y": torch.zeros(0)},
    {"x": torch.zeros(12, 3, 8, 8)}, {"y": torch.zeros(3)}, {"batch_size": 0}, {"steps": 0}))
@pytest.mark.parametrize("attack", (pgd_accuracy, margin_pgd_accuracy))
def test_bad_input_is_one_line(attack, change):
    x, y = easy_images()
    with pytest.raises(InputError) as error:
        attack(network(), **{"x": x, "y": y, "eps": [1], "norm": "linf", **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attack", (pgd_accuracy, margin_pgd_accuracy))
def test_broken_weights_are_refused(attack):
    model, (x, y) = network(), easy_images()
    with torch.no_grad():
        model.trunk.head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        attack(model, x, y, [1], "linf")


@pytest.mark.parametrize("attack", (pgd_accuracy, margin_pgd_accuracy))
def test_gradients_that_are_not_finite_are_refused(attack):
    class Kink(Linear):
        def forward(self, x):
            return super().forward(x) + (0 * x).sqrt().flatten(1)[:, :1]

    model = Kink(2)
    x, y = images(model)
    with pytest.raises(InputError, match="not finite"):
        attack(model, x, y, [1], "linf")


def test_attack_that_cheats_is_caught():
    model, (x, y) = network(), easy_images()
    for cheat in (lambda x_0, *_: x_0 + 3, lambda x_0, *_: (x_0 + 0.1).clamp(-1, 1)):
        with pytest.raises(RuntimeError, match="left"):
            robustness.robust_accuracy(model, x, y, [1], "linf", cheat)


def test_foolbox_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(InputError, match="foolbox is not installed: pip install -r req"):
        pgd_accuracy(network(), *easy_images(), [1], "linf")


def test_autoattack_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    x, y = easy_images()
    with pytest.raises(InputError, match="pip install pyautoattack"):
        autoattack_accuracy(network(), x, y, [1], "linf")


@pytest.mark.parametrize("norm", NORMS)
def test_autoattack_is_given_images_and_budgets_in_its_units(monkeypatch, norm):
    class Whole:
        """Its attack takes the whole budget from one pixel of images in [0, 1]."""

        def __init__(self, model, *, norm, eps, seed, device):
            self.model, self.eps, self.seen = model, eps, (norm, seed)
            self.apgd_targeted = self.fab = SimpleNamespace()

        def run_standard_evaluation(self, x, y, batch_size):
            assert self.attacks_to_run == ["apgd-ce"] and self.fab.n_target_classes == 4
            assert self.seen == (norm.capitalize(), 3) and x.min() >= 0 and x.max() <= 1
            assert torch.equal(self.model(x), model(2 * x - 1)) and batch_size == len(x)
            moved = x.clone()
            moved[:, 0, 0, 0] += self.eps * (1 - 2 * (x[:, 0, 0, 0] > 0.5))
            lengths.append(robustness.lengths(2 * (moved - x), norm).max())
            return moved, y

    model, lengths = Linear(5), []
    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=Whole))
    autoattack_accuracy(model, *images(model), [typed(0.3, norm)], norm, attacks=["apgd-ce"],
                        seed=3)
    assert lengths == [pytest.approx(0.3, rel=1e-4)]


@pytest.mark.parametrize("norm", NORMS)
def test_autoattack_is_exact_on_a_linear_model(norm):
    pytest.importorskip("pyautoattack")
    model = Linear(5)
    x, y = images(model)
    eps, exact = budgets(distances(model, x, y, norm), norm, 2)
    result = autoattack_accuracy(model, x, y, eps, norm, attacks=["apgd-ce", "apgd-t"])
    assert result.accuracy.tolist() == exact
    with pytest.raises(InputError, match="5 classes is some of"):
        autoattack_accuracy(model, x, y, eps, norm, attacks=["apgd"])
    few = Linear(3)
    with pytest.raises(InputError, match="3 classes is some of apgd-ce, fab-t, square"):
        autoattack_accuracy(few, *images(few), eps, norm)
    leaves_no_trace(lambda model: autoattack_accuracy(model, *easy_images(4), [1], norm,
                                                      attacks=["fab-t"]))


@pytest.mark.parametrize("norm, radius", (("linf", 8 / 127.5), ("l2", 1.0)))
def test_adversarial_training_batches_lie_in_the_ball_and_raise_the_loss(norm, radius):
    torch.manual_seed(0)
    model = JEM.build(depth=10, width=1).eval()
    x, y = torch.rand(8, 3, 16, 16) * 2 - 1, torch.arange(8)
    x_adv = robustness.adversarial_batch(model, x, y, radius, norm, steps=7,
                                         generator=torch.Generator().manual_seed(0))
    assert x_adv.abs().max() <= 1
    assert robustness.lengths(x_adv - x, norm).max() <= radius * (1 + 1e-5)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(x_adv), y) > loss(model(x), y)
    assert all(p.grad is None for p in model.parameters())
