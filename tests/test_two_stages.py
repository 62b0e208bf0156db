"""How old chains are, a log p(x) that begins later, and what running statistics follow."""

import copy
import os
import re
import shutil

import pytest
import torch
from helpers import RELEASED, TINY, inject, same_state, tiny

import train_jempp
from models import JEM, statistics_kept
from samplers import ReplayBuffer
from utils import cli, machine
from utils.files import checkpoint
from utils.files.records import read_jsonl
from utils.training.build import Setup, build
from utils.training.guard import fetch
from utils.training.run_log import means_of
from utils.training.schedule import about_chains, p_x_weight
from utils.training.start import load_start


def built(*flags):
    """(args, state, data, p0) of a fresh tiny run."""
    args = cli.train_args([*TINY, *map(str, flags)])
    return args, *build(args, torch.device("cpu"))[:3]


def steps_of(run):
    return [r for r in read_jsonl(run / "train.jsonl") if r["kind"] == "step"]


class Zeros:
    """A p_0 of black images: with ``one_brighter`` a chain's grey is its age."""

    def sample(self, n, y=None, *, host, generator):
        return torch.zeros(n, 3, 16, 16)


def one_brighter(model, x_0, y=None, generator=None):
    return x_0 + 2  # as many as the sampler steps of TINY


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """A run of no flag of this file, stopped after five of its six steps."""
    run = tmp_path_factory.mktemp("default")
    assert train_jempp.main(tiny(run, "--n_epochs", "2", "--max_steps", "5")) == 0
    return run


@pytest.fixture
def copied(default, tmp_path):
    """The same in a folder of its own: (RUN, the words to go on with)."""
    shutil.copytree(default, tmp_path / "run")
    return tmp_path / "run", tiny(tmp_path / "run", "--n_epochs", "2")


def test_default_runs_are_what_they_were(default, tmp_path):
    """The losses are those of the version before these flags."""
    words = tiny(tmp_path, *RELEASED, "--n_valid", "1389", "--n_epochs", "2", "--max_steps", "5")
    assert train_jempp.main(words) == 0
    assert [r["loss"] for r in steps_of(tmp_path)] == pytest.approx(
        [2.33477, 2.37038, 2.31026, 2.17851, 2.21997], rel=1e-3)
    keys = {"loss", "e_pos", "e_neg", "gap", "ce", "accuracy", "saturated", "grad_norm", "lr"}
    assert all(keys <= r.keys() for r in steps_of(default))


# -- the age of the chains ------------------------------------------------------------------------
@pytest.mark.parametrize("flags", ([], ["--accumulate", "2", "--batch_size", "8"],
                                   ["--class_cond_p_x_sample", "--p_x_y_weight", "1"]))
def test_an_age_is_the_sampler_steps_since_p0(flags):
    args, state, data, _ = built(*flags)
    state.buffer.images.zero_()
    seen = set()
    for _ in range(6):
        train_jempp.train_step(args, Setup(state, data, Zeros()), one_brighter)
        assert torch.equal(state.buffer.images[:, 0, 0, 0].long(), state.buffer.ages)
        seen |= set(state.buffer.ages.tolist())
    assert {0, 2, 4, 6} <= seen and state.buffer.ages.dtype == torch.int64


def test_ages_take_no_random_number():
    buffer = ReplayBuffer(torch.rand(30, 3, 16, 16), 10)
    host, again = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x_0, slots, ages = buffer.draw(8, Zeros(), 0.5, host=host, generator=None)
    assert torch.equal(slots, torch.randint(30, (8,), generator=again))
    new = torch.rand(8, generator=again) < 0.5
    assert torch.equal(x_0[:, 0, 0, 0] == 0, new) and not ages.any()
    assert torch.equal(host.get_state(), again.get_state())


def test_the_mean_age_is_logged_and_saved(default):
    last, best = checkpoint.load(default / "last.pt"), checkpoint.open_any(default / "best.pt")
    assert last["ages"].shape == (40,) and last["ages"].any()
    assert steps_of(default)[-1]["chain_age"] == last["ages"].double().mean()
    assert steps_of(default)[best.step - 1]["chain_age"] == best.ages.double().mean()


