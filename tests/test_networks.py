"""Any network trains: one file and one line in the table, its words as flags, PYLD for any stem."""

import json

import pytest
import torch
from helpers import ANY_NETWORK, flat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import eval_jempp
import train_jempp
from models import JEM, NETWORKS, energy, network_name
from samplers import pyld, pyld_collapsed
from samplers.pyld import is_affine
from samplers.sgld import descend
from utils import cli
from utils.files import checkpoint
from utils.files.records import read_jsonl

CPU = ["--no-download", "--device", "cpu", "--num_threads", "1"]


class Toy(nn.Module):
    """What README shows: the whole of a new network."""

    def __init__(self, n_classes=10, width=4):
        super().__init__()
        self.config = {"n_classes": n_classes, "width": width}
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.trunk = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                                   nn.Flatten(), nn.Linear(4 * width, n_classes))


class DeepStem(Toy):
    def __init__(self, n_classes=10, width=4):
        super().__init__(n_classes, width)
        self.stem = nn.Sequential(self.stem, nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3))


@pytest.fixture
def table(monkeypatch):
    for name, network in (("toy", Toy), ("deep", DeepStem)):
        monkeypatch.setitem(NETWORKS, name, network)


def test_a_new_network_trains_resumes_and_is_evaluated(tmp_path, call, table):
    run = tmp_path / "run"
    words = [*ANY_NETWORK, "--network", "toy", "--width", "6", "--run_dir", run]
    for n_epochs in (1, 2):
        code, out, err = call(train_jempp.main, [*words, "--n_epochs", n_epochs])
        assert code == 0 and ("continuing" in out) == (n_epochs == 2), err
    code, _, err = call(train_jempp.main, [*ANY_NETWORK, "--network", "toy", "--run_dir", run])
    assert code == 2 and "--width 6 there, 4 here" in err
    content = checkpoint.load(run / "best.pt")
    assert content["config"] == {"network": "toy", "n_classes": 10, "width": 6}
    assert read_jsonl(run / "train.jsonl")[0]["network"] == "toy"
    code, _, err = call(eval_jempp.main, [
        "--load_path", run / "best.pt", "--eval", "accuracy", "--splits", "test",
        "--results", tmp_path / "out.jsonl", *CPU])
    assert code == 0, err
    (accuracy, *_) = read_jsonl(tmp_path / "out.jsonl")
    assert accuracy["training"]["network"] == "toy" and accuracy["training"]["width"] == 6


def test_dropout_and_layers_that_work_in_place(tmp_path, call, table, monkeypatch):
    """A run with dropout resumes bit for bit, and Algorithm 1 as written takes any trunk."""
    class Dropping(Toy):
        def __init__(self, n_classes=10, width=4):
            super().__init__(n_classes, width)
            self.trunk = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.3), *self.trunk)

    monkeypatch.setitem(NETWORKS, "toy", Dropping)
    words = [*ANY_NETWORK, "--network", "toy", "--n_epochs", "2", "--literal_pyld"]
    assert call(train_jempp.main, [*words, "--run_dir", tmp_path / "a"])[0] == 0
    for more in (["--max_steps", "2"], []):
        torch.manual_seed(len(more))
        assert call(train_jempp.main, [*words, "--run_dir", tmp_path / "b", *more])[0] == 0
    a, b = (dict(flat(checkpoint.load(tmp_path / name / "last.pt"))) for name in "ab")
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("words, told", [
    (["--network", "toy", "--depth", "10"], "--network toy has no --depth: drop it"),
    (["--network", "resnet18", "--norm", "none"], "--network resnet18 has no --norm: drop it"),
    (["--network", "resnet18", "--no-stride_first"], "has no --stride_first"),
    (["--depth", "27"], "depth is 6n + 4"),
    (["--network", "deep"], "--literal_pyld"),
    (["--network", "vgg"], "invalid choice"),
])
def test_words_that_a_network_has_no_use_for(call, table, words, told):
    code, _, err = call(train_jempp.main, [*words, "--dry_run"])
    assert code == 2 and told in err.splitlines()[-1], err


@pytest.mark.parametrize("words", [
    ["--network", "deep", "--literal_pyld"], ["--network", "deep", "--p_x_weight", "0"],
    ["--network", "deep", "--in_steps", "0", "--sgld_lr", "1"], ["--network", "resnet18"]])
def test_what_asks_for_no_short_cut_takes_any_stem(call, table, words):
    code, out, err = call(train_jempp.main, [*words, "--dry_run"])
    assert code == 0 and json.loads(out)["depth"] is None, err


