"""eval_jempp.py from end to end: records, raw scores, pictures, any checkpoint, bad input."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FIXTURE, TINY, Evil, legacy_copy, released_file
from PIL import Image

import eval_jempp
import train_jempp
from samplers import pyld_collapsed
from utils import cli
from utils.data import Images
from utils.evaluation import calibration, evaluations, ood, subject
from utils.files import checkpoint
from utils.files.records import read_jsonl

QUICK = ["--n_attack", "20", "--eps_linf", "8", "--eps_l2", "0.5", "--attack_steps", "3",
         "--attack_restarts", "2", "--chain_steps", "3", "--chain_batch", "12", "--ood", "interp",
         "uniform", "--is_splits", "2", "--kid_subset_size", "20", "--num_threads", "1", "--device",
         "cpu", "--no-download"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny joint model and a softmax model on digits."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("joint", []), ("softmax", ["--p_x_weight", "0"])):
        argv = [*TINY, "--run_dir", folder / name, "--n_epochs", "3", "--lr", "0.05", *flags]
        assert train_jempp.main([str(word) for word in argv]) == 0
    return folder


def numbers(path, metric, **protocol):
    """Values of a metric in a results file, of records whose protocol holds these entries."""
    return [r["value"] for r in read_jsonl(path)
            if r["metric"] == metric and protocol.items() <= r["protocol"].items()]


def raw_scores(folder, label, name):
    """The one file of raw scores of this label and evaluation."""
    (path,) = folder.glob(f"{label}-????????*_{name}.npz")
    return np.load(path)


def subject_of(run, *words):
    """The joint model as a command with these words evaluates it."""
    path = run / "joint" / "last.pt"
    protocol, overrides = cli.evaluation_args(["--load_path", str(path), *words],
                                              evaluations.EVALUATIONS)
    return eval_jempp.open_all(protocol, overrides, torch.device("cpu"))[0].subject


def test_everything_that_needs_no_download_in_one_command(run, tmp_path, call):
    out = tmp_path / "out.jsonl"
    code, text, err = call(eval_jempp.main, [
        "--load_path", run / "joint" / "last.pt", run / "softmax" / "last.pt", "--labels", "joint",
        "softmax", "--eval", *evaluations.EVALUATIONS, "--features",
        run / "softmax" / "last.pt", "--data_root", tmp_path, "--results", out, *QUICK])
    assert code == 0 and "Traceback" not in err, err
    # what cannot be had is said in one line each: Inception, and the softmax model's buffer
    lines = err.strip().splitlines()
    assert all(line.startswith("left out: ") for line in lines)
    assert sum("Inception weights" in line for line in lines) == 1
    records = read_jsonl(out)
    keys = {"metric", "value", "unit", "n", "protocol", "checkpoint", "overrides", "method",
            "dataset", "seed", "env", "seconds", "time"}
    assert all(keys <= r.keys() and np.isfinite(r["value"]) for r in records)
    assert {r["metric"] for r in records} == {
        "accuracy", "nll", "brier", "ece", "ece_adaptive", "auroc", "aupr", "fpr95",
        "fd_features", "robust_accuracy"}
    assert {r["method"] for r in records} == {"jempp M=2", "softmax"}
    assert records[0]["checkpoint"].keys() == {"path", "sha256", "step", "epoch"}
    assert set(records[0]["env"]) >= {"torch", "device", "cpu", "commit", "dirty"}
    pictures = {p.name for p in tmp_path.glob("*.png")}
    short = {r["label"]: r["checkpoint"]["sha256"][:8] for r in records}
    for r in records:  # each names what it was computed from
        assert r["files"] and all((tmp_path / name).is_file() for name in r["files"])
        start = f"{r['label']}-{short[r['label']]}(-[0-9a-f]{{6}})?_"
        assert all(re.match(start, name) for name in r["files"])
    pictures = {re.sub("-[0-9a-f]{6}_", "_", name) for name in pictures}
    named = {f"{label}-{short[label]}_{name}.png" for label, name in (
        ("joint", "reliability"), ("softmax", "reliability"), ("joint", "histogram_log_p_x"),
        ("joint", "buffer"), ("joint", "p0"), ("joint", "scratch_by_class"), ("joint", "chains"),
        ("joint", "best_p_x"), ("joint", "worst_p_y"))}
    assert named | {"robustness_linf.png", "robustness_l2.png"} <= pictures
    assert all(Image.open(path).size[0] > 200 for path in tmp_path.glob("*.png"))


def test_metrics_can_be_recomputed_from_the_raw_scores(run, tmp_path, call):
    out = tmp_path / "out.jsonl"
    assert call(eval_jempp.main, [
        "--load_path", run / "joint" / "last.pt", "--labels", "m", "--eval", "accuracy",
        "calibration", "ood", "--results", out, *QUICK])[0] == 0
    raw = raw_scores(tmp_path, "m", "accuracy_test")
    right = raw["logits"].argmax(1) == raw["y"]
    assert numbers(out, "accuracy", split="test") == [pytest.approx(right.mean())]
    assert numbers(out, "accuracy", split="test", correct=int(right.sum()))
    raw = raw_scores(tmp_path, "m", "calibration")
    assert numbers(out, "ece") == [pytest.approx(calibration.expected_calibration_error(
        raw["confidence"], raw["correct"]))]
    raw = raw_scores(tmp_path, "m", "ood")
    assert len(raw["in_grad_norm"]) == 360
    assert numbers(out, "auroc", out="uniform", score="grad_norm") == [pytest.approx(ood.auroc(
        raw["in_grad_norm"], raw["uniform_grad_norm"]))]


def test_batch_size_changes_no_metric(run, tmp_path, call):
    values = []
    for batch in ("7", "360"):
        out = tmp_path / f"{batch}.jsonl"
        assert call(eval_jempp.main, [
            "--load_path", run / "joint" / "last.pt", "--eval", "accuracy", "calibration", "ood",
            "fid", "--features", run / "softmax" / "last.pt", "--data_root", tmp_path / batch,
            "--sigma", "0.03", "--batch_size", batch, "--results", out, *QUICK])[0] == 0
        values.append([(r["metric"], r["protocol"].get("split"), r["value"])
                       for r in read_jsonl(out)])
    assert [v[:2] for v in values[0]] == [v[:2] for v in values[1]]
    for (metric, _, small), (_, _, large) in zip(*values, strict=True):
        assert small == pytest.approx(large, rel=1e-6), metric


def test_settings_come_from_the_checkpoint_and_overrides_are_recorded(run, tmp_path, call):
    out = tmp_path / "out.jsonl"
    argv = ["--load_path", run / "joint" / "last.pt", "--eval", "accuracy", "--results", out]
    assert call(eval_jempp.main, argv)[0] == 0
    assert call(eval_jempp.main, [*argv, "--image_size", "32", "--n_valid", "10"])[0] == 0
    records = read_jsonl(out)
    assert records[0]["overrides"] == {}
    assert records[-1]["overrides"] == {"image_size": 32, "n_valid": 10}
    assert [r["n"] for r in records if r["metric"] == "accuracy"] == [48, 40, 360, 48, 10, 360]


def test_no_two_curves_have_one_name():
    assert eval_jempp.unique(["a", "a", "a-2", "b"]) == ["a", "a-2", "a-2-2", "b"]


def test_another_data_set_has_settings_of_its_own(run):
    saved = checkpoint.load(run / "joint" / "last.pt")["args"] | {"labels_per_class": 3}
    names = ("image_size", "n_valid", "n_train", "labels_per_class", "pad", "flip")

    def settings(**typed):
        found = cli.evaluation_settings(saved, typed, argparse.Namespace())
        return [found[name] for name in names], len(found["class_names"]), found["batch_size"]

    assert settings() == settings(dataset="digits") == ([16, 40, 48, 3, 2, False], 10, 16)
    assert settings(dataset="cifar100") == ([32, 5000, None, 0, 4, True], 100, 16)


def test_samples_leave_the_network_alone_and_follow_the_seed(run, tmp_path, call):
    drawn = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        argv = ["--load_path", run / "joint" / "last.pt", "--labels", name, "--seed", seed,
                "--eval", "samples", "accuracy", "--results", tmp_path / f"{name}.jsonl"]
        assert call(eval_jempp.main, [*argv, *QUICK])[0] == 0
        drawn.append(raw_scores(tmp_path, name, "samples")["scratch"])
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    assert call(eval_jempp.main, ["--load_path", run / "joint" / "last.pt", "--eval", "accuracy",
                                  "--results", tmp_path / "alone.jsonl", *QUICK])[0] == 0
    assert numbers(tmp_path / "alone.jsonl", "nll") == numbers(tmp_path / "a.jsonl", "nll")


def test_an_out_set_that_is_not_there_is_said_and_the_others_go_on(run, tmp_path, call):
    out = tmp_path / "out.jsonl"
    argv = ["--load_path", run / "joint" / "last.pt", "--eval", "ood", "--results", out, *QUICK,
            "--data_root", tmp_path]
    code, text, err = call(eval_jempp.main, [*argv, "--ood", "svhn", "constant"])
    assert code == 0 and len(err.strip().splitlines()) == 1 and "left out: ood svhn" in err
    assert {r["protocol"]["out"] for r in read_jsonl(out)} == {"constant"}
    code, text, err = call(eval_jempp.main, [*argv, "--ood", "svhn"])
    assert code == 2 and "nothing could be measured" in err


# -- other people's files -------------------------------------------------------------------------
@pytest.mark.parametrize("name", ("official_wrn10_1_batch", "official_wrn10_1_none_legacy",
                                  "jem_wrn10_1_batch"))
def test_released_files_give_the_fixtures_numbers(tmp_path, call, monkeypatch, name):
    path = FIXTURE / f"{name.removesuffix('_legacy')}.pt"
    theirs = np.load(path.with_suffix(".npz"))
    if name.endswith("_legacy"):
        path = legacy_copy(path, tmp_path / "legacy.pt")
    logits = theirs["f64_logits_eval"]
    y = logits.argmax(1)
    y[:3] = (y[:3] + 1) % 10  # 5 of 8 right
    images = Images(torch.from_numpy(theirs["x"]), torch.from_numpy(y))
    monkeypatch.setattr(subject, "load_splits", lambda *a, **k: (images, images, images))
    monkeypatch.setattr("utils.evaluation.inference.to_pixels", lambda x: x)
    monkeypatch.setattr("utils.evaluation.ood.out_set", lambda *a, **k: ood.OutSet(images.x, {}))
    monkeypatch.setattr("utils.evaluation.ood.logits_and_gradient_norm",
                        lambda model, x, *how: (model(x).detach(), torch.zeros(len(x))))
    out = tmp_path / "out.jsonl"
    code, text, err = call(eval_jempp.main, [
        "--load_path", path, "--labels", "m", "--eval", "accuracy", "ood",
        "--dataset", "cifar10", "--splits", "test", "--results", out, *QUICK])
    assert code == 0, err
    assert "no arguments" in text
    assert numbers(out, "accuracy") == [5 / 8]
    assert np.abs(raw_scores(tmp_path, "m", "accuracy_test")["logits"] - logits).max() < 1e-4
    scores = raw_scores(tmp_path, "m", "ood")
    p = np.exp(logits - logits.max(1, keepdims=True))
    log_z = np.log(p.sum(1)) + logits.max(1)
    assert np.abs(scores["in_log_p_x"] - log_z).max() < 1e-4
    assert np.abs(scores["in_max_p_y"] - (p / p.sum(1, keepdims=True)).max(1)).max() < 1e-5


def test_a_released_file_without_data_set_or_buffer_is_asked_for_by_flag(tmp_path, call):
    content = released_file(tmp_path / "a.pt")
    torch.save(content["model_state_dict"], tmp_path / "bare.pt")
    argv = ["--load_path", tmp_path / "bare.pt", "--results", tmp_path / "o.jsonl", *QUICK]
    code, text, err = call(eval_jempp.main, [*argv, "--eval", "accuracy"])
    assert code == 2 and "--dataset" in err
    argv += ["--dataset", "digits", "--image_size", "32"]
    code, text, err = call(eval_jempp.main, [*argv, "--eval", "accuracy", "best_worst"])
    assert code == 0 and "holds no buffer" in text and "--source scratch" in err
    code, text, err = call(eval_jempp.main, [*argv, "--eval", "best_worst", "--source", "scratch",
                                             "--n_samples", "20"])
    assert code == 0, err


# -- bad input ------------------------------------------------------------------------------------
def broken(kind, run, folder):
    """A file of each bad kind."""
    path = folder / f"{kind}.pt"
    good = run / "joint" / "best.pt"
    if kind == "text":
        path.write_text("hello\n" * 50)
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:-5000])
    elif kind == "pickle":
        torch.save({"format": "jempp-1", "model": Evil()}, path)
    elif kind == "missing_key":
        content = torch.load(good, weights_only=True)
        content["model"].pop("trunk.head.bias")
        content["sha256"] = checkpoint.digest(content)
        torch.save(content, path)
    elif kind == "released_missing_key":
        released_file(path, **{"f.layer3.0.conv2.weight": None})
    elif kind == "nan":
        content = torch.load(good, weights_only=True)
        content["model"]["stem.bias"][0] = float("nan")
        content["sha256"] = checkpoint.digest(content)
        torch.save(content, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "other":
        torch.save([1, 2, 3], path)
    return path


@pytest.mark.parametrize("kind, words", [
    ("text", "no PyTorch checkpoint"), ("truncated", "cannot be read"), ("pickle", "refused"),
    ("missing_key", "do not fit"), ("released_missing_key", "Missing key"), ("nan", "not all fin"),
    ("folder", "is a folder"), ("other", "not a checkpoint"), ("absent", "no checkpoint")])
def test_a_bad_checkpoint_is_one_line_and_costs_no_record(
        run, tmp_path, call, monkeypatch, kind, words):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"metric": "earlier"}) + "\n")
    code, text, err = call(eval_jempp.main, ["--load_path", broken(kind, run, tmp_path), "--eval",
                                             "accuracy", "--results", out])
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert read_jsonl(out) == [{"metric": "earlier"}] and not Path("executed").exists()


@pytest.mark.parametrize("flags, words", [
    (["--eval", "accuracy", "robustness", "--sigma", "0.03"], "--sigma does not go with"),
    (["--eval", "robustness", "--eps_linf", "-1"], "eps_linf"),
    (["--eval", "ood", "--ood", "folder:EMPTY"], "holds no image"),
    (["--eval", "ood", "--ood", "folder:ABSENT"], "is no folder"),
    (["--eval", "ood", "--ood", "imagenet"], "unknown out-of-distribution set"),
    (["--eval", "accuracy", "--dataset", "cifar100"], "knows 10 classes"),
    (["--eval", "best_worst", "--n_samples", "41"], "buffer holds 40"),
    (["--eval", "everything"], "invalid choice"),
    (["--eval", "fid", "--features", "ABSENT", "--no-download"], "no checkpoint"),
    (["--eval", "accuracy", "--labels", "a", "b"], "2 --labels for 1"),
])
def test_bad_flags_are_one_line_and_cost_no_record(run, tmp_path, call, flags, words, monkeypatch):
    if "cifar100" in flags:
        zeros = Images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2).long())
        monkeypatch.setattr(subject, "load_splits", lambda *a, **k: (zeros, zeros, zeros))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        flags = [word.replace(name.upper(), str(tmp_path / name)) for word in flags]
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"metric": "earlier"}) + "\n")
    code, text, err = call(eval_jempp.main, ["--load_path", run / "joint" / "best.pt", "--results",
                                             out, *flags])
    assert code == 2 and words in err.strip().splitlines()[-1] and "Traceback" not in err
    assert read_jsonl(out) == [{"metric": "earlier"}]


def test_chains_are_drawn_in_the_training_mode_of_batch_norm(run):
    """Chains equal the sampler's own on a network in train mode, not those of eval mode."""
    start, end = subject_of(run, "--eval", "samples", *QUICK).chains(12)
    for training in (True, False):
        model = checkpoint.open_any(run / "joint" / "last.pt").model.train(training)
        direct = pyld_collapsed(model, start, n_outer=3, n_inner=5, step_size=0.2, clip=1.0)
        assert torch.equal(direct, end) == training


