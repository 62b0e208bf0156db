"""Flags beyond the paper's main run: each against a known answer, and resumed bit for bit."""

import contextlib
import copy
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, flat, loss_of, same_state, tiny
from torch import nn

import train_jempp
from models import JEM, frozen
from samplers import make_sampler, to_pixels
from utils import cli
from utils.data import SPECS, TrainData, digits
from utils.evaluation.inference import accuracy
from utils.files import checkpoint
from utils.files.records import read_jsonl
from utils.training.build import Setup, build


def built(*flags):
    """(args, state, data, p0) of a fresh tiny run."""
    args = cli.train_args([*TINY, *flags])
    return args, *build(args, torch.device("cpu"))[:3]


class Recorder:
    """A draw that moves nothing and keeps what it was given: chains of known ends."""

    def __init__(self):
        self.x_neg, self.seeds = [], []

    def __call__(self, model, x_0, y=None, generator=None):
        self.x_neg.append(x_0.clone())
        self.seeds.append(generator.initial_seed())
        return x_0


def hand_loss(model, x_pos, x_neg, x_lab, y):
    """Eq. 5 with weights 1 and 1, each pass with batch statistics of its own."""
    real, sampled = model.energy(x_pos).mean(), model.energy(x_neg).mean()
    return real - sampled + F.cross_entropy(model(x_lab), y)


def hand_gradients(model, *batch):
    return torch.autograd.grad(hand_loss(model, *batch), list(model.parameters()))


def in_float64(state, data):
    """Train in float64 from here on, so that only what is really different differs."""
    state.model.double()
    state.buffer.images = state.buffer.images.double()
    batch = data.batch

    def doubled(*at):
        x_pos, (x_lab, y_lab) = batch(*at)
        return x_pos.double(), (x_lab.double(), y_lab)

    data.batch = doubled


def close(ours, expected):
    return all(torch.allclose(a, b, rtol=1e-8, atol=1e-12)
               for a, b in zip(ours, expected, strict=True))


def flattened(tensors):
    return torch.cat([t.flatten() for t in tensors])


def tensors_of(path):
    return dict(flat(torch.load(path, weights_only=True)))


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# -- resuming -------------------------------------------------------------------------------------
EVERYTHING = ["--batch_size", "4", "--accumulate", "2", "--labelled_batch", "16", "--sam", "0.05",
              "--ema", "0.9", "--schedule", "linear", "--nesterov", "--clean_p_x", "--step_decay",
              "0.8", "--label_smoothing", "0.1", "--recalibrate_bn", "64", "--n_train", "90",
              "--n_epochs", "4"]


def test_with_every_option_on_a_resumed_run_equals_an_uninterrupted_one(tmp_path, call):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, stops in ((whole, "6"), (parts, "36")):
        for stop in stops:
            assert call(train_jempp.main, tiny(run, *EVERYTHING, "--max_steps", stop))[0] == 0
            torch.rand(7)  # whatever the process draws in between
    assert same_state(whole / "last.pt", parts / "last.pt")
    last, best = tensors_of(whole / "last.pt"), tensors_of(whole / "best.pt")
    assert last["/average/n_averaged"] == 6
    assert same_tensors(best, tensors_of(parts / "best.pt"))
    logs = [read_jsonl(run / "train.jsonl") for run in (whole, parts)]
    assert logs[0][0]["steps_per_epoch"] == 90 // 16  # --labelled_batch is of all parts together
    steps = [[{k: v for k, v in r.items() if k not in ("images_per_s", "time")} for r in log
              if r["kind"] in ("step", "eval")] for log in logs]
    assert steps[0] == steps[1]


EXTENDED = [  # flags of a run of five steps (two epochs), those it goes on with, the refusal
    (["--n_epochs", "2"], ["--n_epochs", "3"], None),
    (["--n_epochs", "2", "--decay_epochs", "9"], ["--n_epochs", "4", "--decay_epochs", "2"], None),
    (["--n_epochs", "2", "--decay_epochs", "9"], ["--n_epochs", "4", "--decay_epochs", "1"],
     "has taken step 4 at the rate 0.1; with these --n_epochs and --decay_epochs that would have "
     "been 0.02"),
    (["--schedule", "linear", "--n_epochs", "2"], ["--schedule", "linear", "--n_epochs", "3"],
     "has taken step 4 at the rate 0.075"),
    (["--schedule", "cosine", "--n_epochs", "2"], ["--schedule", "cosine", "--n_epochs", "3"],
     "has taken step 4 at the rate")]


