"""The paper's protocol: what each table and figure script trains and measures, and the defaults."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from models import JEM
from samplers import ClassGaussians, ReplayBuffer
from scripts import benchmark_table4
from utils import cli, plots
from utils.data import SPECS, Images, TrainData
from utils.evaluation import evaluations, generation, robustness, sample_evaluations
from utils.evaluation.evaluations import named_by
from utils.evaluation.subject import Subject
from utils.seeding import generator

# -- the table and figure scripts -----------------------------------------------------------------
# What differs from JEM++ (M = 10), the default, in each of the paper's models.
JEM_K20 = {"norm": "none", "init": "uniform", "optimizer": "adam", "lr": 1e-4, "weight_decay": 0,
           "in_steps": 0, "sgld_lr": 1, "sgld_std": 0.01, "n_steps": 20, "eps": math.inf,
           "pixel_clamp": False, "sample_mode": "eval", "n_epochs": 200,
           "decay_epochs": [160, 180], "decay_rate": 0.3}
SOFTMAX = {"p_x_weight": 0}
IGEBM = JEM_K20 | {"p_x_weight": 0, "p_y_given_x_weight": 0, "p_x_y_weight": 1}
JEMPP = {f"JEM++ (M={m})": {"n_steps": m} for m in (5, 10, 20)}
M5_M10 = {name: JEMPP[name] for name in ("JEM++ (M=5)", "JEM++ (M=10)")}
ADAM = {"optimizer": "adam", "lr": 1e-4}
TABLE2 = JEMPP | {"JEM (K=20)": JEM_K20, "IGEBM": IGEBM}
ABLATION = {"JEM++": {}, "w/o Proximity": {"eps": math.inf}, "w/ Adam": ADAM,
            "random init (w/ BN)": {"init": "uniform"},
            "random init (w/o BN)": {"init": "uniform", "norm": "none"} | ADAM,
            "informative init (w/o BN)": {"norm": "none"} | ADAM}
FIG9 = M5_M10 | {"Softmax": SOFTMAX, "JEM (K=20)": JEM_K20,
                 "Adv. training, linf": SOFTMAX | {"adversarial": "linf", "adv_eps": 8},
                 "Adv. training, l2": SOFTMAX | {"adversarial": "l2", "adv_eps": 0.5}}


def on(datasets, rows):
    """{(data set, method): what differs} of the same rows on several data sets."""
    return {(name, method): changes for name in datasets for method, changes in rows.items()}


# script: ({(data set, method): what differs}, what is measured)
MEASURED = {
    "table2": (on(["cifar10"], TABLE2), {"accuracy", "calibration", "fid"}),
    "table3": (on(["svhn", "cifar100"], M5_M10 | {"Softmax (w/ BN)": SOFTMAX,
                                                  "JEM (K=20)": JEM_K20}),
               {"accuracy", "calibration"}),
    "table5": (on(["cifar10"], ABLATION), {"accuracy", "calibration", "fid"}),
    "table7": (on(["cifar10"], TABLE2 | {"WideResNet": SOFTMAX}), {"ood", "histogram"}),
    "fig9": (on(["cifar10"], FIG9), {"robustness"}),
    "fig10_11": (on(["cifar10", "cifar100"], M5_M10 | {"Standard Softmax": SOFTMAX,
                                                       "JEM (K=20)": JEM_K20}), {"calibration"}),
    "fig3_4_12": (on(["cifar10", "svhn", "cifar100"], {"JEM++ (M=10)": {}}), {"samples"}),
    "fig6": (on(["cifar10"], {"JEM++ (M=10)": {"keep_every": 10}}), {"accuracy", "fid"}),
    "fig13_22": (on(["cifar10"], {"JEM++ (M=10)": {}}), {"best_worst"}),
}
MEASURED["table2"][0]["cifar10", "WRN w/ BN"] = SOFTMAX
CURVES = {"M=5": {"n_steps": 5}, "M=10": {}, "M=20": {"n_steps": 20},
          "M=10, w/o proximity": {"eps": math.inf}, "JEM, K=20": JEM_K20}

# A run takes no time and finishes; what any program is called with is kept.
STUB = """#!/usr/bin/env bash
case $1 in *.py) ;; *) exec "$REAL_PYTHON" "$@" ;; esac
printf '%s\\x1f' "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
while [ $# -gt 1 ]; do
    case $1 in
        --run_dir) mkdir -p "$2"
                   echo '{"kind": "end", "reason": "finished"}' > "$2/train.jsonl"
                   touch "$2/best.pt" "$2/epoch_0010.pt" ;;
        --results) touch "$2" ;;
    esac
    shift
