"""What an evaluation measures, leaves out and computes once, and what its files are called."""

import shutil

import numpy as np
import pytest
import torch
from helpers import TINY

import eval_jempp
import train_jempp
from samplers import to_pixels
from utils import cli
from utils.evaluation import evaluations, generation, inference, ood, subject
from utils.evaluation.evaluations import EVALUATIONS, named_by
from utils.files import records
from utils.files.records import read_jsonl

FLAGS = ["--no-download", "--device", "cpu", "--num_threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on digits, six steps with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("run")
    argv = [*TINY, "--run_dir", folder, "--keep_every", "1", "--n_epochs", "2", "--lr", "0.05"]
    assert train_jempp.main([str(word) for word in argv]) == 0
    return folder


@pytest.fixture
def evaluate(call, tmp_path):
    """Run the program; returns (records, what it says on standard error)."""
    def evaluate(checkpoints, *words, name="r.jsonl"):
        out = tmp_path / name
        code, _, err = call(eval_jempp.main, ["--load_path", *checkpoints, "--results", out,
                                              *FLAGS, *words])
        assert code == 0, err
        return read_jsonl(out), err
    return evaluate


def test_checkpoints_of_one_label_keep_their_files_apart(run, tmp_path, evaluate):
    """Also over two commands; a record names the files that it was computed from."""
    paths = []
    for name, kept in (("a", "epoch_0001.pt"), ("b", "epoch_0002.pt")):
        (tmp_path / name / "ck").mkdir(parents=True)
        paths.append(shutil.copy(run / kept, tmp_path / name / "ck" / "last.pt"))
    for path in paths:
        found, _ = evaluate([path], "--eval", "accuracy", "calibration", "--splits", "test")
    assert len({r["label"] for r in found}) == 1 and len(list(tmp_path.glob("*.npz"))) == 4
    for r in found:
        raw = np.load(tmp_path / r["files"][0])
        assert all((tmp_path / name).is_file() for name in r["files"])
        if r["metric"] == "accuracy":
            assert (raw["logits"].argmax(1) == raw["y"]).mean() == pytest.approx(r["value"])
        if r["metric"] == "ece":
            assert [name.split(".")[-1] for name in r["files"]] == ["npz", "png"]
    at_once, _ = evaluate(paths, "--labels", "x y", "x_y", "--eval", "calibration", name="2.jsonl")
    assert len({tuple(r["files"]) for r in at_once}) == 2


def test_more_images_than_a_split_has_are_all_of_it(run, evaluate):
    """--n_images has to fit no split: each gives what it has, and the record says how many."""
    found, _ = evaluate([run / "last.pt"], "--eval", "accuracy", "robustness", "--n_images", "50",
                        "--n_attack", "1000", "--eps_linf", "--eps_l2", "0.1", "--attacks", "pgd",
                        "--attack_steps", "1")
    assert {r["protocol"]["split"]: r["n"] for r in found if r["metric"] == "accuracy"} == {
        "train": 48, "valid": 40, "test": 50}
    assert {r["n"] for r in found if r["metric"] == "robust_accuracy"} == {360}


def raw_scores(folder, name):
    (path,) = folder.glob(f"*_{name}.npz")
    return np.load(path)


def test_noise_is_on_in_and_out_images_alike(run, tmp_path, evaluate):
    """Scores are those of images with the noise of ``pixels`` added by hand, not of clean ones."""
    words = ["--eval", "ood", "--ood", "uniform", "--n_images", "20"]
    noisy, _ = evaluate([run / "last.pt"], *words, "--sigma", "0.3")
    found = raw_scores(tmp_path, "ood")
    clean, _ = evaluate([run / "last.pt"], *words, name="clean/r.jsonl")
    assert {r["protocol"].get("sigma") for r in noisy} == {0.3}
    assert all("sigma" not in r["protocol"] for r in clean)
    assert [r["value"] for r in noisy] != [r["value"] for r in clean]
    judged = opened(run, *words)
    x_in = judged.images("test", 20).x
    x_out = ood.out_set("uniform", 16, in_x=x_in, root="", seed=0).x
    for name, x in (("in", x_in), ("uniform", x_out)):
        noise = torch.stack([torch.randn(x.shape[1:], generator=inference.generator(
            "cpu", 0, "noise", i)) for i in range(20)])
        logits = judged.model(to_pixels(x) + 0.3 * noise).double()
        want = {"log_p_x": logits.logsumexp(1), "max_p_y": logits.softmax(1).amax(1)}
        x = (to_pixels(x) + 0.3 * noise).requires_grad_()
        (gradient,) = torch.autograd.grad(judged.model(x).logsumexp(1).sum(), x)
        want["grad_norm"] = -gradient.flatten(1).norm(dim=1)
        for score, value in want.items():
            assert found[f"{name}_{score}"] == pytest.approx(value.detach().numpy(), rel=1e-5)


def opened(run, *words):
    """The ``Subject`` of a command with these words."""
    protocol, overrides = cli.evaluation_args(["--load_path", str(run / "last.pt"), *FLAGS, *words],
                                              EVALUATIONS)
    return eval_jempp.open_all(protocol, overrides, torch.device("cpu"))[0].subject


def test_statistics_measured_anew_are_those_of_training_and_stand_apart(run, tmp_path, evaluate):
    argv = [*TINY, "--run_dir", tmp_path / "run", "--keep_every", "2", "--n_epochs", "2", "--lr",
            "0.05", "--recalibrate_bn", "40"]
    assert train_jempp.main([str(word) for word in argv]) == 0
    trained = torch.load(tmp_path / "run" / "epoch_0002.pt", weights_only=True)["model"]
    words = ["--eval", "accuracy", "--splits", "test", "--batch_size", "16"]
    model = opened(run, *words, "--recalibrate_bn", "40").model.state_dict()
    before = opened(run, *words).model.state_dict()
    assert all(torch.equal(trained[k], v) for k, v in model.items())
    assert {k.split(".")[-1] for k, v in model.items() if not torch.equal(v, before[k])} == {
        "running_mean", "running_var", "num_batches_tracked"}
    evaluate([run / "last.pt"], *words)
    found, _ = evaluate([run / "last.pt"], *words, "--recalibrate_bn", "40")
    assert [r["protocol"].get("recalibrate_bn") for r in found] == [None] * 3 + [40] * 3
    assert found[0]["files"] != found[3]["files"]


def test_statistics_are_measured_over_batches_of_one_size(run):
    """One image more than a batch must not count as much as a batch."""
    def accuracies(n):
        model = opened(run, "--eval", "accuracy", "--batch_size", "20", "--recalibrate_bn",
                       str(n)).model.state_dict()
        return model["trunk.norm.running_mean"]

    whole, one_more, alone = accuracies(20), accuracies(21), accuracies(1)
    assert (whole - one_more).norm() < 0.3 * (whole - alone).norm()


def test_company_acts_on_fresh_chains_through_the_statistics_of_the_batch_alone(run):
    def chains(*words, **settings):
        subject = opened(run, "--eval", "fid", "--source", "scratch", "--chain_steps", "5",
                         "--chain_batch", "6", *words)
        return subject.chains(12, **settings)[-1], subject.generated()[1]

    for y in (None, torch.arange(12) % 10):
        alone, together = (chains("--sample_mode", "eval", *words, y=y)[0]
                           for words in ([], ["--company", "7"]))
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    (alone, before), (together, told) = chains(), chains("--company", "7")
    assert (alone - together).abs().max() > 1e-3
    assert told == before | {"company": 7}


def test_a_network_without_batch_norm_is_not_said_to_be_recalibrated(tmp_path, evaluate):
    argv = [*TINY, "--run_dir", tmp_path / "run", "--norm", "none", "--max_steps", "1"]
    assert train_jempp.main([str(word) for word in argv]) == 0
    found, _ = evaluate([tmp_path / "run" / "last.pt"], "--eval", "accuracy", "--splits", "test",
                        "--recalibrate_bn", "40")
    assert all("recalibrate_bn" not in r["protocol"] for r in found)
    assert "recalibrate" not in found[0]["files"][0]


class Judge(torch.nn.Module):
    """In Inception's place: features and probabilities that are functions of the images."""


def judged_by(monkeypatch):
    def outputs(network, images, batch_size):
        x = images.double().flatten(1)[:, :4000:300].numpy() / 255
        features = np.concatenate([x, x**2], 1)[:, :6]
        p = np.exp(5 * features)
        return features, p / p.sum(1, keepdims=True)

    monkeypatch.setattr(generation, "inception", lambda *_: (Judge(), "0" * 64))
    monkeypatch.setattr(generation, "inception_outputs", outputs)


def test_real_images_give_the_scale_of_the_distances_of_generated_ones(run, tmp_path, evaluate,
                                                                       call, monkeypatch):
    """Each source is judged on its own images, as many as asked for, and named in the record."""
    judged_by(monkeypatch)
    shown, outputs = [], generation.inception_outputs
    monkeypatch.setattr(generation, "inception_outputs",
                        lambda n, x, b: shown.append(x) or outputs(n, x, b))
    words = ["--data_root", tmp_path, "--eval", "fid", "--n_samples", "40", "--reference", "train"]

    def distance(source, *more):
        shown.clear()
        found, _ = evaluate([run / "last.pt"], *words, "--source", source, *more,
                            name=f"{source}{len(more)}.jsonl")
        (r,) = (r for r in found if r["metric"] == "fid")
        assert r["protocol"]["source"] == source and r["n"] == 40 == len(shown[0])
        return r["value"], shown[0], r["protocol"]

    test, images, _ = distance("test")
    assert torch.equal(images, opened(run, "--eval", "accuracy").images("test", 40).x)
    noisy, images, protocol = distance("test", "--sigma", "0.3")
    assert protocol["sigma"] == 0.3 and images.dtype == torch.uint8
    noise, _, _ = distance("uniform")
    assert test < noisy < noise and distance("p0")[0] < noise
    last = ["--load_path", run / "last.pt", *FLAGS]
    for more, line in ((["--source", "nowhere"], "unknown out-of-distribution set 'nowhere'"),
                       (["--source", "test", "--n_samples", "9999"], "test holds 360 images")):
        code, _, err = call(eval_jempp.main, [*last, *words, *more])
        assert code == 2 and line in err and err.count("\n") == 1
    code, _, err = call(eval_jempp.main, [*last, "--eval", "export", "--source", "test"])
    assert code == 2 and "is for generated images" in err


def test_an_image_metric_that_cannot_be_had_leaves_the_others(run, tmp_path, evaluate, call,
                                                              monkeypatch):
    """40 images: too few for KID by default, for IS in 50 splits; the record says rank-deficient.
    What follows in the command is run."""
    judged_by(monkeypatch)
    words = ["--data_root", tmp_path, "--eval", "fid", "calibration"]
    found, err = evaluate([run / "last.pt"], *words)
    assert [r["metric"] for r in found] == ["is_mean", "is_std", "fid", "ece", "ece_adaptive"]
    assert err.count("\n") == 1 and "left out: KID: KID cannot take subsets of 1000" in err
    assert found[2]["protocol"]["rank_deficient"] and found[2]["n"] == 40
    found, err = evaluate([run / "last.pt"], *words, "--is_splits", "50", "--top", "0.5",
                          "--kid_subset_size", "5", name="2.jsonl")
    assert [r["metric"] for r in found] == ["fid", "kid", "ece", "ece_adaptive"]
    assert err.count("\n") == 1 and "left out: IS: the Inception Score of" in err
    code, _, err = call(eval_jempp.main, [
        "--load_path", run / "last.pt", "--results", tmp_path / "3.jsonl", *FLAGS, *words[:3],
        "fid", "--n_samples", "1"])
    assert code == 2 and err.splitlines()[-1].endswith("for the reasons above")
    assert len(err.splitlines()) == 5 and not read_jsonl(tmp_path / "3.jsonl")


def test_no_pass_is_made_twice(run, tmp_path, evaluate, monkeypatch):
    """The test split's logits serve four evaluations; chains and out scores two each."""
    seen = []

    def counted(module, name):
        whole = getattr(module, name)

        def wrapper(*args, **kwargs):
            seen.append((name, len(args[1]) if name != "chains" else args[1]))
            return whole(*args, **kwargs)
        monkeypatch.setattr(module, name, wrapper)

    counted(subject, "predict")
    counted(evaluations, "predict")
    counted(ood, "logits_and_gradient_norm")
    counted(subject.Subject, "chains")
    found, _ = evaluate(
        [run / "last.pt"], "--eval", "accuracy", "calibration", "ood", "histogram", "fid",
        "best_worst", "--splits", "test", "--n_images", "30", "--ood", "uniform", "constant",
        "--source", "scratch", "--n_samples", "24", "--chain_steps", "2", "--features",
        run / "last.pt", "--data_root", tmp_path)
    assert {r["metric"] for r in found} >= {"accuracy", "ece", "auroc", "fd_features"}
    assert seen == [("predict", 30), *[("logits_and_gradient_norm", 30)] * 3, ("chains", 24)]


def test_an_evaluation_is_given_what_its_signature_names():
    def measure(subject, out, *, bins, sigma=0):
        return bins, sigma

    settings = {"bins": 3, "sigma": 1, "n_images": 5}
    assert named_by(measure, settings) == {"bins": 3, "sigma": 1}
    flags, _ = cli.evaluation_args(["--load_path", "x", "--eval", "accuracy"], EVALUATIONS)
    for evaluation in EVALUATIONS.values():  # every name is a flag's
        evaluation(None, None, **named_by(evaluation, vars(flags)))


def test_the_words_shown_of_a_protocol_are_one_list():
    protocol = {"split": "test", "sigma": 0.0, "correct": 3, "bins": 20}
    assert records.shown(protocol) == "bins=20 split=test"
    assert records.shown(protocol | {"sigma": 0.03}) == "bins=20 sigma=0.03 split=test"
