"""What a flag says reaches what computes it: samplers, passes, schedules, evaluations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, inject, tiny
from torch import nn

import samplers
import train_jempp
from models import JEM
from samplers import ClassGaussians, ReplayBuffer, UniformInit, in_company, make_sampler, to_pixels
from utils import cli
from utils.data import SPECS, TrainData, digits
from utils.evaluation import evaluations, generation, ood, robustness, sample_evaluations
from utils.evaluation import subject as subjects
from utils.evaluation.evaluations import named_by
from utils.evaluation.inference import pixels
from utils.evaluation.subject import Subject
from utils.files import checkpoint
from utils.loading import LoadedModel
from utils.seeding import generator
from utils.training.build import Setup, build
from utils.training.guard import Guard
from utils.training.schedule import learning_rate


def built(*flags):
    args = cli.train_args([*TINY, *flags])
    return args, build(args, torch.device("cpu"))


def stepped(setup, args, draw=lambda model, x_0, y=None, generator=None: x_0):
    return train_jempp.train_step(args, Setup(*setup[:3]), draw)


# -- samplers -------------------------------------------------------------------------------------
def test_a_fresh_chain_of_a_class_begins_in_that_class():
    y = torch.arange(20) % 2
    x = (255 * y)[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8)
    buffer, asked = ReplayBuffer(torch.zeros(20, 3, 2, 2), 2), torch.arange(100) % 2
    x_0, *_ = buffer.draw(100, ClassGaussians.fit(x, y, 2), 1.0, asked, host=generator("cpu", 0),
                          generator=generator("cpu", 1))
    assert torch.equal((x_0.mean((1, 2, 3)) > 0).long(), asked)


def linear(n_classes):
    """E(x, y) = -<w_y, x>: (JEM, w), with gradients of up to 2."""
    head = nn.Linear(48, n_classes, bias=False)
    head.weight.data = torch.linspace(-2, 2, 48 * n_classes).view(n_classes, 48)
    net = SimpleNamespace(stem=nn.Identity(), trunk=nn.Sequential(nn.Flatten(), head), config={})
    return JEM(net), head.weight.data.view(n_classes, 3, 4, 4)


JEM_WORDS = ["--in_steps", "0", "--sgld_lr", "1", "--eps", "inf", "--no-pixel_clamp"]


def test_jems_chains_are_not_clipped_and_noisy():
    args = cli.train_args([*TINY, *JEM_WORDS, "--sgld_std", "0.01", "--n_steps", "20"])
    model, w = linear(1)
    x = make_sampler(args)(model, torch.zeros(300, 3, 4, 4), generator=generator("cpu", 0)) - 20 * w
    assert x.mean(0).abs().max() < 0.02 and x.std() == pytest.approx(0.01 * 20**0.5, rel=0.03)


def test_a_conditional_chain_of_sgld_descends_the_energy_of_its_class():
    model, w = linear(2)
    args, y = cli.train_args([*TINY, *JEM_WORDS, "--n_steps", "3"]), torch.tensor([1, 0])
    assert torch.allclose(make_sampler(args)(model, torch.zeros(2, 3, 4, 4), y=y), 3 * w[y])


def test_company_is_drawn_anew_at_each_visit(monkeypatch):
    seen, args = [], SimpleNamespace(n_steps=2)
    monkeypatch.setattr(samplers, "make_sampler", lambda args, n, before: (
        lambda model, x, y=None, generator=None: seen.append((n, before, x[3:, 0, 0, 0])) or x))
    crowd = torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    draw = in_company(args, 5, crowd, None, 7)
    draw(None, -torch.ones(3, 3, 2, 2), generator=generator("cpu", 0))
    assert [part[:2] for part in seen] == [(2, 0), (2, 2), (1, 4)]
    assert not torch.equal(seen[0][2], seen[1][2]) and all(len(part[2]) == 7 for part in seen)


# -- training -------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", (["--class_cond_p_x_sample"],
                                   ["--p_x_weight", "0", "--p_x_y_weight", "1"]))
def test_the_chains_that_are_to_have_classes_have_them(flags):
    args, setup = built(*flags)
    seen = []
    stepped(setup, args, lambda model, x_0, y=None, generator=None: seen.append(y) or x_0)
    (y,) = seen
    labels = setup.data.batch(0)[1][1]
    assert torch.equal(y, labels) == (len(flags) > 1) and y.shape == labels.shape


@pytest.mark.parametrize("norm, radius", (("linf", 16 / 255), ("l2", 1.0)))
def test_adversarial_training_sees_images_at_its_radius(norm, radius):
    args, setup = built("--p_x_weight", "0", "--adversarial", norm)
    shown = []
    setup.state.model.register_forward_pre_hook(lambda _, x: shown.append(x[0].detach()))
    stepped(setup, args)
    x = setup.data.batch(0)[1][0].clamp(-1, 1)
    length = robustness.lengths(shown[-1] - x, norm)
    assert len(shown) == args.adv_steps + 1
    assert length.max() <= radius * (1 + 1e-5) and length.min() > 0.5 * radius


def test_flags_of_the_data_and_of_p0_reach_them():
    _, setup = built("--flip", "--shared_batch", "--sigma", "0.5", "--pad", "1", "--init",
                     "uniform")
    data = setup.data
    assert (data.spec.flip, data.spec.pad, data.shared_batch, data.sigma) == (True, 1, True, 0.5)
    assert isinstance(setup.p0, UniformInit) and setup.state.buffer.images.var() > 0.3


def test_the_saturated_fraction_counts_pixels_at_the_bounds():
    args, setup = built()

    def draw(model, x_0, y=None, generator=None):
        x_0[:] = torch.tensor([1, -1, 1, 0.0]).repeat(4)[:, None]  # by rows of 16 x 16 pixels
        return x_0

    assert stepped(setup, args, draw)["saturated"] == 0.75


def test_a_rollbacks_factor_is_on_the_rate_that_is_taken():
    args, setup = built()
    setup.state.step, setup.state.lr_factor = 2, 0.5
    stepped(setup, args)
    assert setup.state.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_the_root_of_the_batch_scales_the_rate():
    args = cli.train_args(["--batch_size", "256", "--lr_scaling", "sqrt"])
    assert learning_rate(1000, 703, args) == pytest.approx(0.2)


def test_the_guard_names_the_step_of_a_window():
    rows = [{"loss": 1.0}, {"loss": float("nan")}, {"loss": 1.0}]
    state = SimpleNamespace(step=10, guard={})
    assert Guard(cli.train_args([]), 10).look(state, rows) == (9, "loss is nan")


def test_another_seed_is_another_order_at_once():
    data = [TrainData(digits(True, 16), SPECS["digits"], batch_size=20, sigma=0, seed=seed)
            for seed in ("1", "1.1")]
    before = data[0].indices("labelled", 3)
    data[0].reseed("1.1")
    assert not torch.equal(before, data[0].indices("labelled", 3))
    assert torch.equal(data[1].indices("labelled", 3), data[0].indices("labelled", 3))


def test_a_rollback_keeps_the_best_and_leaves_no_later_state(tmp_path, monkeypatch):
    scores = iter(6 * [0.3] + [0.9, 0.9] + 40 * [0.4])  # the best one is undone
    monkeypatch.setattr(train_jempp, "accuracy", lambda *_: next(scores))
    back, gone = train_jempp.roll_back, []

    def rolled(run_dir, setup, *rest):
        before = {p.name for p in tmp_path.glob("candidate.pt")}
        back(run_dir, setup, *rest)
        steps = {p.name: checkpoint.step_of(p) for p in tmp_path.glob("*.pt") if p.stem in (
            "last", "candidate", "good")}
        gone.append((before - steps.keys(), max(steps.values()) == setup.state.step > 0))

    inject(monkeypatch, 15)
    monkeypatch.setattr(train_jempp, "roll_back", rolled)
    assert train_jempp.main(tiny(tmp_path, "--n_epochs", "6", "--ckpt_steps", "1", "--good_after",
                                 "4")) == 0
    assert gone == [({"candidate.pt"}, True)]
    best = checkpoint.load(tmp_path / "best.pt")
    assert (best["epoch"], best["best"]) == (4, 0.9)


# -- evaluation -----------------------------------------------------------------------------------
def options(*words):
    own, typed = cli.evaluation_args(["--load_path", "x", "--eval", "fid", "--dataset", "digits",
                                      *words], evaluations.EVALUATIONS)
    return cli.evaluation_settings(None, typed, own)


def subject(*words):
    torch.manual_seed(0)
    settings = options(*words)
    opened = SimpleNamespace(model=JEM.build(depth=10, width=1), buffer=None, args=None, p0=None)
    made = Subject(opened=opened, label="m", **named_by(Subject, settings)
                   | {"device": torch.device("cpu")})
    made.model.trunk.head.weight.data.mul_(30)
    return made, settings


class Greys:
    """A p_0 whose images are their class."""

    def sample(self, n, y=None, *, host, generator):
        return (torch.zeros(n) if y is None else y.float() / 10)[:, None, None, None].expand(
            -1, 3, 16, 16).clone()


def test_conditional_chains_begin_and_descend_by_their_class(monkeypatch):
    s, seen = subject("--source", "scratch", "--conditional", "--chain_batch", "10")[0], []
    monkeypatch.setattr(subjects, "make_sampler", lambda *_: (
        lambda model, x, y=None, generator=None: seen.append(y) or x))
    s.__dict__["p0"] = Greys()
    start, _ = s.chains(10, torch.arange(10))
    assert (start[:, 0, 0, 0] * 10).round().tolist() == list(range(10))
    assert torch.equal(seen[0], torch.arange(10))
    jem = SimpleNamespace(p0=Greys(), replay_buffer=None, of_its_size=lambda x: x)
    x_0 = LoadedModel.beginnings(jem, 3, torch.tensor([4, 2, 9]), "p0", generator("cpu", 0))
    assert (x_0[:, 0, 0, 0] * 10).round().tolist() == [4, 2, 9]


def test_fresh_chains_know_no_labels_that_training_has_not():
    s = subject("--labels_per_class", "2")[0]
    train = s.splits["train"]
    first = to_pixels(train.x[(train.y == 4).nonzero().squeeze(1)[:2]]).mean(0)
    assert torch.allclose(s.p0.means()[4], first, atol=1e-5)


def test_logits_are_of_the_images_with_the_noise_that_is_recorded():
    s = subject()[0]
    x = pixels(s.images("test", 20).x, 0, 20, 0.3, s.seed)
    with torch.no_grad():
        assert torch.allclose(s.logits("test", 20, 0.3)[0].float(), s.model(x), atol=1e-4)


def test_the_most_confident_are_kept_and_scores_are_called_by_their_name():
    s, x = subject()[0], digits(False, 16).x[:60]
    with torch.no_grad():
        logits = s.model(to_pixels(x)).double()
    p, y = logits.softmax(1).max(1)
    kept, about = sample_evaluations.selected(s, x, {}, 0.5)
    expected = generation.select_per_class(p.numpy(), y.numpy(), 0.5)
    assert torch.equal(kept, x[expected]) and len(kept) < 40 and "0.5" in about["selection"]
    found = sample_evaluations.by_class(s, to_pixels(x))
    for value, want in zip(found, (y, p.log(), logits.logsumexp(1)), strict=True):
        assert torch.allclose(value.double(), want.double(), atol=1e-4)


def test_distances_are_between_the_images_and_the_reference(tmp_path, monkeypatch):
    s, x = subject("--data_root", str(tmp_path))[0], digits(False, 16).x[:80]
    judge = SimpleNamespace(model=s.model, sha256="0" * 64)
    real = torch.cat([digits(train, 16).x for train in (True, False)])
    (found,) = sample_evaluations.feature_distance(s, x, "train+test", {}, judge)
    a, b = (generation.penultimate_features(s.model, images) for images in (x, real))
    assert found.value == pytest.approx(generation.frechet_distance(
        generation.statistics(a), generation.statistics(b)), rel=1e-4) and found.value > 1e-5
    monkeypatch.setattr(generation, "inception_outputs", lambda network, images, size: (
        generation.penultimate_features(s.model, images), None))
    kid = sample_evaluations.inception_metrics(s, x, "train+test", {"reference": ""}, nn.Identity(),
                                               "1" * 64, 1, 5, 40)["KID"]
    kept = np.linspace(0, len(b) - 1, min(len(b), generation.KEPT_FEATURES)).astype(int)
    want = generation.kernel_inception_distance(a, b[kept].astype(np.float32), 5, 40, s.seed)
    assert next(kid).value == pytest.approx(want[0], rel=1e-5)


def test_every_number_of_a_detection_is_its_metrics(monkeypatch):
    scores = {name: np.arange(4.0) + k for k, name in enumerate(evaluations.SCORES)}
    outside = {name: np.array([0.5, 1.5, 9.0]) * (k + 1) for k, name in enumerate(scores)}
    monkeypatch.setattr(evaluations, "in_and_out_scores", lambda *_: (
        scores, {"u": outside}, {"u": {}}))
    monkeypatch.setattr(evaluations, "draw_histograms", lambda *_: dict.fromkeys(scores, "f"))
    found = list(evaluations.detect_ood(SimpleNamespace(dataset="d"), SimpleNamespace(
        npz=lambda *a, **k: "r"), ood=["u"], n_images=None, sigma=0))
    metrics = {"auroc": ood.auroc, "aupr": ood.aupr, "fpr95": ood.fpr_at_95_tpr}
    assert len(found) == 9
    for n in found:
        score = n.protocol["score"]
        assert n.value == metrics[n.metric](scores[score], outside[score])


def test_the_margin_attack_has_the_restarts_that_are_typed(monkeypatch):
    s, settings = subject("--attacks", "margin", "--attack_restarts", "3", "--eps_l2", "--eps_linf",
                          "8", "--n_attack", "4")
    seen = []
    monkeypatch.setattr(robustness, "margin_pgd_accuracy", lambda model, x, y, eps, norm, **words: (
        seen.append((eps, norm, words, len(x))) or robustness.Robustness(
            eps, torch.zeros(2), torch.zeros(2, 4).bool(), torch.zeros(4).bool())))
    list(evaluations.robust(s, SimpleNamespace(npz=lambda *a, **k: "r"),
                            **named_by(evaluations.robust, settings)))
    ((eps, norm, words, n),) = seen
    assert (eps, norm, n) == ([0.0, 8.0], "linf", 4)
    assert words == {"steps": 40, "restarts": 3, "batch_size": 500, "seed": 0}
