"""What eval_jempp.py can measure: one function each, from a ``Subject`` to numbers and pictures.

Every evaluation is a generator of ``Number``; its raw scores and pictures go through ``out``. The
metrics are pure functions in calibration.py, ood.py, generation.py and robustness.py.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from samplers import to_pixels
from utils import distributed, plots
from utils.data import load
from utils.evaluation import calibration, generation, ood, robustness
from utils.evaluation.inference import predict
from utils.files.checkpoint import open_any
from utils.program import InputError, Unavailable
from utils.seeding import seed_step


class Number(NamedTuple):
    """One measured value; ``protocol`` says all that its meaning depends on."""

    metric: str
    value: float
    unit: str
    n: int
    protocol: dict


def skip(what, error):
    """Say in one line what is left out; the other evaluations go on."""
    if distributed.rank() == 0:
        print(f"left out: {what}: {error}", file=sys.stderr)


def accuracy(s, out):
    """Accuracy, NLL and Brier score of each split (recipe: noise only where --sigma asks)."""
    for split in s.args.splits:
        if split == "valid" and not len(s.splits["valid"].y):
            continue
        logits, y = s.logits(split, s.args.n_images, s.args.sigma)
        correct = logits.argmax(1) == y
        log_p = logits.log_softmax(1).numpy()
        protocol = {"split": split, "sigma": s.args.sigma, "correct": int(correct.sum())}
        n = len(y)
        yield Number("accuracy", correct.double().mean().item(), "fraction", n, protocol)
        yield Number("nll", calibration.nll(log_p, y.numpy()), "nats", n, protocol)
        yield Number("brier", calibration.brier_score(np.exp(log_p), y.numpy()), "", n, protocol)
        out.npz(f"accuracy_{split}", logits=logits.numpy(), y=y.numpy())


def calibrate(s, out):
    """ECE by Eq. 16 and its equal-mass variant on the test split; reliability diagram (Fig. 10)."""
    logits, y = s.logits("test", s.args.n_images, s.args.sigma)
    p = logits.softmax(1)
    confidence, correct = p.amax(1).numpy(), (logits.argmax(1) == y).numpy()
    n, bins = len(y), s.args.bins
    ece = calibration.expected_calibration_error(confidence, correct, bins)
    adaptive = calibration.adaptive_calibration_error(confidence, correct, bins)
    protocol = {"split": "test", "bins": bins, "sigma": s.args.sigma}
    yield Number("ece", ece, "fraction", n, protocol)
    yield Number("ece_adaptive", adaptive, "fraction", n, protocol)
    out.npz("calibration", confidence=confidence, correct=correct)
    out.figure("reliability", plots.reliability_diagram(
        calibration.reliability_bins(confidence, correct, bins), ece, s.title("Reliability", n)))


def finite(s, values):
    """``values`` of a network, InputError where one is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise InputError(f"{s.label}: what the network computes is not finite")
    return values


def scores_of(s, x, names):
    """{score name: float64 [n]} of uint8 images [n, 3, H, W]."""
    logits = finite(s, predict(s.model, x, s.args.batch_size))
    values = {}
    for name in names:
        if name == "log_p_x":
            values[name] = ood.log_p_x(logits)
        elif name == "max_p_y":
            values[name] = ood.max_p_y_given_x(logits)
        else:
            values[name] = finite(s, ood.gradient_norm_score(s.model, x, s.args.batch_size))
    return {name: v.cpu().numpy() for name, v in values.items()}


SCORES = {"log_p_x": "log p(x) + log Z", "max_p_y": "max p(y|x)",
          "grad_norm": "−‖∇ log p(x)‖"}