def test_a_chain_does_not_depend_on_how_many_are_drawn(run):
    judged = subject_of(run, "--eval", "samples", *QUICK)
    y = torch.arange(10).repeat(3)
    assert torch.equal(judged.chains(13)[-1], judged.chains(24)[-1][:13])
    assert torch.equal(judged.chains(10, y[:10])[-1], judged.chains(30, y)[-1][:10])
    few, more = (subject_of(run, "--eval", "fid", "--source", "scratch", "--conditional",
                            "--n_samples", n, *QUICK).generated()[0] for n in ("13", "24"))
    assert torch.equal(few, more[:13])


def test_no_file_is_overwritten_that_records_of_other_settings_name(run, tmp_path, call):
    out, words = tmp_path / "out.jsonl", ["--eval", "robustness", "ood", "--attacks", "pgd"]
    for more in (["--eps_linf", "8"], ["--eps_linf", "30"], ["--ood", "constant"]):
        code, _, err = call(eval_jempp.main, ["--load_path", run / "joint" / "best.pt", "--results",
                                              out, *words, *QUICK, *more])
        assert code == 0, err
    for r in read_jsonl(out):
        with np.load(tmp_path / r["files"][0]) as raw:
            if r["metric"] == "robust_accuracy" and r["protocol"]["norm"] == "linf":
                assert r["protocol"]["eps_255"] in raw["eps"].round(3).tolist()
            elif "out" in r["protocol"]:
                assert any(name.startswith(r["protocol"]["out"]) for name in raw.files)