@pytest.mark.parametrize("first, then, refusal", EXTENDED)
def test_a_run_may_be_extended_as_long_as_the_rates_of_its_steps_stay(tmp_path, call, first, then,
                                                                      refusal):
    assert call(train_jempp.main, tiny(tmp_path, "--max_steps", "5", *first))[0] == 0
    code, _, err = call(train_jempp.main, tiny(tmp_path, "--max_steps", "5", *then))
    assert code == (2 if refusal else 0), err
    assert (refusal or "") in err


def test_a_run_of_an_older_argument_list_goes_on_and_a_flag_that_is_gone_is_named(tmp_path, call):
    """A flag that a saved run does not know counts as its default."""
    assert call(train_jempp.main, tiny(tmp_path, "--max_steps", "1"))[0] == 0
    path = tmp_path / "last.pt"
    content = torch.load(path, weights_only=True)

    def rewrite(change):
        for name in ("nesterov", "ema", "step_decay"):
            content["args"].pop(name, None)
        content["args"] |= change
        content["sha256"] = checkpoint.digest(content)
        torch.save(content, path)
        (tmp_path / "args.json").write_text(json.dumps(content["args"]))

    rewrite({})
    code, _, err = call(train_jempp.main, tiny(tmp_path, "--max_steps", "2", "--nesterov"))
    assert code == 2 and "--nesterov False there, True here" in err
    assert call(train_jempp.main, tiny(tmp_path, "--max_steps", "2"))[0] == 0
    content = torch.load(path, weights_only=True)
    assert content["step"] == 2 and content["args"]["ema"] == 0
    rewrite({"gone_with_the_wind": 3})
    code, _, err = call(train_jempp.main, tiny(tmp_path, "--max_steps", "3"))
    assert code == 2 and "--gone_with_the_wind, which this version does not have" in err


@pytest.mark.parametrize("flags, refused", (
    (["--batch_size", "8", "--accumulate", "2"], None),
    (["--batch_size", "8"], "--global_batch_size 16 there, 8 here"),
    (["--accumulate", "2"], "--global_batch_size 16 there, 32 here")))
def test_a_step_may_be_divided_otherwise_but_keeps_its_images(tmp_path, call, flags, refused):
    assert call(train_jempp.main, tiny(tmp_path, "--max_steps", "1"))[0] == 0
    code, _, err = call(train_jempp.main, tiny(tmp_path, "--max_steps", "2", *flags))
    assert code == (2 if refused else 0) and (refused or "") in err
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert step == (1 if refused else 2)


# -- batches --------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream, size, epoch", (("labelled", 8, 5), ("unlabelled", 5, 9)))
def test_parts_of_a_step_share_no_image_and_an_epoch_repeats_none(stream, size, epoch):
    flags = ["--n_train", "137", "--labelled_batch", "24"]  # of 137 images
    _, _, data, _ = built(*flags, "--batch_size", "5", "--accumulate", "3")
    _, _, whole, _ = built(*flags, "--batch_size", "15")
    orders = []
    for first in (0, epoch):
        seen = []
        for step in range(first, first + epoch):
            parts = [data.indices(stream, step, part) for part in range(3)]
            assert [len(part) for part in parts] == [size] * 3
            assert torch.equal(torch.cat(parts), whole.indices(stream, step))
            seen += torch.cat(parts).tolist()
        assert len(set(seen)) == len(seen) == epoch * 3 * size
        orders.append(seen)
    assert orders[0] != orders[1]
    x_pos, (x_lab, y_lab) = data.batch(1, 2)
    assert len(x_pos) == 5 and len(x_lab) == 8 and y_lab.device.type == "cpu"
    assert torch.equal(y_lab, data.images.y[data.indices("labelled", 1, 2)])


FLIPPED = SPECS["digits"]._replace(flip=True, pad=0)  # no crop: an image is mirrored or not