def in_and_out_scores(s, names):
    """(in scores, {out set: scores}); an out set that is not there is said and left out."""
    a = s.args
    x_in = s.images("test", a.n_images).x
    inside, outside = scores_of(s, x_in, names), {}
    for name in a.ood:
        if name == a.dataset:
            continue
        try:
            x = ood.out_set(name, a.image_size, in_x=x_in, root=a.data_root, seed=a.seed,
                            download=a.download, n=a.n_images and len(x_in)).x
        except Unavailable as error:
            skip(f"ood {name}", error)
            continue
        outside[name] = scores_of(s, x.to(s.device), names)
    if not outside:
        raise Unavailable("no out set of --ood could be had")
    return inside, outside


def file_name(out_set):
    """An out set's name for files and panels: a folder by its last part."""
    kind, _, path = out_set.partition(":")
    return f"{kind}-{Path(path).name}" if path else kind


def detect_ood(s, out):
    """AUROC, AUPR and FPR at 95 % TPR of three scores against each out set (Table 7)."""
    inside, outside = in_and_out_scores(s, SCORES)
    for name, values in outside.items():
        for score in SCORES:
            pair = inside[score], values[score]
            protocol = {"score": score, "out": name, "in": f"{s.args.dataset} test",
                        "n_in": len(pair[0]), "n_out": len(pair[1])}
            n = len(pair[0]) + len(pair[1])
            yield Number("auroc", ood.auroc(*pair), "fraction", n, protocol)
            yield Number("aupr", ood.aupr(*pair), "fraction", n, protocol)
            yield Number("fpr95", ood.fpr_at_95_tpr(*pair), "fraction", n, protocol)
    out.npz("ood", **{f"in_{k}": v for k, v in inside.items()},
            **{f"{file_name(o)}_{k}": v for o, vs in outside.items() for k, v in vs.items()})
    draw_histograms(s, out, inside, outside)


def histogram(s, out):
    """The densities of log p(x) on the test split and on each out set (Table 8), no numbers."""
    inside, outside = in_and_out_scores(s, ["log_p_x"])
    draw_histograms(s, out, inside, outside)
    return iter(())


def draw_histograms(s, out, inside, outside):
    for score in inside:
        panels = {file_name(name): values[score] for name, values in outside.items()}
        out.figure(f"histogram_{score}", plots.score_histograms(
            inside[score], panels, s.args.dataset, SCORES[score],
            s.title(SCORES[score], len(inside[score]))))


def selected(s, x, protocol):
    """The images of --top confidence per predicted class, and the protocol with it."""
    if s.args.top == 1:
        return x, {**protocol, "selection": "all"}
    p = predict(s.model, x.to(s.device), s.args.batch_size).double().softmax(1).cpu()
    keep = generation.select_per_class(p.amax(1).numpy(), p.argmax(1).numpy(), s.args.top)
    return x[torch.from_numpy(keep)], {**protocol, "selection": f"top {s.args.top} per class"}


def reference_images(s):
    """The real images that generated ones are compared with: --reference, whatever --n_train."""
    a = s.args
    return torch.cat([load(a.dataset, a.data_root, train=name == "train", download=a.download,
                           size=a.image_size).x for name in a.reference.split("+")])


def fid(s, out):
    """IS, FID and KID with pytorch-fid's Inception; fd_features in --features' network."""
    a = s.args
    judge = open_any(a.features) if a.features else None
    inception, n = None, s.n_generated()
    try:  # whatever is missing is told before hours are spent on chains
        if n < max(2, a.is_splits, a.kid_subset_size):
            raise Unavailable(f"{n} generated images are too few for --is_splits {a.is_splits} and "
                              f"--kid_subset_size {a.kid_subset_size}")
        inception = generation.inception(a.inception_weights, a.download)
    except Unavailable as error:
        if judge is None:
            raise
        skip("IS, FID, KID", error)
    x, protocol = s.generated()
    out.npz("fid_images", images=x[:2000].numpy())
    x, protocol = selected(s, x, {**protocol, "reference": a.reference})
    if inception:
        yield from inception_metrics(s, x, protocol, *inception)
    if judge:
        yield from feature_distance(s, x, protocol, judge)