def without_ages(path, **changes):
    """Make the checkpoint one of before chains had ages, or with other ones."""
    content = torch.load(path, weights_only=True)
    del content["ages"]
    content |= changes
    content["sha256"] = checkpoint.digest(content)
    torch.save(content, path)


def test_a_run_of_before_chains_had_ages_goes_on(copied, call):
    run, words = copied
    without_ages(run / "last.pt")
    code, out, err = call(train_jempp.main, words)
    assert code == 0, err
    assert "last.pt was saved before chains had ages: they are counted from here on" in out
    ages = checkpoint.load(run / "last.pt")["ages"]
    assert set(ages.tolist()) == {0, 2}  # one step of the run
    assert (ages > 0).sum() <= 16


@pytest.mark.parametrize("ages", (torch.zeros(39, dtype=torch.int64), torch.zeros(40), [0] * 40, 7))
def test_ages_that_are_none_are_one_line(copied, call, ages):
    run, words = copied
    without_ages(run / "last.pt", ages=ages)
    code, _, err = call(train_jempp.main, words)
    assert code == 2 and "ages of the wrong type or size" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("flags", ([], ["--load_buffer"]))
def test_ages_come_along_with_the_buffer_of_another_run(default, tmp_path, flags):
    args, state, _, _ = built("--load_path", default / "last.pt", "--run_dir", tmp_path, *flags)
    load_start(args, state)
    start, file = (checkpoint.load(run / name) for run, name in ((tmp_path, "start.pt"),
                                                                 (default, "last.pt")))
    assert torch.equal(start["ages"], file["ages"] if flags else torch.zeros_like(file["ages"]))


@pytest.mark.parametrize("flags, steps_per_epoch, said", (
    # scripts/quickstart.sh; the paper's run, 4.5 times an epoch; one with two stages
    (["--dataset", "digits", "--buffer_size", "1000", "--n_epochs", "30"], 20, "visited 38.4 time"),
    ([], 703, "visited 675 times"),
    (["--p_x_from", "5", "--n_epochs", "10", "--batch_size", "32", "--p_x_ramp", "700"], 350,
     "log p(x) begins after step 1750, with its whole weight 700 steps later; a slot of the replay "
     "buffer will be visited 5.6 times in this run, fewer than 20"),
    (["--p_x_y_weight", "1", "--labelled_batch", "128", "--n_epochs", "1"], 100, "visited 1.92"),
    (["--p_x_from", "16", "--n_epochs", "40", "--batch_size", "32", "--buffer_size", "2000"], 351,
     "visited 135 times in this run. Log p(x) begins on a trained network, so the first chains "
     "have to age fast: a --buffer_size of 640 or less helps"),
    (["--p_x_weight", "0"], 703, None)))
def test_one_line_says_how_often_a_slot_is_visited(flags, steps_per_epoch, said):
    line = about_chains(steps_per_epoch, cli.train_args(flags))
    if said is None:
        assert line is None
        return
    assert said in line and "\n" not in line
    visits = float(re.search(r"visited (\S+) times", line)[1])
    assert ("A smaller --buffer_size" in line) == (visits < 20)
    assert ("a --buffer_size of" in line) == ("a --buffer_size of" in said)


@pytest.mark.parametrize("size, load_buffer, told", ((500, False, False), (700, False, True),
                                                     (700, True, False)))
def test_weights_to_start_from_want_a_small_buffer(size, load_buffer, told):
    args = cli.train_args(["--n_epochs", "24", "--batch_size", "32", "--buffer_size", str(size)])
    args.load_path, args.load_buffer = "classifier.pt", load_buffer
    assert ("640 or less" in about_chains(351, args)) == told


def test_it_is_said_at_the_start_and_the_size_that_it_names_is_small_enough(copied, call):
    code, out, _ = call(train_jempp.main, [*copied[1], "--max_steps", "5"])
    assert code == 0 and out.count("visited 2.4 times in this run, fewer than 20") == 1
    assert "--buffer_size, 4 or less" in out and 16 * 6 / 4 >= 20  # draws, slots


# -- two stages -----------------------------------------------------------------------------------
def test_the_weight_of_log_p_x_begins_and_rises():
    args = cli.train_args([*TINY, "--p_x_from", "2", "--p_x_ramp", "4", "--p_x_weight", "0.6"])
    weights = [p_x_weight(step, 3, args) for step in range(12)]
    assert weights == pytest.approx([0] * 6 + [0.15, 0.3, 0.45] + [0.6] * 3)
    args = cli.train_args([*TINY, "--p_x_weight", "0.3"])
    assert [p_x_weight(step, 3, args) for step in (0, 1, 10**6)] == [0.3] * 3