def test_a_default_network_is_what_it_was():
    args = cli.train_args([])
    assert (args.network, args.depth, args.width, args.norm, args.bn_momentum,
            args.stride_first, args.stem_stride) == ("wrn", 28, 10, "batch", 0.9, False, 1)
    assert network_name(vars(args)) == "WRN-28-10" == network_name({"depth": 28, "width": 10})
    old = {"depth": 10, "width": 1, "n_classes": 10, "norm": "batch", "bn_momentum": 0.9}
    torch.manual_seed(0)
    before = JEM.build(**old)  # the configuration in a file of before there was a choice
    assert before.config == {"network": "wrn", **old, "stride_first": False,
                             "stem_stride": 1}
    assert JEM.build(**before.config).config == before.config


def products(**words):
    with torch.device("meta"):
        model, x = JEM.build(**words).eval(), torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("depth, width, saved", [(16, 4, 0.224), (10, 4, 0.405), (28, 10, 0.119)])
def test_the_stride_in_the_first_convolution_saves_products(depth, width, saved):
    size = {"depth": depth, "width": width}
    first = products(**size, stride_first=True)
    assert 1 - first / products(**size) == pytest.approx(saved, abs=1e-3)


def test_the_stride_moves_and_no_name_or_shape_changes():
    models = [JEM.build(depth=16, width=2, stride_first=first) for first in (False, True)]
    a, b = ({k: v.shape for k, v in m.state_dict().items()} for m in models)
    assert a == b
    block = models[1].trunk.layer2[0]
    assert block.conv1.stride == block.shortcut.stride == (2, 2) and block.conv2.stride == (1, 1)
    assert models[1](torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert network_name(models[1].config) == "WRN-16-2, stride first"


def test_a_stem_of_stride_2_costs_a_quarter_and_reaches_each_pixel_equally():
    words = {"depth": 16, "width": 2, "stride_first": True}
    strided = JEM.build(**words, stem_stride=2)
    assert products(**words, stem_stride=2) == pytest.approx(products(**words) / 4, rel=0.01)
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    strided.stem.weight.data.fill_(1)
    strided.stem(x).sum().backward()
    assert x.grad[..., 1:-1, 1:-1].unique().numel() == 1
    assert network_name(strided.config) == "WRN-16-2, stride first, stem stride 2"
    with pytest.raises(ValueError, match="stem_stride is 1 or 2"):
        JEM.build(stem_stride=3)


def test_resnet18_is_torchvisions_for_small_images():
    model = JEM.build("resnet18", n_classes=10).eval()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert products(network="resnet18") == pytest.approx(0.556e9, rel=0.01)  # as in the literature
    with torch.no_grad():
        x = torch.zeros(2, 3, 32, 32)
        assert model.trunk[:-1](model.stem(x)).shape == (2, 512)
        assert model(x).shape == (2, 10)


@pytest.mark.parametrize("stem, affine", [
    (nn.Conv2d(3, 4, 3), True), (nn.Linear(3, 4), True), (nn.ReLU(), False),
    (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), True),
    (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4))), False),
])
def test_which_stems_are_affine(stem, affine):
    assert is_affine(stem) == affine


def by_hand(model, x, n_outer, n_inner, step, clip):
    """Algorithm 1 by the chain rule: p = dE/df_0, then p . df_0/dx at each inner step."""
    for _ in range(n_outer):
        features = model.stem(x).detach().requires_grad_()
        (p,) = torch.autograd.grad(energy(model.trunk(features)).sum(), features)
        for _ in range(n_inner):
            _, gradient = torch.autograd.functional.vjp(model.stem, x, p)
            x = (x - step * gradient.clamp(-clip, clip)).clamp(-1, 1)
    return x


def test_algorithm_1_is_exact_for_a_stem_of_two_layers(table):
    torch.manual_seed(0)
    model = JEM.build("deep").double().eval()
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64) * 2 - 1
    model.trunk[-1].weight.data.mul_(30)
    exact = by_hand(model, x, 2, 5, 0.2, 1.0)
    literal = pyld(model, x, n_outer=2, n_inner=5, step_size=0.2, clip=1.0)
    assert torch.allclose(literal, exact, atol=1e-12)
    short_cut = descend(model.energy_gradient, x, n_steps=2, repeats=5, step_size=0.2, clip=1.0)
    assert (short_cut - exact).abs().max() > 1e-3
    with pytest.raises(ValueError, match="--literal_pyld"):
        pyld_collapsed(model, x, n_outer=2, n_inner=5, step_size=0.2, clip=1.0)