@pytest.mark.parametrize("stream", ("labelled", "unlabelled"))
def test_alternating_flips_alternate_by_epoch(stream):
    images = digits(True, 16)
    images = images.take((images.x != images.x.flip(3)).flatten(1).any(1).nonzero().squeeze(1))

    def mirrored(alternating, epoch):
        data = TrainData(images, FLIPPED, batch_size=100, sigma=0, seed=0,
                         alternating_flip=alternating)
        found = torch.full((len(images.y),), -1)
        for step in range(epoch * 14, (epoch + 1) * 14):
            indices = data.indices(stream, step)
            x, plain = data.draw(stream, step)[0], to_pixels(images.x[indices])
            same, turned = ((x == y).flatten(1).all(1) for y in (plain, plain.flip(3)))
            assert (same ^ turned).all()
            found[indices] = turned.long()
        return found

    first, second, third = (mirrored(True, epoch) for epoch in range(3))
    both, again = (first >= 0) & (second >= 0), (first >= 0) & (third >= 0)
    assert both.sum() > 1300 and again.sum() > 1300
    assert torch.equal(second[both], 1 - first[both])
    assert torch.equal(third[again], first[again])
    assert 0.4 < first[first >= 0].float().mean() < 0.6
    first, second = (mirrored(False, epoch) for epoch in range(2))
    assert 0.4 < (first == second)[both].float().mean() < 0.6  # without the flag: at random


def test_clean_p_x_gives_the_images_as_they_are():
    def data(**changes):
        return TrainData(digits(True, 16), SPECS["digits"]._replace(flip=True), batch_size=20,
                         sigma=0.03, seed=0, **changes)

    clean, usual = data(clean_p_x=True), data()
    for step in (0, 71):
        (x_pos, (x_lab, _)), (x_usual, (lab_usual, _)) = clean.batch(step), usual.batch(step)
        plain = to_pixels(clean.images.x[clean.indices("unlabelled", step)])
        assert torch.equal(x_pos, plain) and not torch.equal(x_usual, plain)
        assert torch.equal(x_lab, lab_usual)


def test_parts_of_a_step_have_random_numbers_and_chains_of_their_own():
    args, state, data, p0 = built("--batch_size", "8", "--accumulate", "2", "--reinit_freq", "0")
    slots, draw = torch.arange(40.0), Recorder()
    state.buffer.images[:] = slots.view(-1, 1, 1, 1)
    for _ in range(2):
        train_jempp.train_step(args, Setup(state, data, p0), draw)
    assert len(set(draw.seeds)) == 4
    for i, x_0 in enumerate(draw.x_neg):
        assert (x_0[:, 0, 0, 0] % 2 == i % 2).all()  # every other slot is the second part's
    noisy = TrainData(digits(True, 16), SPECS["digits"]._replace(pad=0), batch_size=20, sigma=0.03,
                      seed=0, parts=2)
    noise = [noisy.draw("labelled", 0, part)[0] - to_pixels(
        noisy.images.x[noisy.indices("labelled", 0, part)]) for part in (0, 1)]
    assert abs(noise[0].std() - 0.03) < 1e-3 and not torch.allclose(*noise, atol=0.01)


# -- one step -------------------------------------------------------------------------------------
@pytest.mark.parametrize("parts", (1, 2))
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    args, state, data, p0 = built("--norm", "none", "--reinit_freq", "0", "--batch_size", "8",
                                  "--accumulate", str(parts))
    in_float64(state, data)
    draw, before = Recorder(), copy.deepcopy(state.model)
    metrics = train_jempp.train_step(args, Setup(state, data, p0), draw)
    batches = [data.batch(0, part) for part in range(parts)]
    x_pos = torch.cat([x for x, _ in batches])
    x_lab, y = (torch.cat([labelled[i] for _, labelled in batches]) for i in (0, 1))
    loss = hand_loss(before, x_pos, torch.cat(draw.x_neg), x_lab, y)
    assert len(draw.x_neg) == parts and len(x_pos) == len(x_lab) == 8 * parts
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-8)
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    assert close([p.grad for p in state.model.parameters()], gradients)
    norm = flattened(gradients).norm().item()
    assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-8)


