"""RUN/samples/curves.png: what a run logged, drawn at each evaluation, and runs over each other."""

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image
from torchvision.utils import make_grid

import train_jempp
from scripts import figures
from utils import plots

LOG = [{"kind": "header", "step": 0},
       *({"kind": "step", "step": k, "loss": 1.0 * k, "ce": 2.0, "e_pos": -1.0, "e_neg": -2.0,
          "gap": 1.0, "chain_age": 9.0, "grad_norm": 3.0, "accuracy": 0.5, "lr": 0.1}
         for k in (1, 2)),
       {"kind": "rollback", "step": 3, "to_step": 1, "cause": "loss is nan"},
       {"kind": "step", "step": 2, "loss": 7.0, "ce": 2.0, "e_pos": -1.0, "e_neg": "inf",
        "gap": 1.0, "chain_age": 9.0, "grad_norm": 3.0, "accuracy": 0.5, "lr": 0.1},
       {"kind": "eval", "step": 2, "epoch": 1, "valid_accuracy": None, "test_accuracy": 0.25}]


@pytest.fixture
def panels():
    """A function: {title of a panel: its axes} of the curves of some logs."""
    def drawn(logs):
        figure = plots.training_curves(logs, "t")
        return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}

    yield drawn
    plots.plt.close("all")


@pytest.mark.parametrize("n, columns", [(7, 3), (3, 10), (10, 10), (2, 1)])
def test_a_grid_is_that_of_torchvision(n, columns):
    x = torch.randint(0, 256, (n, 3, 5, 8), generator=torch.Generator().manual_seed(n)).byte()
    assert torch.equal(plots.tiled(x, columns), make_grid(x, columns, padding=2, pad_value=255))


def lines_of(axis):
    """{label: (steps, values)} of the curves in a panel."""
    return {line.get_label(): line.get_data() for line in axis.lines
            if not line.get_label().startswith("_")}


def faults(axis):
    return [(line.get_xdata()[0], line.get_linestyle()) for line in axis.lines
            if line.get_label().startswith("_")]


def test_curves_are_what_was_logged_and_break_where_the_run_went_back(panels):
    found = panels({"": LOG})
    assert list(found) == list(plots.CURVES)
    steps, values = lines_of(found["loss and its terms"])["loss"]
    assert list(steps) == [1, 2, 3, 2] and list(values[:2]) == [1, 2] and values[3] == 7
    assert np.isnan(values[2]), "the line does not run back to where the run went on"
    assert lines_of(found["energies"])["E(x−)"][1][-1] == np.inf
    accuracy = lines_of(found["accuracy"])
    assert accuracy["test"][1][-1] == 0.25
    assert all(faults(axis) == [(3, ":")] for axis in found.values())


def test_a_softmax_run_has_no_panel_of_energies_and_a_lost_run_ends_in_a_solid_line(panels):
    of_chains = ("e_pos", "e_neg", "gap", "chain_age")
    log = [{k: v for k, v in line.items() if k not in of_chains} for line in LOG]
    found = panels({"": [*log, {"kind": "end", "step": 5, "reason": "diverged"}]})
    assert set(plots.CURVES) - set(found) == {"energies", "energy gap E(x+) − E(x−)",
                                              "mean age of the chains, sampler steps"}
    assert faults(found["accuracy"]) == [(3, ":"), (5, "-")]


def test_runs_over_each_other_have_a_colour_each(panels):
    axis = panels({"a": LOG, "b": LOG[:3]})["energies"]
    assert list(lines_of(axis)) == ["a, E(x+)", "a, E(x−)", "b, E(x+)", "b, E(x−)"]
    colors = [line.get_color() for line in axis.lines if not line.get_label().startswith("_")]
    assert colors == ["C0", "C0", "C1", "C1"]


def test_a_run_draws_its_curves_at_each_evaluation_and_figures_lays_runs_over(call, tmp_path):
    runs = tmp_path / "a", tmp_path / "b"
    assert call(train_jempp.main, tiny(runs[0], "--n_epochs", "1"))[0] == 0
    assert call(train_jempp.main, tiny(runs[1], "--n_epochs", "1", "--p_x_weight", "0"))[0] == 0
    for run in runs:
        picture = Image.open(run / "samples" / "curves.png")
        assert picture.width > picture.height > 200
    out = tmp_path / "both.png"
    code, _, err = call(figures.main, ["curves", *runs, "--out", out])
    assert (code, err) == (0, "") and Image.open(out).width > 500


@pytest.mark.parametrize(("words", "complaint"), [
    (["curves"], "name runs (RUN...)"), (["curves", "x", "--line", "M=5", "y"], "name runs"),
    (["curves", "nowhere"], "nowhere holds no train.jsonl"),
    (["robustness", "x"], "takes no run folders")])
def test_a_wrong_word_is_one_line(call, tmp_path, words, complaint):
    code, _, err = call(figures.main, [*words, "--out", tmp_path / "out.png"])
    assert code == 2 and complaint in err and err.count("\n") == 1
