"""--labels_per_class, --energy_l2 and --sam_adaptive: what the released codes have besides."""

import copy
import json

import pytest
import torch
from helpers import TINY, loss_of, tiny

import train_jempp
from models import JEM
from samplers import make_sampler
from scripts.tables.protocol import ROWS
from utils import cli
from utils.data import SPECS, Images, TrainData, load_splits
from utils.training.build import build


def few(n, seed=1, **settings):
    """TrainData of 60 images in 3 classes, the i-th all of value i: 12 a batch for p(x)."""
    y = torch.arange(60) % 3
    x = torch.arange(60).to(torch.uint8).view(60, 1, 1, 1).expand(60, 3, 8, 8).contiguous()
    spec = SPECS["digits"]._replace(names=("a", "b", "c"), pad=0)
    words = {"batch_size": 12, "sigma": 0.0, "clean_p_x": True} | settings
    return TrainData(Images(x, y), spec, seed=seed, labels_per_class=n, **words)


def counted(data, kind, steps, parts=1):
    drawn = [data.indices(kind, step, part) for step in range(steps) for part in range(parts)]
    return torch.cat(drawn).bincount(minlength=60)


@pytest.mark.parametrize("size, parts", [(4, 1), (20, 1), (60, 1), (20, 2)])
def test_every_labelled_image_is_used_equally_often_also_by_a_larger_batch(size, parts):
    data = few(3, labelled_batch=size, parts=parts, batch_size=12 // parts)
    n_steps = 9  # 9 labelled images: 9 steps are ``size`` whole passes
    counts = counted(data, "labelled", n_steps, parts)
    assert counts[:9].tolist() == [size] * 9, "the first three of each class"
    assert not counts[9:].any(), "no other image is ever labelled"
    for step in range(1, n_steps):  # at no time does one lag behind by more than one use
        so_far = counted(few(3, labelled_batch=size, parts=parts, batch_size=12 // parts),
                         "labelled", step, parts)[:9]
        assert so_far.max() - so_far.min() <= 1


def test_log_p_x_has_all_images_and_an_epoch_is_as_long_as_without():
    data, whole = few(1, labelled_batch=12), few(0, labelled_batch=12)
    assert data.steps_per_epoch == whole.steps_per_epoch == 5
    assert counted(data, "unlabelled", 5).tolist() == [1] * 60
    assert torch.equal(data.indices("unlabelled", 3), whole.indices("unlabelled", 3))
    _, (x, y) = data.batch(2)
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().tolist() == y.tolist(), "images 0, 1, 2"


def test_the_labelled_images_do_not_depend_on_the_runs_seed():
    one, other = few(2, labelled_batch=6), few(2, seed=7, labelled_batch=6)
    assert set(one.indices("labelled", 0).tolist()) == set(other.indices("labelled", 0).tolist())
    assert not torch.equal(one.indices("labelled", 0), other.indices("labelled", 0))


def test_alternating_flips_alternate_from_pass_to_pass():
    data = few(1, labelled_batch=6, alternating_flip=True)
    data.spec = data.spec._replace(flip=True)
    turns, _ = data.places("labelled", 0)
    flips = data.mirrored(data.indices("labelled", 0), turns, None)
    assert turns.tolist() == [0, 0, 0, 1, 1, 1]
    both = zip(data.indices("labelled", 0).tolist(), flips.tolist(), strict=True)
    assert len(set(both)) == 6, "each image once as it is, once mirrored"


def test_more_labels_than_a_class_has_are_refused_in_one_line(call, tmp_path):
    code, _, err = call(train_jempp.main, tiny(tmp_path, "--labels_per_class", "50"))
    assert code == 2 and err.count("\n") == 1
    assert "--labels_per_class 50: class" in err and "training images" in err
    assert not tmp_path.joinpath("last.pt").exists()


def test_a_run_with_few_labels_resumes_records_it_and_keeps_validation_labels(call, tmp_path):
    words = tiny(tmp_path, "--labels_per_class", "2", "--n_epochs", "2")
    assert call(train_jempp.main, [*words, "--max_steps", "1"])[0] == 0
    assert call(train_jempp.main, words)[0] == 0
    log = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert log[0]["n_labelled"] == 20 and log[0]["n_train"] == 48 and log[0]["n_valid"] == 40
    assert log[0]["args"]["labels_per_class"] == 2
    changed = tiny(tmp_path, "--labels_per_class", "3", "--n_epochs", "2")
    code, _, err = call(train_jempp.main, changed)
    assert code == 2 and "--labels_per_class 2 there, 3 here" in err


def test_class_gaussians_know_no_other_labels():
    """Where chains start may not tell of labels that training is not to have."""
    args = cli.train_args([*TINY, "--labels_per_class", "2"])
    setup = build(args, torch.device("cpu"))
    train = load_splits("digits", "data", n_valid=40, n_train=48)[0]
    first = train.x[(train.y == 4).nonzero().squeeze(1)[:2]]
    mean = (first.float() / 127.5 - 1).mean(0)
    assert torch.allclose(setup.p0.means()[4], mean, atol=1e-5)


@pytest.mark.parametrize("words, complaint", [
    (["--labels_per_class", "2", "--shared_batch"], "drop it, or --labels_per_class"),
    (["--energy_l2", "0.1", "--p_x_weight", "0"], "which --p_x_weight 0 leaves out"),
    (["--sam_adaptive"], "--sam_adaptive needs a radius")])
def test_what_does_not_go_together_is_one_line(call, words, complaint):
    code, _, err = call(train_jempp.main, [*TINY, *words])
    assert code == 2 and complaint in err and err.count("\n") == 1


# -- --energy_l2 ----------------------------------------------------------------------------------
def test_the_energy_penalty_has_the_gradient_of_its_formula(monkeypatch):
    build_jem = JEM.build

    def sharp(*words, **more):  # energies of new weights hardly differ
        model = build_jem(*words, **more)
        model.trunk.head.weight.data *= 30
        return model

    monkeypatch.setattr(JEM, "build", sharp)
    model, (x_pos, _), x_neg, metrics = loss_of(
        monkeypatch, "--p_y_given_x_weight", "0", "--p_x_weight", "0.5", "--energy_l2", "0.3")
    e_pos, e_neg = model.energy(x_pos), model.energy(x_neg)
    assert e_pos.std() > 0.1, "the mean of squares is not the square of the mean"
    penalty = 0.3 * (e_pos ** 2).mean(), 0.3 * (e_neg ** 2).mean()
    loss = 0.5 * (e_pos.mean() - e_neg.mean()) + sum(penalty)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for p, expected in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, expected, atol=1e-3, rtol=1e-3)
    assert metrics["l2_pos"] == pytest.approx(penalty[0].item(), rel=1e-5)
    assert metrics["l2_neg"] == pytest.approx(penalty[1].item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert metrics["e_pos"] == pytest.approx(e_pos.mean().item(), rel=1e-5)


def test_the_energy_penalty_is_logged_only_where_it_is_on(monkeypatch):
    metrics = loss_of(monkeypatch)[3]
    assert "l2_pos" not in metrics and "e_pos" in metrics


# -- --sam_adaptive -------------------------------------------------------------------------------
def test_an_adaptive_step_goes_up_by_the_weights_own_size():
    """The gradients are those at w + rho w^2 g / |w g|, by hand."""
    args = cli.train_args([*TINY, "--norm", "none", "--p_x_weight", "0", "--sam", "2",
                           "--sam_adaptive"])
    setup = build(args, torch.device("cpu"))
    state = setup.state
    state.step, plain = 2, copy.deepcopy(state.model)
    _, (x, y) = setup.data.batch(2)

    def gradients(model):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        return torch.autograd.grad(loss, list(model.parameters()))

    first = gradients(plain)
    length = torch.cat([(p * g).flatten() for p, g in zip(plain.parameters(), first,
                                                          strict=True)]).norm()
    with torch.no_grad():
        for p, g in zip(plain.parameters(), first, strict=True):
            p += 2 * p ** 2 * g / length
    train_jempp.train_step(args, setup, make_sampler(args))
    for p, expected in zip(state.model.parameters(), gradients(plain), strict=True):
        assert torch.allclose(p.grad, expected, atol=1e-5, rtol=1e-3)


# -- SADA-JEM -------------------------------------------------------------------------------------
def test_sada_jem_is_the_released_command():
    args = vars(cli.train_args(ROWS["SADA-JEM (K=5)"].split()))
    defaults = vars(cli.train_args([]))
    assert {k: v for k, v in args.items() if v != defaults[k]} == {
        "n_valid": 0, "sigma": 0, "clean_p_x": True, "sam": 2, "sam_adaptive": True,
        "labelled_batch": 128, "in_steps": 0, "sgld_lr": 1, "n_steps": 5, "weight_decay": 5e-4,
        "n_epochs": 200, "decay_epochs": [60, 120, 180]}


def test_its_five_steps_of_one_are_pyld_5_5_at_a_fifth():
    torch.manual_seed(0)
    model = JEM.build(depth=10, width=1).double().eval()
    x_0 = torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    ends = [make_sampler(cli.train_args([*words, "--n_steps", "5"]))(model, x_0.clone())
            for words in (["--in_steps", "0", "--sgld_lr", "1"],
                          ["--in_steps", "5", "--pyld_lr", "0.2"])]
    assert torch.allclose(*ends, atol=1e-9) and not torch.equal(ends[0], x_0)