@pytest.mark.parametrize("norm", ("none", "batch"))
def test_a_sharpness_aware_step_is_two_passes_on_the_same_samples(norm):
    args, state, data, p0 = built("--norm", norm, "--reinit_freq", "0", "--sam", "0.5")
    in_float64(state, data)
    state.step, draw = 2, Recorder()  # past the warm-up's zero rate
    hand = copy.deepcopy(state.model)
    train_jempp.train_step(args, Setup(state, data, p0), draw)
    (x_neg,), (x_pos, (x_lab, y)) = draw.x_neg, data.batch(2)
    first = hand_gradients(hand, x_pos, x_neg, x_lab, y)  # its passes count for the statistics
    moved, length = copy.deepcopy(hand), flattened(first).norm()
    with torch.no_grad():
        for p, g in zip(moved.parameters(), first, strict=True):
            p += 0.5 * g / length
    second = hand_gradients(moved, x_pos, x_neg, x_lab, y)  # these do not
    assert (flattened(second) - flattened(first)).norm() > 0.1 * length
    assert close([p.grad for p in state.model.parameters()], second)
    expected = [p - 0.1 * (g + 4e-4 * p) for p, g in zip(hand.parameters(), second, strict=True)]
    assert close(state.model.parameters(), expected)
    assert close(state.model.buffers(), hand.buffers())
    assert bool(list(hand.buffers())) == (norm == "batch")


def test_a_sharpness_aware_step_of_no_radius_is_a_plain_one():
    states = []
    for flags in ([], ["--sam", "1e-30"], ["--sam", "0.5"]):
        args, state, data, p0 = built(*flags)
        state.step = 2
        train_jempp.train_step(args, Setup(state, data, p0), make_sampler(args))
        states.append(state.model.state_dict())
    assert same_tensors(states[0], states[1]) and not same_tensors(states[0], states[2])


@pytest.mark.parametrize("flags", ([], ["--sam", "0.5"]))
def test_no_pass_starts_while_the_graph_of_another_lives(flags):
    args, state, data, p0 = built("--p_x_y_weight", "1", "--accumulate", "2", *flags)
    live, passes, chains = weakref.WeakSet(), [], []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            live.add(self)

    def draw(model, x_0, y=None, generator=None):
        chains.append(len(live))
        return x_0

    state.model.register_forward_pre_hook(lambda *_: passes.append(len(live)))
    state.model.register_forward_hook(lambda *_: chains.append(-len(live)))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        train_jempp.train_step(args, Setup(state, data, p0), draw)
    n = 2 * 4 * (2 if flags else 1)  # parts, terms, passes of --sam
    assert passes == [0] * n
    assert chains.count(0) == 4 and min(chains) < -10  # two chains a part; passes do keep tensors


@pytest.mark.parametrize("smoothing", (0.0, 0.1, 0.7))
def test_label_smoothing_follows_its_formula(monkeypatch, smoothing):
    model, (_, (x_lab, y_lab)), _, metrics = loss_of(monkeypatch, "--label_smoothing",
                                                     str(smoothing))
    log_p = model.log_p_y_given_x(x_lab)
    right = log_p[torch.arange(16), y_lab].mean().item()
    expected = -(1 - smoothing) * right - smoothing * log_p.mean().item()
    assert metrics["ce"] == pytest.approx(expected, rel=1e-5)
    gap = metrics["e_pos"] - metrics["e_neg"]
    assert metrics["loss"] == pytest.approx(gap + expected, rel=1e-4)


def linear_network():
    """E(x) = -<v, x>, through a stem that doubles: (JEM, v)."""
    stem, head = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(48, 1, bias=False)
    stem.weight.data = 2 * torch.eye(3).view(3, 3, 1, 1)
    head.weight.data = torch.linspace(-1, 1, 48)[None]
    model = JEM(SimpleNamespace(stem=stem, trunk=nn.Sequential(nn.Flatten(), head), config={}))
    return model, 2 * head.weight.data.view(1, 3, 4, 4)


@pytest.mark.parametrize("flags, inner", (([], 5), (["--literal_pyld"], 5),
                                          (["--in_steps", "0", "--sgld_lr", "0.2"], 1)))
@pytest.mark.parametrize("decay", (1.0, 0.5))
def test_steps_decay_geometrically(flags, inner, decay):
    args = cli.train_args([*TINY, "--n_steps", "3", "--no-pixel_clamp", "--step_decay",
                                   str(decay), *flags])
    model, v = linear_network()
    x_0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = make_sampler(args)(model, x_0)
    length = 0.2 * inner * (1 + decay + decay**2)
    assert torch.allclose(x, x_0 + length * v.clamp(-1, 1), atol=1e-5)


