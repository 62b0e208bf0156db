"""The in set typed as an out set is left out, in words."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.evaluation import evaluations
from utils.program import Unavailable


def test_the_in_set_under_another_name_is_left_out_in_words(capsys):
    kept = {("in", 2, 0.0): {"log_p_x": np.zeros(2), "about": None}}
    subject = SimpleNamespace(dataset="folder:mine", kept=kept,
                              images=lambda *_: SimpleNamespace(x=None, about=None))
    with pytest.raises(Unavailable):
        evaluations.in_and_out_scores(subject, ["log_p_x"], ["svhn=folder:mine"], 2, 0.0)
    captured = capsys.readouterr()
    assert "ood svhn: it is the in set" in captured.out + captured.err
