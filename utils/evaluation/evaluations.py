"""The evaluations of eval_jempp.py: one function each, from a ``Subject`` to numbers and pictures.

Every evaluation is a generator of ``Number``. Its keyword arguments are settings, named like their
flags. It writes raw scores and pictures through ``out``. Evaluations on real images are here, those
on generated images in sample_evaluations.py. The metrics are pure functions in calibration.py,
ood.py, generation.py and robustness.py.
"""

import functools
import inspect
import os
from pathlib import Path

import numpy as np

from utils import plots
from utils.evaluation import calibration, robustness
from utils.evaluation import ood as detection
from utils.evaluation.export import export
from utils.evaluation.inference import predict
from utils.evaluation.sample_evaluations import best_worst, fid, samples
from utils.evaluation.subject import Number, skip
from utils.program import Unavailable


def accuracy(subject, out, *, splits, n_images, sigma):
    """Accuracy, NLL and Brier score of each split. Images get noise only if --sigma is typed."""
    there = [split for split in splits if split != "valid" or len(subject.splits["valid"].y)]
    if not there:
        raise Unavailable("the valid split is empty (--n_valid 0)")
    for split in there:
        logits, y = subject.logits(split, n_images, sigma)
        correct = logits.argmax(1) == y
        log_p = logits.log_softmax(1).numpy()
        protocol = {"split": split, "sigma": sigma, "correct": int(correct.sum())}
        n, files = len(y), (out.npz(f"accuracy_{split}", logits=logits.numpy(), y=y.numpy()),)
        for metric, value, unit in (
                ("accuracy", correct.double().mean().item(), "fraction"),
                ("nll", calibration.nll(log_p, y.numpy()), "nats"),
                ("brier", calibration.brier_score(np.exp(log_p), y.numpy()), "")):
            yield Number(metric, value, unit, n, protocol, files)


def calibrate(subject, out, *, bins, n_images, sigma):
    """ECE (Eq. 16) and its equal-mass variant on the test split, reliability diagram (Fig. 10)."""
    logits, y = subject.logits("test", n_images, sigma)
    p = logits.softmax(1)
    confidence, correct = p.amax(1).numpy(), (logits.argmax(1) == y).numpy()
    ece = calibration.expected_calibration_error(confidence, correct, bins)
    adaptive = calibration.adaptive_calibration_error(confidence, correct, bins)
    n, protocol = len(y), {"split": "test", "bins": bins, "sigma": sigma}
    files = (out.npz("calibration", confidence=confidence, correct=correct),
             out.figure("reliability", plots.reliability_diagram(
                 calibration.reliability_bins(confidence, correct, bins), ece,
                 subject.title("Reliability", n))))
    yield Number("ece", ece, "fraction", n, protocol, files)
    yield Number("ece_adaptive", adaptive, "fraction", n, protocol, files)


SCORES = {"log_p_x": "log p(x) + log Z", "max_p_y": "max p(y|x)",
          "grad_norm": "−‖∇ log p(x)‖"}


def scores_of(subject, x, names, sigma):
    """{score name: float64 [n]} for uint8 images [n, 3, H, W], all scores in one pass."""
    how = subject.model, x.to(subject.device), subject.batch_size, sigma, subject.seed
    values = {}
    if "grad_norm" in names:
        logits, values["grad_norm"] = detection.logits_and_gradient_norm(*how)
    else:
        logits = predict(*how)
    values["log_p_x"] = detection.log_p_x(subject.finite(logits))
    values["max_p_y"] = detection.max_p_y_given_x(logits)
    return {name: subject.finite(values[name]).cpu().numpy() for name in names}


def in_and_out_scores(subject, names, out_sets, n_images, sigma):
    """(in scores, {out set: scores}, {out set: notes on its origin}).

    An out set that is missing is reported and skipped. Scores of earlier evaluations are reused.
    """
    def scores(key, load):
        known = subject.kept.setdefault((key, n_images, sigma), {})
        if not known.keys() >= set(names):
            images = load()
            known |= scores_of(subject, images.x, names, sigma) | {"about": images.about}
        return {name: known[name] for name in names}, known["about"]

    def out_set(text):
        return detection.out_set(text, subject.image_size, in_x=images_in.x, seed=subject.seed,
                                 root=subject.data_root, download=subject.download, n=n_images)

    images_in = subject.images("test", n_images)
    inside, _ = scores("in", lambda: images_in)
    outside, about = {}, {}
    for text in out_sets:
        name, source = detection.name_and_source(text)
        if source == subject.dataset:
            if ":" in text:  # typed, not of the default list
                skip(f"ood {name}", "it is the in set")
            continue
        try:
            outside[name], about[name] = scores(text, functools.partial(out_set, text))
        except Unavailable as error:
            skip(f"ood {name}", error)
    if not outside:
        raise Unavailable("no out set of --ood is available")
    return inside, outside, about


