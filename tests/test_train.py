"""train_jempp.py from end to end on digits: files, resuming, stopping, diverging, bad input."""

import json
import os
import signal

import pytest
import torch
from helpers import ROOT, TINY, loss_of, same_state, tiny

import train_jempp
from utils import cli
from utils.files.records import read_jsonl
from utils.training.build import build
from utils.training.schedule import learning_rate


def test_a_run_writes_what_the_contract_says(tmp_path, call):
    run = tmp_path / "run"
    code, out, err = call(train_jempp.main, tiny(run, "--n_epochs", "2"))
    assert code == 0 and not err, err
    log = read_jsonl(run / "train.jsonl")
    assert [r["kind"] for r in log] == ["header"] + ["step", "step", "step", "eval"] * 2 + ["end"]
    assert {"e_pos", "e_neg", "gap", "accuracy", "images_per_s", "loss", "lr"} <= log[1].keys()
    assert log[1]["gap"] == pytest.approx(log[1]["e_pos"] - log[1]["e_neg"])
    assert log[-1]["reason"] == "finished" and log[-1]["exit_code"] == 0
    assert json.loads((run / "args.json").read_text())["n_steps"] == 2
    assert (run / "samples" / "epoch_0002.png").read_bytes()[:4] == b"\x89PNG"
    assert list(run.glob("events.out.tfevents.*")) and not list(run.glob("*.partial"))
    best = torch.load(run / "best.pt", weights_only=True)
    evaluations = [r for r in log if r["kind"] == "eval"]
    assert best["best"] == max(r["valid_accuracy"] for r in evaluations)
    before = (run / "last.pt").read_bytes()
    code, out, err = call(train_jempp.main, tiny(run, "--n_epochs", "2"))  # nothing left to do
    assert code == 0 and (run / "last.pt").read_bytes() == before


ADAM_JEM = ["--optimizer", "adam", "--init", "uniform", "--norm", "none", "--in_steps", "0",
            "--sgld_lr", "1", "--sgld_std", "0.01", "--eps", "inf", "--sample_mode", "eval"]
CONDITIONAL = ["--p_x_y_weight", "1", "--class_cond_p_x_sample", "--shared_batch"]


@pytest.mark.parametrize("flags", ([], ADAM_JEM, CONDITIONAL), ids=("jempp", "jem", "conditional"))
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, call, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--n_epochs", "4", *flags, "--n_train", "90", "--seed", "3"]  # 5 steps an epoch
    assert call(train_jempp.main, tiny(whole, *flags, "--max_steps", "8"))[0] == 0
    assert call(train_jempp.main, tiny(parts, *flags, "--max_steps", "6"))[0] == 0
    torch.rand(7)  # whatever the process drew in between
    assert call(train_jempp.main, tiny(parts, *flags, "--max_steps", "8"))[0] == 0
    assert same_state(whole / "last.pt", parts / "last.pt")
    steps = [[{k: v for k, v in r.items() if k not in ("images_per_s", "time")}
              for r in read_jsonl(d / "train.jsonl") if r["kind"] in ("step", "eval")]
             for d in (whole, parts)]
    assert steps[0] == steps[1]


def test_a_crash_between_checkpoints_costs_only_the_steps_since(tmp_path, call, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--n_epochs", "2", "--ckpt_steps", "2", "--n_train", "90"]
    assert call(train_jempp.main, tiny(whole, *flags))[0] == 0
    step, n = train_jempp.train_step, []

    def crash(*args):
        n.append(0)
        if len(n) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_jempp, "train_step", crash)
    with pytest.raises(KeyboardInterrupt):
        train_jempp.main([str(w) for w in tiny(parts, *flags)])
    monkeypatch.undo()
    with open(parts / "train.jsonl", "a") as file:
        file.write('{"kind": "st')  # and a torn last line
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 2
    assert call(train_jempp.main, tiny(parts, *flags))[0] == 0
    assert same_state(whole / "last.pt", parts / "last.pt")
    steps = [r["step"] for r in read_jsonl(parts / "train.jsonl") if r["kind"] == "step"]
    assert steps == list(range(1, 11))