# -- what is evaluated ----------------------------------------------------------------------------
@pytest.fixture
def seen(monkeypatch):
    """The state dicts after each step of the runs that follow."""
    step, states = train_jempp.train_step, []

    def watched(args, setup, draw):
        metrics = step(args, setup, draw)
        states.append({k: v.clone() for k, v in setup.state.model.state_dict().items()})
        return metrics

    monkeypatch.setattr(train_jempp, "train_step", watched)
    return states


def model_in(path):
    return torch.load(path, weights_only=True)["model"]


def test_best_pt_holds_the_averaged_weights_and_last_pt_the_raw_ones(tmp_path, call, seen):
    assert call(train_jempp.main, tiny(tmp_path, "--ema", "0.6", "--n_epochs", "1"))[0] == 0
    assert len(seen) == 3
    average = {k: v.double() for k, v in seen[0].items()}
    for state in seen[1:]:
        average = {k: 0.6 * v + 0.4 * state[k].double() for k, v in average.items()}
    best, raw = model_in(tmp_path / "best.pt"), model_in(tmp_path / "last.pt")
    assert same_tensors(raw, seen[-1])
    floating = [k for k, v in raw.items() if v.is_floating_point()]
    for name in floating:
        assert torch.allclose(best[name].double(), average[name], rtol=1e-4, atol=1e-6), name
    assert not any(torch.equal(best[k], raw[k]) for k in floating)
    args = cli.train_args([str(w) for w in tiny(tmp_path)])
    valid = build(args, torch.device("cpu"))[3]
    opened = checkpoint.open_any(tmp_path / "best.pt")
    (record,) = [r for r in read_jsonl(tmp_path / "train.jsonl") if r["kind"] == "eval"]
    assert record["valid_accuracy"] == accuracy(opened.model, valid)


@pytest.mark.parametrize("flags", ([], ["--ema", "0.6"]))
def test_recalibrated_statistics_are_the_mean_over_the_first_images(tmp_path, call, seen, flags):
    assert call(train_jempp.main, tiny(tmp_path, *flags, "--recalibrate_bn", "40", "--n_epochs",
                                       "1"))[0] == 0
    best = checkpoint.open_any(tmp_path / "best.pt").model
    assert same_tensors(model_in(tmp_path / "last.pt"), seen[-1])
    _, _, data, _ = built()
    found = {}  # (mean, variance) of what each batch norm sees, batch by batch
    for name, module in best.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, x, key=name: found.setdefault(
                key, []).append((x[0].mean((0, 2, 3)), x[0].transpose(0, 1).flatten(1).var(1))))
    kept = {k: v.clone() for k, v in best.state_dict().items()}
    with torch.no_grad():
        for x in data.images.x[:40].split([14, 13, 13]):  # as equal as can be, of 16 at most
            best.train()(to_pixels(x))
    assert len(found) == 7 and all(len(v) == 3 for v in found.values())
    for name, statistics in found.items():
        mean, variance = (torch.stack(s).mean(0) for s in zip(*statistics, strict=True))
        assert torch.allclose(kept[f"{name}.running_mean"], mean, rtol=1e-4, atol=1e-5), name
        assert torch.allclose(kept[f"{name}.running_var"], variance, rtol=1e-4, atol=1e-5), name
        assert not torch.allclose(seen[-1][f"{name}.running_mean"], mean, rtol=1e-2), name


# -- precision ------------------------------------------------------------------------------------
def test_bf16_is_close_and_everything_kept_is_float32():
    args, state, data, p0 = built("--amp", "bf16")
    model, x = state.model, to_pixels(built()[2].images.x[:20])
    exact = copy.deepcopy(model)
    exact.bf16 = False
    logits, expected = model(x), exact(x)
    error = (logits - expected).abs().max() / expected.abs().max()
    assert 1e-5 < error < 0.05
    assert logits.dtype == model.energy(x).dtype == torch.float32
    train_jempp.train_step(args, Setup(state, data, p0), make_sampler(args))
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()),
               state.buffer.images]
    assert {t.dtype for t in tensors} == {torch.float32, torch.int64}  # int64: batches counted
    for name, statistic in model.named_buffers():
        if "running" in name:
            assert torch.isfinite(statistic).all() and statistic.abs().max() > 0


def test_a_run_in_bf16_is_close_to_one_in_float32(tmp_path, call):
    losses = []
    for amp in ("off", "bf16"):
        run = tmp_path / amp
        assert call(train_jempp.main, tiny(run, "--amp", amp, "--max_steps", "3"))[0] == 0
        losses.append([r["loss"] for r in read_jsonl(run / "train.jsonl") if r["kind"] == "step"])
    assert len(losses[0]) == 3 and losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