done
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A function: the commands of a script at SCALE=paper, [(program, words)], none of them run."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "scripts", folder / "scripts")  # where no .venv goes before the stub
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(STUB)
    (folder / "bin" / "python").chmod(0o755)
    ours = ("SCALE", "SEEDS", "DATA", "RUNS", "OUT", "DATASETS", "KEEP")
    env = {k: v for k, v in os.environ.items() if k not in ours}
    env |= {"PATH": f"{folder / 'bin'}:{env['PATH']}", "REAL_PYTHON": sys.executable}

    def commands(name):
        log = folder / f"{name}.calls"
        done = subprocess.run(["bash", f"scripts/{name}.sh"], cwd=folder, text=True, timeout=120,
                              env=env | {"CALLS": str(log), "RUNS": f"runs/{name}"},
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]
        return [(program, words) for program, *words in lines]

    return commands


def runs_of(commands):
    """{run folder: (data set, what differs from JEM++ on it)} of the training commands."""
    runs, beside = {}, {"run_dir", "data_root", "seed", "on_divergence"}
    for program, words in commands:
        if program == "train_jempp.py":
            args = vars(cli.train_args(words))
            defaults = vars(cli.train_args(["--dataset", args["dataset"]]))
            runs[args["run_dir"]] = args["dataset"], {
                k: v for k, v in args.items() if v != defaults[k] and k not in beside}
    return runs


def differing(changes):
    """``changes`` without what the default says already (M = 10)."""
    return {k: v for k, v in changes.items() if (k, v) != ("n_steps", 10)}


@pytest.mark.parametrize("name", MEASURED)
def test_every_row_of_a_script_is_trained_and_measured_by_the_papers_flags(calls, name):
    expected, measures = MEASURED[name]
    commands = calls(name)
    runs, found = runs_of(commands), {}
    options = cli.evaluation_args(["--load_path", "x", "--eval", "ood"], evaluations.EVALUATIONS)[0]
    for words in [words for program, words in commands if program == "eval_jempp.py"]:
        own, typed = cli.evaluation_args(words, evaluations.EVALUATIONS)
        dataset, changes = runs[str(Path(own.load_path[0]).parent)]
        found[dataset, own.method] = changes
        softmax_has_no_samples = own.method == "WRN w/ BN"
        assert set(own.eval) == (measures - {"fid"} if softmax_has_no_samples else measures)
        assert own.splits == ["test"] and typed.keys() <= {"data_root"}
        changed = {k for k, v in vars(own).items() if v != getattr(options, k)}
        assert changed <= {"load_path", "eval", "results", "labels", "method", "splits",
                           "features"}
    assert found == {row: differing(changes) for row, changes in expected.items()}


def test_figure_5_draws_the_papers_five_models(calls):
    commands = calls("fig5")
    runs = runs_of(commands)
    (words,) = [words for program, words in commands if program == "scripts/figures.py"]
    lines = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "--line"}
    assert {label: runs[run] for label, run in lines.items()} == {
        label: ("cifar10", changes) for label, changes in CURVES.items()}


def test_figures_2_7_and_8_draw_the_papers_three_data_sets(calls):
    words = [words for _, words in calls("fig2_7_8")]
    assert [line[line.index("--dataset") + 1] for line in words] == ["cifar10", "cifar100", "svhn"]


