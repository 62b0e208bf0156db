"""Calibration numbers worked by hand, and against scikit-learn and plain loops."""

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from utils.evaluation.calibration import (
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    nll,
    reliability_bins,
)


def test_ece_equals_that_by_hand():
    # Bin (0, 0.5]: 0.2 wrong, 0.4 right, gap |1/2 - 0.3|. Bin (0.5, 1]: 0.9 right, 0.7 wrong,
    # 0.8 right, gap |2/3 - 0.8|.
    confidence, correct = [0.2, 0.9, 0.4, 0.7, 0.8], [0, 1, 1, 0, 1]
    expected = 2 / 5 * 0.2 + 3 / 5 * (0.8 - 2 / 3)
    assert expected_calibration_error(confidence, correct, 2) == pytest.approx(expected, abs=1e-15)


def test_bins_are_open_below_and_closed_above():
    confidence = [0.0, 0.05, np.nextafter(0.05, 1), 0.15, 0.55, 0.95, 1.0]
    bins = reliability_bins(confidence, np.ones(7), 20)
    assert np.flatnonzero(bins.count).tolist() == [0, 1, 2, 10, 18, 19]
    assert bins.count[0] == 2  # exactly 0 joins (0, 0.05]
    assert len(bins.edges) == 21 and (bins.edges[0], bins.edges[-1]) == (0, 1)


@pytest.mark.parametrize("n_bins", [7, 10, 20, 49])
def test_a_confidence_typed_as_an_edge_lies_below_it(n_bins):
    # Edges summed up in steps of 1 / n_bins miss k / n_bins by one rounding here and there.
    confidence = [k / n_bins for k in range(1, n_bins + 1)]
    assert reliability_bins(confidence, [1] * n_bins, n_bins).count.tolist() == [1] * n_bins


def test_bin_edge_decides_the_ece():
    # Eq. 16: 0.5 and 0.45 share (0.4, 0.5]: |1/2 - 0.475|. Bins [l, u) would part them: 0.475.
    assert expected_calibration_error([0.5, 0.45], [1, 0], 10) == pytest.approx(0.025, abs=1e-15)


@pytest.mark.parametrize("n_bins", [1, 5, 20])
def test_bins_agree_with_scikit_learn(n_bins):
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 2, 400)
    correct = rng.random(400) < confidence**2
    bins = reliability_bins(confidence, correct, n_bins)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=n_bins)  # full bins only
    full = bins.count > 0
    np.testing.assert_allclose(bins.accuracy[full], accuracy, atol=1e-14)
    np.testing.assert_allclose(bins.confidence[full], mean, atol=1e-14)
    assert np.isnan(bins.accuracy[~full]).all() and np.isnan(bins.confidence[~full]).all()
    ece = (bins.count[full] * np.abs(accuracy - mean)).sum() / 400
    assert expected_calibration_error(confidence, correct, n_bins) == pytest.approx(ece, abs=1e-14)


def test_adaptive_ece_equals_that_by_hand():
    # Sorted: 0.1 0.2 0.3 | 0.6 0.9, right 0 1 0 | 1 0: gaps of the sums 1 - 0.6 and 1 - 1.5.
    value = adaptive_calibration_error([0.9, 0.2, 0.6, 0.1, 0.3], [0, 1, 1, 0, 0], 2)
    assert value == pytest.approx((0.4 + 0.5) / 5, abs=1e-15)


def test_adaptive_ece_of_fewer_images_than_bins_is_the_mean_gap():
    assert adaptive_calibration_error([0.7, 0.9], [1, 0], 20) == pytest.approx(0.6, abs=1e-15)


def test_one_bin_is_the_overall_gap_and_calibrated_is_zero():
    confidence, correct = np.full(8, 0.75), np.array([1, 1, 1, 0] * 2)
    for error in (expected_calibration_error, adaptive_calibration_error):
        assert error(confidence, correct, 1) == 0
        assert error(confidence, 1 - correct, 1) == pytest.approx(0.5)


def test_nll_and_brier_equal_those_by_hand():
    p, y = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), np.array([0, 1])
    assert nll(np.log(p), y) == pytest.approx((math.log(2) + math.log(10)) / 2, abs=1e-15)
    assert brier_score(p, y) == pytest.approx((0.375 + 0.01 + 0.81 + 0.64) / 2, abs=1e-15)
    assert brier_score(np.eye(3), np.array([1, 2, 0])) == 2  # surely wrong
    assert nll(np.array([[0.0, -np.inf]]), np.array([1])) == np.inf


def test_sums_are_in_float64():
    # 0.1 in float32 is 0.1 + 1.5e-9; the mean over 1e5 of them in float32 would be 1e-5 off.
    ece = expected_calibration_error(np.full(100_000, 0.1, np.float32), np.zeros(100_000), 1)
    assert ece == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize("error", [expected_calibration_error, adaptive_calibration_error])
@pytest.mark.parametrize(("confidence", "correct", "n_bins", "message"), [
    ([], [], 20, "empty"),
    ([0.5, np.nan], [1, 0], 20, r"\[0, 1\]"),
    ([0.5, 1.01], [1, 0], 20, r"\[0, 1\]"),
    ([-0.01], [1], 20, r"\[0, 1\]"),
    ([0.5], [1, 0], 20, "shapes"),
    ([[0.5]], [[1]], 20, "shapes"),
    ([0.5], [2], 20, "True and False"),
    ([0.5], [np.nan], 20, "True and False"),
    ([0.5], [1], 0, "n_bins"),
    ([0.5], [1], 2.5, "n_bins"),
])
def test_bad_confidences_are_refused(error, confidence, correct, n_bins, message):
    with pytest.raises(ValueError, match=message) as caught:
        error(confidence, correct, n_bins)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("p", "y", "message"), [
    (np.zeros((0, 3)), np.zeros(0, int), "empty"),
    (np.full((2, 2), 0.5), np.array([0]), "shapes"),
    (np.array([[0.5, np.nan]]), np.array([0]), "no distributions"),
    (np.array([[3.0, 900.0]]), np.array([0]), "no distributions"),  # logits
    (np.array([[3.0, -50.0]]), np.array([0]), "no distributions"),
    (np.array([[0.5, 0.5]]), np.array([2]), "from 0 to 1"),
    (np.array([[0.5, 0.5]]), np.array([-1]), "from 0 to 1"),
    (np.array([[0.5, 0.5]]), np.array([0.0]), "from 0 to 1"),
])
def test_bad_probabilities_are_refused(p, y, message):
    with pytest.raises(ValueError, match=message):
        brier_score(p, y)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
        nll(p if p.max(initial=0) > 1 else np.log(p), y)