def test_before_log_p_x_begins_a_run_is_a_softmax_networks(tmp_path, call):
    two, softmax = tmp_path / "two", tmp_path / "softmax"
    words = ["--n_epochs", "2", "--p_x_from", "1", "--p_x_ramp", "4"]
    code, out, err = call(train_jempp.main, tiny(two, *words, "--max_steps", "3"))
    assert code == 0 and "log p(x) begins after step 3, with its whole weight 4 steps later" in out
    call(train_jempp.main, tiny(softmax, "--n_epochs", "1", "--p_x_weight", "0"))
    a, b = (checkpoint.load(run / "last.pt") for run in (two, softmax))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert not a["ages"].any()  # no chain has run: the buffer is as p_0 filled it
    fresh = built(*words)[1].buffer.images
    assert torch.equal(a["buffer"], fresh)
    # and then: resumed across the beginning as if it had not stopped
    code, _, err = call(train_jempp.main, tiny(two, *words))
    assert code == 0, err
    assert call(train_jempp.main, tiny(tmp_path / "whole", *words))[0] == 0
    assert same_state(two / "last.pt", tmp_path / "whole" / "last.pt")
    log = steps_of(two)
    keys = {"e_pos", "e_neg", "gap", "saturated", "chain_age"}
    assert [bool(keys & r.keys()) for r in log] == [False] * 3 + [True] * 3
    assert all(keys <= r.keys() for r in log[3:])
    for k, row in enumerate(log[3:], 1):
        assert row["loss"] == pytest.approx(row["ce"] + k / 4 * row["gap"], rel=1e-5)
    assert call(train_jempp.main, tiny(two, "--n_epochs", "2"))[0] == 2


def test_a_rollback_knows_when_log_p_x_begins(tmp_path, call):
    code, out, _ = call(train_jempp.main, tiny(
        tmp_path, "--n_epochs", "2", "--p_x_from", "1", "--max_gap", "1e-12", "--max_rollbacks",
        "1", "--good_after", "0"))
    assert code == 3 and "step 4: the energy gap is" in out and "back to step 3" in out
    last = checkpoint.load(tmp_path / "last.pt")
    assert last["step"] == 3 and not last["ages"].any()


def test_the_best_network_is_chosen_among_those_that_know_log_p_x(tmp_path, call, monkeypatch):
    falling = iter([0.9, 0.9, 0.3, 0.3, 0.2, 0.2])  # valid and test after each epoch
    monkeypatch.setattr(train_jempp, "accuracy", lambda *_: next(falling))
    code, _, err = call(train_jempp.main, tiny(tmp_path, "--n_epochs", "3", "--p_x_from", "1",
                                               "--eval_every", "1"))
    assert code == 0, err
    best = checkpoint.load(tmp_path / "best.pt")
    assert (best["epoch"], best["best"]) == (2, 0.3)


def test_means_are_over_the_steps_that_have_the_term():
    rows = [{"loss": 1.0, "ce": 2.0}, {"loss": 3.0, "e_pos": 5.0, "ce": 4.0}, {"loss": 8.0}]
    assert means_of(rows) == {"loss": 4.0, "ce": 3.0, "e_pos": 5.0}
    window = [{k: torch.tensor(v) for k, v in row.items()} for row in rows]
    assert fetch(window) == rows


def test_a_rollback_to_the_classifier_keeps_the_best_jem(tmp_path, monkeypatch):
    scores = iter(2 * [0.9] + 2 * [0.5] + 2 * [0.9] + 4 * [0.3])  # twice each: valid and test
    monkeypatch.setattr(train_jempp, "accuracy", lambda *_: next(scores))
    inject(monkeypatch, 8)
    assert train_jempp.main(tiny(tmp_path, "--n_epochs", "3", "--p_x_from", "1", "--good_after",
                                 "100")) == 0
    best = checkpoint.load(tmp_path / "best.pt")
    assert (best["epoch"], best["best"]) == (2, 0.5) and not list(scores)