@pytest.mark.parametrize("how", (signal.SIGTERM, signal.SIGINT, "--max_minutes"))
def test_stopping_early_saves_and_exits_75_and_the_same_command_goes_on(
        tmp_path, call, monkeypatch, how):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(train_jempp.main, tiny(whole, "--n_epochs", "2"))[0] == 0
    step = train_jempp.train_step
    if how == "--max_minutes":
        argv = tiny(parts, "--n_epochs", "2", "--max_minutes", "1e-9")
    else:
        argv = tiny(parts, "--n_epochs", "2")

        def signalled(*args):
            os.kill(os.getpid(), how)
            return step(*args)

        monkeypatch.setattr(train_jempp, "train_step", signalled)
    code, out, err = call(train_jempp.main, argv)
    monkeypatch.undo()
    assert code == 75 and "stopped" not in err
    assert read_jsonl(parts / "train.jsonl")[-1]["exit_code"] == 75
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 1
    assert call(train_jempp.main, tiny(parts, "--n_epochs", "2"))[0] == 0
    assert same_state(whole / "last.pt", parts / "last.pt")


def test_divergence_ends_with_code_3_and_keeps_the_last_good_checkpoint(tmp_path, call):
    flags = ["--n_epochs", "3", "--lr", "1e12", "--warmup_iters", "0", "--decay_epochs",
             "--decay_rate", "1e-30"]
    argv = tiny(tmp_path, *flags, "--max_steps", "1")
    assert call(train_jempp.main, [*argv, "--optimizer", "adam"])[0] == 0
    good = (tmp_path / "last.pt").read_bytes()
    flags += ["--on_divergence", "stop"]
    code, out, err = call(train_jempp.main, [*tiny(tmp_path, *flags), "--optimizer", "adam"])
    assert code == 3 and "diverged" in out
    end = read_jsonl(tmp_path / "train.jsonl")[-1]
    assert end["reason"] == "diverged" and end["exit_code"] == 3 and end["detail"]
    assert (tmp_path / "last.pt").read_bytes() == good
    assert torch.load(tmp_path / "diverged.pt", weights_only=True)["step"] > 1