def file_name(out_set):
    """An out set's name for files and panels. A path is shortened to its last part, and its bytes
    that are not UTF-8 become �."""
    kind, _, path = os.fsencode(out_set).decode(errors="replace").partition(":")
    return f"{kind}-{Path(path).name}" if path else kind


def detect_ood(subject, out, *, ood, n_images, sigma):
    """AUROC, AUPR and FPR at 95 % TPR of three scores on each out set (Table 7)."""
    inside, outside, about = in_and_out_scores(subject, list(SCORES), ood, n_images, sigma)
    raw = out.npz("ood", **{f"in_{k}": v for k, v in inside.items()},
                  **{f"{file_name(o)}_{k}": v for o, vs in outside.items() for k, v in vs.items()})
    pictures = draw_histograms(subject, out, inside, outside)
    for name, values in outside.items():
        for score in SCORES:
            pair, files = (inside[score], values[score]), (raw, pictures[score])
            n_in, n_out = map(len, pair)
            protocol = {"score": score, "out": name, "in": f"{subject.dataset} test",
                        "n_in": n_in, "n_out": n_out, **about[name],
                        **({"sigma": sigma} if sigma else {})}
            for metric, measure in (("auroc", detection.auroc), ("aupr", detection.aupr),
                                    ("fpr95", detection.fpr_at_95_tpr)):
                yield Number(metric, measure(*pair), "fraction", n_in + n_out, protocol, files)


def histogram(subject, out, *, ood, n_images, sigma):
    """Plot the densities of log p(x) on the test split and on each out set (Table 8)."""
    inside, outside, _ = in_and_out_scores(subject, ["log_p_x"], ood, n_images, sigma)
    draw_histograms(subject, out, inside, outside)
    yield from ()


def draw_histograms(subject, out, inside, outside):
    """Draw a figure for each score. Returns {score: file}."""
    return {score: out.figure(f"histogram_{score}", plots.score_histograms(
                inside[score], {file_name(name): values[score] for name, values in outside.items()},
                subject.dataset, SCORES[score],
                subject.title(SCORES[score], len(inside[score]))))
            for score in inside}


def robust(subject, out, *, attacks, eps_linf, eps_l2, attack_steps, attack_restarts, n_attack):
    """Accuracy under each of the white-box ``attacks`` at growing budgets (Fig. 9)."""
    x, y, _ = subject.images("test", n_attack or None)
    kinds = {"pgd": (robustness.pgd_accuracy,
                     {"steps": attack_steps, "rel_stepsize": 2.5 / attack_steps}),
             "margin": (robustness.margin_pgd_accuracy,
                        {"steps": attack_steps, "restarts": attack_restarts}),
             "autoattack": (robustness.autoattack_accuracy, {})}
    for attack in attacks:
        run, settings = kinds[attack]
        for norm, eps, unit in (("linf", eps_linf, "eps_255"), ("l2", eps_l2, "eps")):
            if not eps:
                continue
            try:
                result = run(subject.model, x, y, [0.0, *eps], norm,
                             batch_size=subject.batch_size, seed=subject.seed, **settings)
            except Unavailable as error:  # AutoAttack is an optional dependency
                skip(f"{attack} {norm}", error)
                continue
            files = (out.npz(f"robustness_{attack}_{norm}", eps=np.array(result.eps),
                             robust=result.robust.numpy(), correct=result.correct.numpy()),)
            for budget, value in zip(result.eps, result.accuracy.tolist(), strict=True):
                protocol = {"attack": attack, "norm": norm, unit: budget, **settings}
                yield Number("robust_accuracy", value, "fraction", len(y), protocol, files)


EVALUATIONS = {"accuracy": accuracy, "calibration": calibrate, "ood": detect_ood, "fid": fid,
               "robustness": robust, "samples": samples, "best_worst": best_worst,
               "histogram": histogram, "export": export}


def named_by(function, settings):
    """The ``settings`` that are parameters of ``function``."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in names}
