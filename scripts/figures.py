#!/usr/bin/env python3
"""Figures over several runs, or without a run: centres, learning curves, evolution, robustness.

    python scripts/figures.py p0 --dataset cifar10 --out p0.png                     # Figs 2, 7, 8
    python scripts/figures.py curves runs/a runs/b --out curves.png                 # all logged
    python scripts/figures.py curves --line M=10 runs/a runs/b --out fig5.png       # Fig. 5
    python scripts/figures.py evolution --records fig6.jsonl --out fig6.png         # Fig. 6
    python scripts/figures.py robustness --records fig9.jsonl --out fig9            # Fig. 9
    python scripts/figures.py cost --out cost.png       # accuracy against operations, all models

``curves --line`` also writes its points to --records FILE, under the runs' names (--scale).
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import start  # noqa: E402

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

import torch  # noqa: E402

from models import network_name  # noqa: E402
from samplers import ClassGaussians  # noqa: E402
from scripts.operations import network_of, pflop_of, run_pflop  # noqa: E402
from scripts.tables import sources  # noqa: E402
from scripts.tables.protocol import ROWS, papers_training  # noqa: E402
from utils import flags, plots, program  # noqa: E402
from utils.data import load, spec_of  # noqa: E402
from utils.files import records  # noqa: E402
from utils.seeding import seed_step  # noqa: E402

# What a point of a curve tells of its training. The whole of it stands in the records of its row.
TOLD = {*sources.TRAINING, "network", "p_x_weight", "eps"}


def p0(args):
    """Class centres (left) and nine draws from each class Gaussian, for up to 20 classes."""
    images = load(args.dataset, args.data_root, train=True, download=args.download)
    names = spec_of(args.dataset).names
    n_classes = len(names)
    gaussians = ClassGaussians.fit(images.x, images.y, n_classes)
    shown = min(n_classes, 20)
    y = torch.arange(shown).repeat_interleave(9)
    streams = seed_step(0, 0, "p0", "cpu")
    draws = gaussians.sample(len(y), y, host=streams.host, generator=streams.device)
    rows = [torch.cat([c[None], d])
            for c, d in zip(gaussians.means()[:shown], draws.split(9), strict=True)]
    plots.save_figure(args.out, plots.image_rows(
        rows, names[:shown],
        f"{args.dataset}: class centres (left) and draws of p0"))


def curves(args):
    """Test accuracy against epoch: a line for each run, a colour for each label.

    A cross marks a divergence. The points are written to --records and replace older ones of the
    same runs. They stand for a run folder that is not there.
    """
    figure, axis = plots.plt.subplots(figsize=(6, 4))
    held = sources.read_lines(Path(args.records), no_curve) if args.records else []
    points = []
    for number, (label, *runs) in enumerate(args.line):
        for k, run in enumerate(runs):
            name = f"{args.scale}/{Path(run).name}" if args.scale else str(run)
            older = [r for r in held if r["run"] == name]
            own = list(points_of(label, run, name))
            if older and (not own or own[-1]["time"] is None):  # a run that has not ended
                own = older
            if not own:
                raise program.InputError(f"{run} holds no train.jsonl")
            draw_curve(axis, own, f"C{number}", label if k == 0 else None)
            points += own
    trained = points[0]["training"]
    axis.set(xlabel="epoch", ylabel="test accuracy, %",
             title=f"{trained['dataset']}, {network_name(trained)}, "
                   f"{trained['n_epochs']} epochs (x: diverged)")
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    plots.save_figure(args.out, figure)
    if args.records:
        drawn = {point["run"] for point in points}
        others = [r for r in held if r["run"] not in drawn]
        ended = [point for point in points if point["time"] is not None]
        records.write_jsonl(args.records, others + ended)


def no_curve(record):
    """What is wrong with a point of a curve, or None."""
    return (sources.complain_of_record(record) or sources.lacking(record, ("run",), "the record")
            or sources.lacking(record.get("checkpoint"), ("epoch",), "checkpoint"))


def overlay(args):
    """Plot everything that the runs logged, one figure for all. Runs are named by their folders."""
    logs = {}
    for run in args.runs:
        log = records.read_log(run)
        if not log:
            raise program.InputError(f"{run} holds no train.jsonl")
        name = Path(run).resolve().name
        logs[name if name not in logs else run] = log
    plots.save_figure(args.out, plots.training_curves(logs, ", ".join(logs)))


def draw_curve(axis, points, color, label):
    values = [(r["checkpoint"]["epoch"], 100 * r["value"]) for r in points
              if r["metric"] == "accuracy"]
    epochs, accuracy = zip(*values, strict=True) if values else ((), ())
    axis.plot(epochs, accuracy, ".-", color=color, alpha=0.8, label=label)
    for r in points:
        if r["metric"] == "diverged":
            axis.plot([r["checkpoint"]["epoch"]], [accuracy[-1] if accuracy else 0], "x",
                      color=color, markersize=9, markeredgewidth=2)


def points_of(label, run, name):
    """Yield the points of a run's curve: a record for each evaluation, and for a divergence.

    ``name`` is the run's in the records.
    """
    log = records.read_log(run)
    header = records.header_of(log) if log else None
    training = header and records.training_of(header["args"], None, network=header.get("network"))
    for r in log:
        found = {"metric": "accuracy", "value": r.get("test_accuracy"), "unit": "fraction"}
        epoch = r.get("epoch")
        if r.get("reason") == "diverged":
            found = {"metric": "diverged", "value": r["step"], "unit": "step"}
            epoch = r["step"] / header["steps_per_epoch"]
        if r["kind"] == "eval" or found["metric"] == "diverged":
            yield {
                **found, "n": header["n_test"],
                "protocol": {"split": "test", "sigma": 0.0, "figure": "fig5"},
                "checkpoint": {"path": str(run), "sha256": None, "step": r["step"],
                               "epoch": epoch},
                "overrides": {}, "run": name, "method": label,
                "dataset": header["args"]["dataset"],
                "seed": header["args"]["seed"],
                "training": {k: v for k, v in training.items() if k in TOLD} | {"step": r["step"]},
                "env": {k: v for k, v in header["env"].items() if k in sources.ENV},
                "seconds": None, "time": log[-1].get("time")}


def evolution(args):
    """Accuracy and all image metrics in the records against epoch, one panel for each.

    A run folder picks its checkpoints' records, wherever the folder was. Else all in the file are
    shown.
    """
    series, titles, names = defaultdict(dict), {}, {Path(run).name for run in args.runs}
    for r in measured(args.records, ("accuracy", "is_mean", "fid", "kid", "fd_features")):
        checkpoint = r.get("checkpoint") or {}
        of_run = Path(checkpoint.get("path", "")).parent.name
        if checkpoint.get("epoch") is not None and (not names or of_run in names):
            factor, unit = (100, ", %") if r["metric"] == "accuracy" else (1, "")
            series[r["metric"] + unit][checkpoint["epoch"]] = factor * r["value"]
            network = (r["training"] or {}).get("network")
            titles[", ".join(filter(None, (r["method"], r["dataset"], network)))] = None
    if not series:
        of_run = f" of {' '.join(args.runs)}" if args.runs else ""
        raise program.InputError(f"{args.records} holds no accuracy or image metric{of_run}")
    figure, axes = plots.plt.subplots(1, len(series), figsize=(3.2 * len(series), 2.8),
                                      squeeze=False)
    for axis, (metric, points) in zip(axes[0], series.items(), strict=True):
        axis.plot(*zip(*sorted(points.items()), strict=True), "o-")
        axis.set(xlabel="epoch", ylabel=metric)
        axis.grid(alpha=0.3)
    figure.suptitle("; ".join(titles), fontsize=9)
    plots.save_figure(args.out, figure)


def robustness(args):
    """Accuracy against budget, mean and spread over seeds, a line for each method and attack."""
    lines = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    measures = measured(args.records, ("robust_accuracy", "diverged", "steps"))
    found = [r for r in measures if r["metric"] == "robust_accuracy"]
    if not found:
        raise program.InputError(f"{args.records} holds no robust_accuracy")
    kept = belonging_together(sources.by_time(found))
    if len(kept) < len(found):
        program.say(f"left out: {len(found) - len(kept)} records of {args.records} that are of "
                    "another network, data set or number of images than the latest, or of a method "
                    "trained in another way than its latest")
    for r in kept:  # the latest record of a seed and point replaces earlier ones
        p = r["protocol"]
        eps = p.get("eps_255", p.get("eps"))
        lines[p["norm"]][r["method"], p["attack"]][float(eps)][sources.seed_of(r)] = r["value"]
    mark_diverged(lines, [r for r in measures if r["dataset"] == kept[-1]["dataset"]])
    for norm, curves_of in lines.items():
        points = {key: mean_and_spread(line) for key, line in curves_of.items()}
        plots.save_figure(f"{args.out}_{norm}.png", plots.robustness_curves(
            points, norm, f"Accuracy under attack, n = {kept[-1]['n']}"))


def mark_diverged(lines, measures):
    """Leave out the seeds that diverged, or say so of a method that has no other."""
    for curves_of in lines.values():
        for method, attack in list(curves_of):
            lost = sources.diverged([r for r in measures if r["method"] == method]).keys()
            points = curves_of.pop((method, attack))
            if lost >= {seed for by_seed in points.values() for seed in by_seed}:
                method += ", diverged"
            else:
                points = {eps: {seed: v for seed, v in by_seed.items() if seed not in lost}
                          for eps, by_seed in points.items()}
            curves_of[method, attack] = points


def cost(args):
    """Test accuracy against the operations of training: results/models and the paper's rows."""
    figure, axis = plots.plt.subplots(figsize=(6, 4))
    for kind, marker, points in (("paper", "s", papers_costs()), ("here", "o", our_costs())):
        for name, pflop, accuracy in points:
            axis.plot([pflop], [100 * accuracy], marker, color={"paper": "C3", "here": "C0"}[kind])
            up = 6 if name.endswith(("softmax", "(M=20)")) else -12  # neighbours lie close
            axis.annotate(name.removeprefix("cifar10_"), (pflop, 100 * accuracy), fontsize=7,
                          xytext=(0, up), textcoords="offset points", ha="center")
    axis.set(xscale="log", xlabel="training, 10¹⁵ operations (counted)",
             ylabel="CIFAR-10 test accuracy, %", title="paper (squares) and here (circles)")
    axis.xaxis.set_major_formatter(lambda pflop, _: f"{pflop:g}")
    axis.margins(x=0.15, y=0.1)
    axis.grid(alpha=0.3)
    plots.save_figure(args.out, figure)