@pytest.mark.parametrize("poison", ("weight", "buffer"))
def test_nan_is_seen_before_it_is_saved(tmp_path, call, monkeypatch, poison):
    step = train_jempp.train_step

    def poisoned(args, setup, draw):
        metrics, state = step(args, setup, draw), setup.state
        if state.step == 2:  # ckpt_steps: 2 is saved right after
            target = state.model.stem.weight if poison == "weight" else state.buffer.images
            target.data[0, 0, 0, 0] = float("nan")
        return metrics

    monkeypatch.setattr(train_jempp, "train_step", poisoned)
    code, out, err = call(train_jempp.main, tiny(tmp_path, "--ckpt_steps", "2", "--n_epochs", "1",
                                                 "--on_divergence", "stop"))
    assert code == 3 and not (tmp_path / "last.pt").exists() and (tmp_path / "diverged.pt").exists()


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "imagenet"], "choose from cifar10"),
    (["--dataset", "cifar10", "--data_root", "ABSENT", "--no-download"], "no data folder"),
    (["--depth", "27"], "6n + 4"),
    (["--batch_size", "5000"], "larger than"),
    (["--reinit_freq", "-0.1"], "reinit_freq"),
    (["--reinit_freq", "nan"], "reinit_freq"),
    (["--in_steps", "0"], "--sgld_lr"),
    (["--sgld_lr", "1"], "--pyld_lr"),
    (["--p_x_weight", "0", "--p_y_given_x_weight", "0"], "nothing to train"),
    (["--class_cond_p_x_sample", "--buffer_size", "9"], "at least 10"),
    (["--device", "tpu7"], "--device"),
    (["--n_valid", "1437"], "leaves no training image"),
    (["--lr", "0"], "--lr"),
    (["--n_step", "3"], "unrecognized"),
    (["--run_dir", str(ROOT / "README.md")], "is a file"),
])
def test_bad_input_is_one_line_and_code_2(tmp_path, call, flags, words):
    flags = [word.replace("ABSENT", str(tmp_path / "absent")) for word in flags]
    code, out, err = call(train_jempp.main, tiny(tmp_path / "run", *flags))
    last = err.strip().splitlines()[-1]
    assert code == 2 and words in last and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_configuration_is_refused_with_the_difference(tmp_path, call):
    assert call(train_jempp.main, tiny(tmp_path, "--max_steps", "1"))[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for flags in (["--eps", "0.5", "--seed", "9"],):
        code, out, err = call(train_jempp.main, tiny(tmp_path, *flags))
        assert code == 2 and "--eps 1.0 there, 0.5 here; --seed 1 there, 9 here" in err
    (tmp_path / "args.json").unlink()  # the checkpoint knows, too
    code, out, err = call(train_jempp.main, tiny(tmp_path, "--eps", "0.5"))
    assert code == 2 and "--eps 1.0 there, 0.5 here" in err
    assert all(p.read_bytes() == v for p, v in before.items() if p.name != "args.json")


@pytest.mark.parametrize("damage", ("truncate", "garbage", "empty", "foreign", "other_data"))
def test_a_corrupt_last_pt_is_one_line_and_left_alone(tmp_path, call, damage):
    assert call(train_jempp.main, tiny(tmp_path, "--max_steps", "1"))[0] == 0
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    if damage == "truncate":
        last.write_bytes(whole[:len(whole) // 2])
    elif damage == "garbage":
        last.write_bytes(b"garbage" * 100)
    elif damage == "empty":
        last.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, last)
    else:
        content = torch.load(last, weights_only=True)
        content["p0"]["train_sha256"] = "0" * 64
        torch.save(content, last)
    damaged = last.read_bytes()
    code, out, err = call(train_jempp.main, tiny(tmp_path))
    assert code == 2 and "last.pt" in err and len(err.strip().splitlines()) == 1
    assert last.read_bytes() == damaged


def test_defaults_are_the_papers_main_run(call):
    code, out, err = call(train_jempp.main, ["--dry_run"])
    options = json.loads(out)
    expected = {"dataset": "cifar10", "depth": 28, "width": 10, "norm": "batch", "n_steps": 10,
                "in_steps": 5, "pyld_lr": 0.2, "eps": 1.0, "buffer_size": 10000, "sigma": 0.03,
                "reinit_freq": 0.05, "optimizer": "sgd", "lr": 0.1, "weight_decay": 4e-4,
                "warmup_iters": 1000, "decay_epochs": [50, 100, 125], "decay_rate": 0.2,
                "n_epochs": 150, "batch_size": 64, "n_valid": 5000, "bn_momentum": 0.9,
                "init": "informative", "sgld_std": 0.0}
    assert code == 0 and {k: options[k] for k in expected} == expected


def test_the_learning_rate_warms_up_and_decays_at_its_epochs():
    args = cli.train_args([])
    rate = [learning_rate(step, 703, args)
            for step in (0, 500, 1000, 50 * 703 - 1, 50 * 703, 100 * 703, 149 * 703)]
    assert rate == pytest.approx([0, 0.05, 0.1, 0.1, 0.02, 0.004, 0.0008])
    args = cli.train_args(["--schedule", "linear", "--n_epochs", "10"])
    rate = [learning_rate(step, 703, args) for step in (500, 1000, 4015, 7030, 9999)]
    assert rate == pytest.approx([0.05, 0.1, 0.05, 0, 0])
    args = cli.train_args(["--schedule", "cosine", "--n_epochs", "10", "--batch_size",
                                   "256", "--lr_scaling", "linear"])
    rate = [learning_rate(step, 703, args) for step in (1000, 4015, 7030)]
    assert rate == pytest.approx([0.4, 0.2, 0])


def test_p_x_weight_0_is_a_plain_classifier(tmp_path, call):
    assert call(train_jempp.main, tiny(tmp_path, "--p_x_weight", "0", "--n_epochs", "1"))[0] == 0
    log = read_jsonl(tmp_path / "train.jsonl")
    assert "e_pos" not in log[1] and log[1]["loss"] == pytest.approx(log[1]["ce"])
    assert torch.load(tmp_path / "last.pt", weights_only=True)["buffer"] is None


@pytest.mark.parametrize("flags", ([], ["--class_cond_p_x_sample"]))
def test_log_p_x_takes_the_energy_of_x_alone(monkeypatch, flags):
    model, (x_pos, (x_lab, y_lab)), x_neg, metrics = loss_of(monkeypatch, *flags)
    e_pos, e_neg = model.energy(x_pos).mean().item(), model.energy(x_neg).mean().item()
    ce = -model.log_p_y_given_x(x_lab)[torch.arange(16), y_lab].mean().item()
    assert metrics["e_pos"] == pytest.approx(e_pos, rel=1e-5)
    assert metrics["e_neg"] == pytest.approx(e_neg, rel=1e-5)
    assert metrics["loss"] == pytest.approx(e_pos - e_neg + ce, rel=1e-4)


def test_the_loss_weighs_the_three_log_likelihoods(monkeypatch):
    model, (_, (x_lab, y_lab)), x_neg, metrics = loss_of(
        monkeypatch, "--p_x_weight", "0.5", "--p_y_given_x_weight", "2", "--p_x_y_weight", "3")
    joint = (model.energy(x_lab, y_lab) - model.energy(x_neg, y_lab)).mean().item()
    expected = 0.5 * (metrics["e_pos"] - metrics["e_neg"]) + 2 * metrics["ce"] + 3 * joint
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


def sampled(flags, draw=None, y=None):
    """One sample_negatives call on a fresh tiny state: (state, state dict before, x_neg)."""
    args = cli.train_args([*TINY, *flags])
    state, _, p0, _, _ = build(args, torch.device("cpu"))
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    streams = train_jempp.seed_step(1, 0, 0, "cpu")
    x_neg = train_jempp.sample_negatives(state.model, draw or train_jempp.make_sampler(args),
                                         state.buffer, p0, 16, args, streams, y)
    return state, before, x_neg


@pytest.mark.parametrize("mode", ("train", "eval"))
def test_sample_mode_decides_whether_chains_touch_the_running_statistics(mode):
    state, before, _ = sampled(["--sample_mode", mode])
    after = state.model.state_dict()
    same = all(torch.equal(v, before[k]) for k, v in after.items() if "running" in k)
    assert same == (mode == "eval") and state.model.training


def test_chains_per_class_get_their_labels_and_slots_and_are_stored():
    seen = {}

    def draw(model, x_0, y, generator):
        seen["y"] = y
        return torch.zeros_like(x_0) + y[:, None, None, None]

    y = torch.arange(16) % 10
    state, _, _ = sampled(["--class_cond_p_x_sample"], draw, y)
    assert torch.equal(seen["y"], y)
    owner, value = torch.arange(40) * 10 // 40, state.buffer.images.mean((1, 2, 3))
    stored = value == owner  # chain of class y put back as the constant y, into y's own block
    assert stored.sum() >= 10 and set(owner[stored].tolist()) == set(range(10))


def test_best_pt_is_chosen_by_validation_not_the_latest(tmp_path, call, monkeypatch):
    scores = iter([0.5, 0.1, 0.9, 0.2, 0.7, 0.99])  # validation, test, in turn
    monkeypatch.setattr(train_jempp, "accuracy", lambda model, images: next(scores))
    assert call(train_jempp.main, tiny(tmp_path, "--n_epochs", "3"))[0] == 0
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["epoch"] == 2 and best["best"] == 0.9


@pytest.mark.parametrize("name, expected", [
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 4e-4}),
    ("adam", {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 4e-4})])
def test_optimisers_are_the_released_ones(name, expected):
    args = cli.train_args([*TINY, "--optimizer", name])
    optimizer = build(args, torch.device("cpu"))[0].optimizer
    assert {k: optimizer.defaults[k] for k in expected} == expected


def test_a_checkpoint_is_kept_every_so_many_epochs(tmp_path, call):
    assert call(train_jempp.main, tiny(tmp_path, "--n_epochs", "4", "--keep_every", "2"))[0] == 0
    kept = sorted(p.name for p in tmp_path.glob("epoch_*.pt"))
    assert kept == ["epoch_0002.pt", "epoch_0004.pt"]
    assert torch.load(tmp_path / kept[0], weights_only=True)["step"] == 6


def test_a_closed_pipe_does_not_end_a_run(tmp_path):
    import subprocess
    import sys

    argv = [str(w) for w in tiny(tmp_path, "--n_epochs", "3")]
    process = subprocess.Popen([sys.executable, "train_jempp.py", *argv], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(120) == 0
    assert read_jsonl(tmp_path / "train.jsonl")[-1]["reason"] == "finished"