def cache_file(s, network):
    """Statistics of the reference set in one network's features, beside the data."""
    a = s.args
    name = f"{a.dataset}{a.image_size}-{a.reference}-{network[:16]}.npz"
    return Path(a.data_root) / "jempp-reference" / name


def inception_metrics(s, x, protocol, network, sha256):
    a, n = s.args, len(x)
    network = network.to(s.device)
    reference = generation.reference_statistics(
        cache_file(s, sha256),
        lambda: generation.inception_outputs(network, reference_images(s), a.batch_size)[0])
    features, probabilities = generation.inception_outputs(network, x, a.batch_size)
    protocol = {**protocol, "tool": "pytorch-fid", "n_reference": reference.n,
                "inception_sha256": sha256,
                "published_weights": sha256 == generation.WEIGHTS_SHA256,
                "rank_deficient": generation.rank_deficient(n)}
    mean, std = generation.inception_score(probabilities, a.is_splits)
    splits = {**protocol, "splits": a.is_splits}
    yield Number("is_mean", mean, "", n, splits)
    yield Number("is_std", std, "", n, splits)
    distance = generation.frechet_distance(generation.statistics(features), reference)
    yield Number("fid", distance, "", n, protocol)
    mean, std = generation.kernel_inception_distance(features, reference.features, a.kid_subsets,
                                                     a.kid_subset_size, a.seed)
    yield Number("kid", mean, "", n, {**protocol, "subsets": a.kid_subsets, "std": std,
                                      "subset_size": a.kid_subset_size})


def feature_distance(s, x, protocol, judge):
    model, n = judge.model.to(s.device), len(x)
    reference = generation.reference_statistics(
        cache_file(s, judge.sha256),
        lambda: generation.penultimate_features(model, reference_images(s), s.args.batch_size))
    features = generation.penultimate_features(model, x, s.args.batch_size)
    distance = generation.frechet_distance(generation.statistics(features), reference)
    yield Number("fd_features", distance, "", n, {
        **protocol, "features_sha256": judge.sha256, "n_reference": reference.n,
        "dimensions": features.shape[1],
        "rank_deficient": generation.rank_deficient(n, features.shape[1])})


def robust(s, out):
    """Accuracy under white-box attacks of growing budget (Fig. 9), by two kinds of attack."""
    a = s.args
    x, y = s.images("test", a.n_attack or None)
    for attack in a.attacks:
        settings = {"pgd": {"steps": a.attack_steps, "rel_stepsize": 2.5 / a.attack_steps},
                    "margin": {"steps": a.attack_steps, "restarts": a.attack_restarts},
                    "autoattack": {}}[attack]
        run = {"pgd": robustness.pgd_accuracy, "margin": robustness.margin_pgd_accuracy,
               "autoattack": robustness.autoattack_accuracy}[attack]
        for norm, eps in (("linf", a.eps_linf), ("l2", a.eps_l2)):
            if not eps:
                continue
            try:
                result = run(s.model, x, y, [0.0, *eps], norm, batch_size=a.batch_size,
                             seed=a.seed, **settings)
            except Unavailable as error:  # AutoAttack is an optional dependency
                skip(f"{attack} {norm}", error)
                continue
            for budget, value in zip(result.eps, result.accuracy.tolist(), strict=True):
                unit = "eps_255" if norm == "linf" else "eps"
                yield Number("robust_accuracy", value, "fraction", len(y),
                             {"attack": attack, "norm": norm, unit: budget, **settings})
            out.npz(f"robustness_{attack}_{norm}", eps=np.array(result.eps),
                    robust=result.robust.numpy(), correct=result.correct.numpy())


def class_names(s):
    """Names for rows of pictures."""
    n_classes, names = s.model.config["n_classes"], s.args.class_names
    return names if len(names) == n_classes else [str(k) for k in range(n_classes)]


def by_class(s, x):
    """Predicted class and log p(y|x), log p(x) + log Z of images [n, 3, H, W] in [-1, 1]."""
    logits = predict(s.model, plots.to_uint8(x).to(s.device), s.args.batch_size)
    logits = finite(s, logits).double().cpu()
    return logits.argmax(1), logits.log_softmax(1).amax(1), logits.logsumexp(1)