@pytest.mark.parametrize("flags, told", (
    (["--p_x_from", "150"], "with --n_epochs 150 log p(x) would never begin"),
    (["--p_x_from", "1", "--p_x_weight", "0"], "they go with a --p_x_weight"),
    (["--p_x_ramp", "9", "--p_x_y_weight", "1"], "without --p_x_y_weight"),
    (["--p_x_from", "1", "--p_y_given_x_weight", "0"], "nothing is trained before"),
    (["--p_x_from", "-1"], "--p_x_from"), (["--bn_update", "none"], "--bn_update")))
def test_what_does_not_go_together_is_one_line(call, flags, told):
    code, _, err = call(train_jempp.main, [*TINY, *flags])
    assert code == 2 and told in err.splitlines()[-1]


# -- running statistics ---------------------------------------------------------------------------
def stepped(*flags):
    """(model before, model after, batch) of one step with chains that leave where they began."""
    args, state, data, p0 = built("--shared_batch", *flags)
    before = copy.deepcopy(state.model)
    train_jempp.train_step(args, Setup(state, data, p0), train_jempp.make_sampler(args))
    return before, state.model, data.batch(0)


def test_real_statistics_follow_the_two_passes_of_real_images():
    before, after, (x_pos, (x_lab, _)) = stepped("--bn_update", "real", "--bn_momentum", "0.4")
    norm, first = before.trunk.layer1[0].norm1, after.trunk.layer1[0].norm1
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    for x in (x_pos, x_lab):  # running = 0.6 old + 0.4 batch, by hand
        channels = before.stem(x).detach().transpose(0, 1).flatten(1)
        mean, var = 0.6 * mean + 0.4 * channels.mean(1), 0.6 * var + 0.4 * channels.var(1)
    assert torch.allclose(first.running_mean, mean, atol=1e-6)
    assert torch.allclose(first.running_var, var, atol=1e-6) and first.num_batches_tracked == 2
    for x in (x_pos, x_lab):  # and of every layer, to the bit
        before(x)
    for a, b in zip(before.buffers(), after.buffers(), strict=True):
        assert torch.equal(a, b)


def test_what_is_learnt_is_the_same_and_only_the_statistics_differ():
    (_, real, _), (_, every, _) = stepped("--bn_update", "real"), stepped()
    for a, b in zip(real.parameters(), every.parameters(), strict=True):
        assert torch.equal(a, b)
    a, b = (model.trunk.norm for model in (real, every))
    assert not torch.allclose(a.running_mean, b.running_mean)
    assert a.num_batches_tracked == 2
    assert b.num_batches_tracked == 5  # and two passes of the chain, and that of its end


def test_chains_in_eval_mode_use_the_running_statistics_they_leave_alone():
    (_, real, _), (_, every, _) = (stepped("--sample_mode", "eval", *flags)
                                   for flags in (["--bn_update", "real"], []))
    for a, b in zip(real.parameters(), every.parameters(), strict=True):
        assert torch.equal(a, b)
    assert real.trunk.norm.num_batches_tracked == 2


def test_a_compiled_network_has_two_programs_and_no_more():
    model, graphs = JEM.build(depth=10, width=1), []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend, fullgraph=True, dynamic=False)
    plain, x = copy.deepcopy(model), torch.rand(4, 3, 16, 16)
    for _ in range(3):
        model(x), plain.forward(x)
        with statistics_kept(model):
            model(x)
    assert len(graphs) == 2
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-6)


def test_layers_without_running_statistics_stay_so():
    model = JEM.build(depth=10, width=1, norm="instance")
    with statistics_kept(model):
        model(torch.rand(2, 3, 16, 16))
    assert not model.trunk.norm.track_running_stats


# -- several runs on one machine ------------------------------------------------------------------
@pytest.mark.parametrize("load, threads, typed, device, busy", (
    (1.1, 2, 0, "cpu", True), (1.0, 2, 0, "cpu", False), (1.1, 2, 2, "cpu", False),
    (1.1, 1, 0, "cpu", False), (1.1, 2, 0, "cuda", False)))
def test_a_busy_machine_is_said_once(monkeypatch, load, threads, typed, device, busy):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    line = machine.about_threads(torch.device(device), typed)
    assert (line is not None) == busy
    assert not busy or line == ("the machine is busy (load 1.1 on 2 cores): --num_threads 1 for "
                                "each of several runs is faster")