# -- flags ----------------------------------------------------------------------------------------
def test_batch_sizes_follow_from_one_another():
    def sizes(*words):
        args = cli.train_args([str(word) for word in words])
        return args.batch_size, args.global_batch_size, args.labelled_batch

    assert sizes() == (64, 64, 64)
    assert sizes("--accumulate", 4) == (64, 256, 256)
    assert sizes("--global_batch_size", 128, "--accumulate", 4) == (32, 128, 128)
    assert sizes("--batch_size", 8, "--labelled_batch", 96, "--accumulate", 3) == (8, 24, 96)


@pytest.mark.parametrize("typed", (False, True))
def test_flags_reach_what_they_name(typed):
    names = ["nesterov", "clean_p_x", "alternating_flip"]
    _, state, data, _ = built(*(f"--{name}" for name in names if typed))
    assert state.optimizer.defaults["nesterov"] == data.clean_p_x == data.alternating_flip == typed


@pytest.mark.parametrize("flags, words", [
    (["--global_batch_size", "33", "--accumulate", "2"], "does not divide into 2 parts"),
    (["--global_batch_size", "64", "--accumulate", "2"], "type one of them"),
    (["--labelled_batch", "33", "--accumulate", "2"], "does not divide into 2 parts"),
    (["--shared_batch", "--labelled_batch", "32"], "drop --labelled_batch"),
    (["--shared_batch", "--clean_p_x"], "--clean_p_x"),
    (["--nesterov", "--optimizer", "adam"], "--optimizer sgd"),
    (["--labelled_batch", "49"], "larger than"),
    (["--accumulate", "4"], "larger than"),  # 64 of 48 images
    (["--sync_bn"], "GPU"), (["--sync_bn", "--compile", "default"], "--compile off"),
    (["--literal_pyld", "--amp", "bf16"], "--literal_pyld"),
    (["--sam", "-0.1"], "--sam"), (["--ema", "1"], "--ema"),
    (["--step_decay", "nan"], "--step_decay"), (["--label_smoothing", "1.5"], "--label_smoothing"),
    (["--buffer_size", "1", "--accumulate", "2"], "--buffer_size"),
    (["--class_cond_p_x_sample", "--buffer_size", "19", "--accumulate", "2"], "--buffer_size"),
])
def test_bad_combinations_are_one_line_and_code_2(tmp_path, call, flags, words):
    code, _, err = call(train_jempp.main, tiny(tmp_path / "run", *flags))
    last = err.strip().splitlines()[-1]
    assert code == 2 and words in last and "Traceback" not in err
    assert [("error:" in line) for line in err.splitlines()].count(True) == 1
    assert not (tmp_path / "run").exists()


def test_gradients_stay_in_memory_of_our_own():
    """What a CUDA graph returns must not become .grad: its memory is written again."""
    args, state, data, p0 = built("--sam", "0.05")
    where = [p.grad.data_ptr() for p in state.model.parameters()]
    for _ in range(2):
        train_jempp.train_step(args, Setup(state, data, p0), make_sampler(args))
    assert where == [p.grad.data_ptr() for p in state.model.parameters()]


# -- frozen ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", (None, KeyboardInterrupt))
def test_frozen_parameters_are_constants_until_the_block_is_left(fault):
    model, x = JEM.build(depth=10, width=1), torch.zeros(2, 3, 8, 8, requires_grad=True)
    model.stem.bias.requires_grad_(False)  # stays what it was
    with contextlib.suppress(*([fault] if fault else [])), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        model.energy(x).sum().backward()
        if fault:
            raise fault
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.bias"]


def test_chains_run_on_frozen_parameters_also_where_they_fail():
    args, state, data, p0 = built()
    frozen_then = []

    def draw(model, x_0, y=None, generator=None):
        frozen_then.append([p.requires_grad for p in model.parameters()])
        raise RuntimeError("no chain")

    with pytest.raises(RuntimeError, match="no chain"):
        train_jempp.train_step(args, Setup(state, data, p0), draw)
    assert len(frozen_then) == 1 and not any(frozen_then[0])
    assert all(p.requires_grad for p in state.model.parameters())
