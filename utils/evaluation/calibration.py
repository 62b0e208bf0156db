"""Calibration of p(y|x): reliability bins, expected calibration error (Eq. 16), NLL, Brier score.

Pure functions of arrays, in float64. ``confidence`` [N] is max_y p(y|x) in [0, 1], ``correct`` [N]
is whether that y is the label. Values are fractions (ECE 0.024, not 2.4 %). Lower is better, except
for accuracy. Bad input raises a one-line ValueError.
"""

from typing import NamedTuple

import numpy as np


class ReliabilityBins(NamedTuple):
    """Bin m is (edges[m], edges[m+1]]. Where count[m] is 0, its two means are NaN."""

    edges: np.ndarray  # [n_bins + 1]
    count: np.ndarray  # [n_bins], images
    accuracy: np.ndarray  # [n_bins]
    confidence: np.ndarray  # [n_bins]


def reliability_bins(confidence, correct, n_bins=20):
    """The B_m of Eq. 16: ``n_bins`` bins (l, u] of equal width over [0, 1], as ReliabilityBins.

    A confidence on an edge belongs to the bin below it, and 0 to the first bin.
    """
    confidence, correct = check_confidence(confidence, correct, n_bins)
    # k / n is the float nearest to each edge. Adding up steps of 1 / n would not always be.
    edges = np.arange(n_bins + 1) / n_bins
    bins = np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0)
    count = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 of an empty bin is meant to be NaN
        means = [np.bincount(bins, weights=values, minlength=n_bins) / count
                 for values in (correct, confidence)]
    return ReliabilityBins(edges, count, *means)


def expected_calibration_error(confidence, correct, n_bins=20):
    """ECE in [0, 1] (Eq. 16): sum_m |B_m| / N * |acc(B_m) - conf(B_m)|, empty bins adding 0."""
    bins = reliability_bins(confidence, correct, n_bins)
    full = bins.count > 0
    gap = np.abs(bins.accuracy - bins.confidence)[full]
    return float((bins.count[full] * gap).sum() / bins.count.sum())


def adaptive_calibration_error(confidence, correct, n_bins=20):
    """Eq. 16 over bins of equal mass: the sorted confidences cut into ``n_bins`` runs.

    The runs' sizes differ by at most 1. With N < n_bins there are N runs of one image. Equal
    confidences stay in input order, so the order matters where a cut separates them.
    """
    confidence, correct = check_confidence(confidence, correct, n_bins)
    gap = (correct - confidence)[np.argsort(confidence, kind="stable")]
    return float(sum(abs(part.sum()) for part in np.array_split(gap, n_bins)) / len(gap))


def nll(log_p, y):
    """Mean over images of -log p(y|x) in nats. ``log_p`` [N, K] log-probabilities, ``y`` [N] int.

    Infinite if a label has probability 0.
    """
    log_p, y = np.asarray(log_p, dtype=np.float64), np.asarray(y)
    check_probabilities(np.exp(np.minimum(log_p, 1)), y, "log_p")  # minimum: logits may overflow
    return float(-log_p[np.arange(len(y)), y].mean())


def brier_score(p, y):
    """Mean over images of sum_k (p_k - [k = y])^2, in [0, 2]. ``p`` [N, K], ``y`` [N] int."""
    p, y = np.asarray(p, dtype=np.float64), np.asarray(y)
    check_probabilities(p, y, "p")
    error = p.copy()
    error[np.arange(len(y)), y] -= 1
    return float((error**2).sum(1).mean())


def check_confidence(confidence, correct, n_bins):
    """Both as float64 [N], or ValueError."""
    confidence = np.asarray(confidence, dtype=np.float64)
    correct = np.asarray(correct, dtype=np.float64)
    if int(n_bins) != n_bins or n_bins < 1:
        raise ValueError(f"n_bins is a whole number of at least 1, not {n_bins}")
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError("confidence and correct are both [N], got shapes "
                         f"{confidence.shape} and {correct.shape}")
    if not len(confidence):
        raise ValueError("confidence is empty: there is nothing to measure")
    if not ((confidence >= 0) & (confidence <= 1)).all():  # false for NaN too
        raise ValueError(f"confidence is in [0, 1], got {confidence.min()} to {confidence.max()}")
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("correct holds only True and False (1 and 0)")
    return confidence, correct


def check_probabilities(p, y, name):
    """ValueError unless the rows of ``p`` [N, K] are distributions and ``y`` [N] their labels."""
    if p.ndim != 2 or y.shape != p.shape[:1]:
        raise ValueError(f"{name} is [N, K] and y is [N], got shapes {p.shape} and {y.shape}")
    if not p.size:
        raise ValueError(f"{name} is empty: there is nothing to measure")
    # Logits passed by mistake would give a plausible number. 1e-3 leaves room for float32 sums.
    if not ((p >= 0).all() and (np.abs(p.sum(1) - 1) < 1e-3).all()):  # false for NaN too
        raise ValueError(f"the rows of {name} are no distributions: they hold NaN, or do not sum "
                         "to 1")
    if not (np.issubdtype(y.dtype, np.integer) and (y >= 0).all() and (y < p.shape[1]).all()):
        raise ValueError(f"y holds whole numbers from 0 to {p.shape[1] - 1}")