def papers_costs():
    """Yield (row, PFLOP, accuracy) of the paper's CIFAR-10 rows that have a training here."""
    numbers, _ = sources.read_paper(ROOT / "results", ROOT / "results")
    for number in numbers:
        row = number["row"]
        if number["table"] == "table2" and number["column"] == "accuracy" and row in ROWS and (
                row.startswith("JEM++") or row == "WRN w/ BN"):
            args = papers_training(row, "cifar10")
            pflop = run_pflop(args, network_of(args), 45000, 703 * args["n_epochs"])
            yield row, pflop, number["value"]


def our_costs():
    """Yield (model, PFLOP, accuracy) of the CIFAR-10 records of results/models.

    Older records do not tell all arguments of their training, and so not its cost.
    """
    for path in sorted((ROOT / "results" / "models").glob("*/*.jsonl")):
        run = records.read_json(path.parent / "run.json") if path.stem == "records" else {}
        begun = run.get("start", {}).get("pflop", 0)  # the run that gave the first weights
        for r in measured(path, ("accuracy",)):
            trained = r["training"] or {}
            if r["dataset"] == "cifar10" and r["protocol"]["split"] == "test" and (
                    "labelled_batch" in trained):
                name = path.parent.name + ("" if path.stem == "records" else f", {path.stem}")
                yield name, begun + pflop_of(trained), r["value"]