def test_table_4_times_the_papers_network_and_its_ten_samplers(calls):
    ((_, words),) = [c for c in calls("table4_speed") if c[0] == "scripts/benchmark_table4.py"]
    words = [word for i, word in enumerate(words)
             if not {"--results", "--name"} & {*words[max(0, i - 1):i + 1]}]
    defaults, found = vars(cli.train_args([])), {}
    for row, flags in benchmark_table4.ROWS.items():
        args = vars(cli.train_args([*words, *flags]))
        found[row] = {k: v for k, v in args.items() if v != defaults[k]}
    schedule = ("n_epochs", "decay_epochs", "decay_rate")  # what no step's time depends on
    jem = {k: v for k, v in found.pop("JEM").items() if k not in schedule}
    assert jem == {k: v for k, v in JEM_K20.items() if k not in schedule}
    assert found == {
        f"JEM++ M={m} N={n}": {k: v for k, v in (("n_steps", m), ("in_steps", n))
                               if v != defaults[k]} for m in (5, 10, 20) for n in (5, 10, 20)}


# -- training -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, flipped", [("cifar10", True), ("cifar100", True), ("svhn", False)])
def test_svhn_is_not_mirrored_and_cifar_is(name, flipped):
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[..., 16:] = 255  # dark at the left
    data = TrainData(Images(images, torch.zeros(64).long()), SPECS[name], batch_size=64,
                     sigma=0.03, seed=1)
    x_pos, (x_lab, _) = data.batch(0)
    for x in (x_pos, x_lab):
        mirrored = x[..., :8].mean((1, 2, 3)) > 0
        assert (mirrored.any() and not mirrored.all()) if flipped else not mirrored.any()


def test_a_fresh_chain_starts_from_a_class_drawn_by_its_frequency():
    """In unbalanced data: 90 dark images, 10 bright ones."""
    y = torch.tensor([0] * 90 + [1] * 10)
    x = (255 * y)[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8)
    p0 = ClassGaussians.fit(x, y, 2)
    buffer = ReplayBuffer(torch.zeros(20, 3, 2, 2), 2)
    n = 4000
    x_0, *_ = buffer.draw(n, p0, 1.0, host=generator("cpu", 0), generator=generator("cpu", 1))
    bright = (x_0.mean((1, 2, 3)) > 0).double().mean().item()
    assert bright == pytest.approx(0.1, abs=5 * math.sqrt(0.1 * 0.9 / n))  # 5 standard errors


# -- evaluation -----------------------------------------------------------------------------------
def options(*words):
    """All settings of an evaluation; the network is WRN-10-1 on digits."""
    own, typed = cli.evaluation_args(["--load_path", "x", "--eval", "fid", "--dataset", "digits",
                                      "--num_threads", "1", *words], evaluations.EVALUATIONS)
    return cli.evaluation_settings(None, typed, own)


def subject(settings, buffer=None):
    torch.manual_seed(0)
    opened = SimpleNamespace(model=JEM.build(depth=10, width=1), buffer=buffer, args=None)
    return Subject(opened=opened, label="m", **named_by(Subject, settings)
                   | {"device": torch.device("cpu")})


def measured(evaluation, settings, subject, out):
    """The numbers of an evaluation under these settings."""
    return list(evaluation(subject, out, **named_by(evaluation, settings)))


class Kept:
    """An Output that keeps what it is given."""

    def __init__(self):
        self.figures = {}

    def figure(self, name, figure):
        self.figures[name] = figure

    def npz(self, name, **arrays):
        pass


def test_fid_compares_with_training_and_test_images_by_default(monkeypatch, tmp_path):
    sizes = {True: 5, False: 1}

    def load(name, root, *, train, **more):
        return Images(torch.zeros(sizes[train], 3, 2, 2, dtype=torch.uint8), None)

    monkeypatch.setattr(sample_evaluations, "load", load)
    settings = options("--data_root", str(tmp_path))
    assert settings["reference"] == "train+test"
    real = sample_evaluations.reference_statistics(
        subject(settings), settings["reference"], "0" * 64, lambda x: x.flatten(1).numpy())
    assert real.n == 6