def test_snapshots_of_a_chain_do_not_change_it(run):
    judged = subject_of(run, "--eval", "samples", *QUICK, "--step_decay", "0.5")
    whole, in_parts = judged.chains(12), judged.chains(12, snapshots=3)
    assert len(in_parts) == 4 and torch.equal(whole[-1], in_parts[-1])


def test_many_chain_steps_take_no_memory(run):
    subject_of(run, "--eval", "samples", *QUICK, "--chain_steps", str(2**63 - 1)).chain_runner(10)


def test_a_buffer_in_class_order_is_judged_in_random_order(run):
    judged = subject_of(run, "--eval", "fid", "--n_samples", "20", *QUICK)
    grey = torch.arange(40) / 127.5 - 1
    judged.opened.buffer[:] = grey[:, None, None, None]  # slot i is grey i
    x, _ = judged.generated()
    slots = x[:, 0, 0, 0].tolist()
    assert len(set(slots)) == 20 and slots != sorted(slots) and max(slots) > 25


def test_checkpoints_and_out_sets_of_one_name_are_told_apart(run, tmp_path, call):
    out = tmp_path / "out.jsonl"
    last = run / "joint" / "last.pt"
    assert call(eval_jempp.main, ["--load_path", last, last, "--eval", "calibration", "--results",
                                  out, *QUICK])[0] == 0
    assert len(list(tmp_path.glob("*_calibration.npz"))) == 2
    for words in (["--seed", "30000001"], ["--seed", "30000002"], ["--sigma", "0.03"], []):
        assert call(eval_jempp.main, ["--load_path", last, "--eval", "calibration", "--results",
                                      out, *QUICK, *words])[0] == 0
    names = [path.name for path in tmp_path.glob("*_calibration.npz")]
    assert len(names) == 5 and sum("-seed3" in n or "-sigma0.03" in n for n in names) == 3
    for name in ("f/same", "g/same"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "a.png")
    code, text, err = call(eval_jempp.main, [
        "--load_path", last, "--eval", "ood", *QUICK, "--ood", f"folder:{tmp_path}/f/same",
        f"folder:{tmp_path}/g/same"])
    assert code == 2 and "same name" in err


def test_a_results_file_keeps_what_it_holds(run, tmp_path, call):
    argv = ["--load_path", run / "joint" / "last.pt", "--eval", "calibration", *QUICK]
    whole = tmp_path / "whole.jsonl"
    whole.write_text('{"metric": "earlier"}')  # whole, but without its newline
    assert call(eval_jempp.main, [*argv, "--results", whole])[0] == 0
    assert [r["metric"] for r in read_jsonl(whole)] == ["earlier", "ece", "ece_adaptive"]
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    code, text, err = call(eval_jempp.main, [*argv, "--results", notes])
    assert code == 2 and notes.read_text() == "my notes"


def test_typed_sampler_flags_are_checked_like_in_training(run, tmp_path, call):
    code, text, err = call(eval_jempp.main, [
        "--load_path", run / "joint" / "last.pt", "--eval", "samples", *QUICK, "--in_steps", "0"])
    assert code == 2 and "--sgld_lr" in err