def measured(path, metrics):
    """The records of ``metrics`` in a file. InputError names a line that is no record."""
    return [r for r in sources.read_lines(Path(path), sources.complain_of_record)
            if r["metric"] in metrics]


def belonging_together(found):
    """The records that one figure may show. ``found`` is sorted, oldest first.

    They share the data set, network and number of images of the latest record. Within a method
    they share the training settings.
    """
    def scene(r):
        t = r["training"] or {}
        return r["dataset"], r["n"], t.get("depth"), t.get("width"), t.get("n_train")

    same = [r for r in found if scene(r) == scene(found[-1])]
    methods = dict.fromkeys(r["method"] for r in same)
    return [r for method in methods for r in sources.of_row(method, found[-1]["dataset"], same)]


def mean_and_spread(line):
    """{eps: {seed: accuracy}} -> (eps, means, sample standard deviations), in order of eps."""
    values = [(eps, list(by_seed.values())) for eps, by_seed in sorted(line.items())]
    return ([eps for eps, _ in values], [statistics.mean(v) for _, v in values],
            [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in values])


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("figure", choices=("p0", "curves", "evolution", "robustness", "cost"))
    p.add_argument("runs", nargs="*", metavar="RUN",
                   help="curves: run folders whose logs to plot together; evolution: the run")
    p.add_argument("--out", type=program.path, required=True,
                   help="the picture (robustness: without _linf.png)")
    p.add_argument("--records", type=program.path, default=None,
                   help="a results file (curves: also written)")
    p.add_argument("--scale", default=None,
                   help="curves: RUN's name in the records is SCALE/FOLDER (default: its path)")
    p.add_argument("--line", nargs="+", action="append", default=[], metavar="LABEL RUN...",
                   help="a label and its run folders; may be repeated")
    flags.add_data(p)
    args = p.parse_args(argv)
    if args.figure == "curves" and bool(args.runs) == any(len(words) > 1 for words in args.line):
        raise program.InputError("curves: name runs (RUN...), or the lines of Fig. 5 (--line LABEL "
                                 "RUN...)")
    if args.runs and args.figure not in ("curves", "evolution"):
        raise program.InputError(f"{args.figure} takes no run folders: drop {args.runs[0]}")
    if args.figure in ("evolution", "robustness") and not args.records:
        raise program.InputError(f"{args.figure}: name a results file with --records")
    draw = {"p0": p0, "curves": overlay if args.runs else curves, "evolution": evolution,
            "robustness": robustness, "cost": cost}
    draw[args.figure](args)
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