def samples(s, out):
    """Grids of samples, unconditional and per class (Figs 3, 4, 12), the way of a chain, and the
    class centres and draws of p_0 (Figs 2, 7, 8). Pictures only."""
    a, names = s.args, class_names(s)
    n_classes = len(names)
    if s.opened.buffer is not None:
        x = s.buffer()
        shown = x[::max(1, len(x) // 100)][:100].split(10)
        out.figure("buffer", plots.image_rows(shown, [""] * len(shown), s.title(
            "Replay buffer, evenly spaced slots", len(x))))
        predicted, _, _ = by_class(s, x)
        rows = [x[predicted == k][:10] for k in range(n_classes)]
        out.figure("buffer_by_class", plots.image_rows(
            rows, names, s.title("Replay buffer by predicted class, unselected", len(x)), 10))
    if a.init == "informative":
        try:
            centres = s.p0.means()
        except Unavailable as error:
            skip("samples from scratch", error)
            return
        y = torch.arange(n_classes).repeat_interleave(9)
        streams = seed_step(a.seed, 0, "p0", s.device)
        draws = s.p0.sample(len(y), y, host=streams.host, generator=streams.device)
        rows = [torch.cat([c[None], d]) for c, d in zip(centres, draws.split(9), strict=True)]
        out.figure("p0", plots.image_rows(
            rows, names, s.title("Class centres (left) and draws of p0", len(y))))
    words = f"{'PYLD' if a.in_steps else 'SGLD'} from scratch, {a.chain_steps} outer steps"
    free = s.chains(a.chain_batch, snapshots=10)
    if not torch.isfinite(free[-1]).all():
        raise InputError(f"{s.label}: its chains run off to infinity")
    last = free[-1][:100]
    out.figure("scratch", plots.image_rows(last.split(10), [""] * len(last.split(10)),
                                           s.title(words, len(last))))
    marks = [f"{round(k * a.chain_steps / 10)}" for k in range(11)]
    out.figure("chains", plots.image_rows([x[:10] for x in free], marks, s.title(
        "Chains from p0: one a column, outer step at the left", min(10, a.chain_batch))))
    y = torch.arange(n_classes).repeat_interleave(10)
    conditional = s.chains(len(y), y)[-1]
    out.figure("scratch_by_class", plots.image_rows(
        conditional.split(10), names, s.title(f"Conditional {words}", len(y))))
    out.npz("samples", scratch=plots.to_uint8(free[-1]).numpy(),
            by_class=plots.to_uint8(conditional).numpy(), y=y.numpy())
    yield from ()


def best_worst(s, out):
    """Per predicted class, the images of highest and lowest log p(x) and p(y|x) (Figs 13-22)."""
    x, _ = s.generated()
    x = to_pixels(x)
    predicted, log_p_y, log_p_x = by_class(s, x)
    for name, words, score in (("p_x", "p(x)", log_p_x), ("p_y", "p(y|x)", log_p_y)):
        for end, descending in (("best", True), ("worst", False)):
            rows = []
            for k in range(len(class_names(s))):
                members = (predicted == k).nonzero().squeeze(1)
                order = score[members].argsort(descending=descending, stable=True)
                rows.append(x[members[order[:10]]])
            title = f"{'Highest' if descending else 'Lowest'} {words} by predicted class"
            out.figure(f"{end}_{name}", plots.image_rows(
                rows, class_names(s), s.title(title, len(x)), 10))
    out.npz("best_worst", predicted=predicted.numpy(), log_p_x=log_p_x.numpy(),
            log_p_y=log_p_y.numpy())
    yield from ()


EVALUATIONS = {"accuracy": accuracy, "calibration": calibrate, "ood": detect_ood, "fid": fid,
               "robustness": robust, "samples": samples, "best_worst": best_worst,
               "histogram": histogram}