def judged(monkeypatch, tmp_path, *words, n=300):
    """(the images that Inception is shown of a buffer of n, the records), nothing downloaded."""
    grey = torch.arange(n)
    colours = torch.stack([grey % 200, grey // 200, torch.zeros(n)], 1)  # image i is colour i
    buffer = (colours / 127.5 - 1)[:, :, None, None].expand(-1, -1, 16, 16)
    shown = []

    def outputs(network, x, batch_size):
        shown.append(x[:, :2, 0, 0].long())
        random = generator("cpu", len(x))
        features = torch.rand(len(x), 4, generator=random, dtype=torch.float64).numpy()
        return features, torch.full((len(x), 8), 1 / 8, dtype=torch.float64).numpy()

    reference = Images(torch.zeros(50, 3, 16, 16, dtype=torch.uint8), None)
    monkeypatch.setattr(sample_evaluations, "load", lambda *a, **k: reference)
    monkeypatch.setattr(generation, "inception", lambda *a: (torch.nn.Identity(), "0" * 64))
    monkeypatch.setattr(generation, "inception_outputs", outputs)
    args = options("--data_root", str(tmp_path), "--kid_subset_size", "20", *words)
    numbers = measured(evaluations.fid, args, subject(args, buffer), Kept())
    (images,) = [x for x in shown if len(x) != 100]  # 100: the reference
    return (images[:, 1] * 200 + images[:, 0]).tolist(), numbers


def test_fid_and_inception_score_judge_every_image_of_the_buffer(monkeypatch, tmp_path):
    images, numbers = judged(monkeypatch, tmp_path)
    assert sorted(images) == list(range(300))
    assert {n.metric: n.n for n in numbers} == {"is_mean": 300, "is_std": 300, "fid": 300,
                                                "kid": 300}


def test_the_inception_score_has_ten_splits_by_default(monkeypatch, tmp_path):
    seen = []

    def score(probabilities, splits):
        seen.append((len(probabilities), splits))
        return 1.0, 0.0

    monkeypatch.setattr(generation, "inception_score", score)
    judged(monkeypatch, tmp_path)
    assert seen == [(300, 10)]


def test_best_images_have_the_highest_score_and_worst_the_lowest(monkeypatch):
    n = 30
    x = torch.arange(n).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)  # grey i
    predicted = torch.arange(n) % 2
    log_p_x, log_p_y = torch.arange(n).double(), -torch.arange(n).double()
    monkeypatch.setattr(sample_evaluations, "by_class", lambda s, x: (predicted, log_p_y, log_p_x))
    monkeypatch.setattr(plots, "image_rows", lambda rows, *more: [
        (((row[:, 0, 0, 0] + 1) * 127.5).round().long()).tolist() for row in rows])
    s, out = subject(options()), Kept()
    s.generated = lambda: (x, {})
    assert list(evaluations.best_worst(s, out)) == []
    highest = [list(range(28, 8, -2)), list(range(29, 9, -2))]
    lowest = [list(range(0, 20, 2)), list(range(1, 21, 2))]
    assert {name: rows[:2] for name, rows in out.figures.items()} == {
        "best_p_x": highest, "worst_p_x": lowest, "best_p_y": lowest, "worst_p_y": highest}


@pytest.mark.parametrize("steps", (40, 10))
def test_the_steps_of_pgd_are_two_and_a_half_radii_long_in_all(monkeypatch, steps):
    seen = []

    def attack(model, x_0, labels, radius, norm, *, steps, start, rel_stepsize):
        seen.append((steps, rel_stepsize))
        return x_0

    monkeypatch.setattr(robustness, "foolbox_pgd", attack)
    settings = options("--attacks", "pgd", "--attack_steps", str(steps), "--n_attack", "8")
    s = subject(settings)
    x = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    y = s.model(torch.full((8, 3, 16, 16), -1.0)).argmax(1)
    s.images = lambda *a: Images(x, y)
    records = measured(evaluations.robust, settings, s, Kept())
    assert {r.protocol["rel_stepsize"] for r in records} == {2.5 / steps}
    robustness.pgd_accuracy(s.model, x, y, [0.0, 8.0], "linf", steps=steps)  # its own default
    assert len(seen) > 2 and set(seen) == {(steps, 2.5 / steps)}
