#!/usr/bin/env python3
"""Figures that span runs or need none: class centres, learning curves, evolution, robustness.

    python scripts/figures.py p0 --dataset cifar10 --out p0.png                     # Figs 2, 7, 8
    python scripts/figures.py curves --line M=10 runs/a runs/b --out fig5.png       # Fig. 5
    python scripts/figures.py evolution --records fig6.jsonl --out fig6.png         # Fig. 6
    python scripts/figures.py robustness --records fig9.jsonl --out fig9            # Fig. 9
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from samplers import ClassGaussians  # noqa: E402
from utils import (  # noqa: E402
    flags,  # noqa: E402
    plots,
    program,
)
from utils.data import load, spec_of  # noqa: E402
from utils.files import records  # noqa: E402
from utils.seeding import seed_step  # noqa: E402


def p0(args):
    """Class centres (left) and nine draws of each class Gaussian; at most 20 classes."""
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
    """Test accuracy against epoch: a line a run, a colour a model, a cross where one diverged."""
    figure, axis = plots.plt.subplots(figsize=(6, 4))
    for number, (label, *runs) in enumerate(args.line):
        for k, run in enumerate(runs):
            log = records.read_jsonl(Path(run) / "train.jsonl")
            if not log:
                raise program.InputError(f"{run} holds no train.jsonl")
            points = [(r["epoch"], 100 * r["test_accuracy"]) for r in log if r["kind"] == "eval"]
            epochs, accuracy = zip(*points, strict=True) if points else ((), ())
            axis.plot(epochs, accuracy, ".-", color=f"C{number}", alpha=0.8,
                      label=label if k == 0 else None)
            if log[-1].get("reason") == "diverged":
                at = log[-1]["step"] / log[0]["steps_per_epoch"]
                axis.plot([at], [accuracy[-1] if accuracy else 0], "x", color=f"C{number}",
                          markersize=9, markeredgewidth=2)
    axis.set(xlabel="epoch", ylabel="test accuracy, %",
             title=f"{log[0]['args']['dataset']}, {log[0]['network']}, "
                   f"{log[0]['n_train']} images (x: diverged)")
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    plots.save_figure(args.out, figure)


def evolution(args):
    """Accuracy and each image metric there is against epoch, one panel a metric."""
    series = defaultdict(dict)
    for r in records.read_jsonl(args.records):
        if r["metric"] in ("accuracy", "is_mean", "fid", "kid", "fd_features"):
            series[r["metric"]][r["checkpoint"]["epoch"]] = r["value"]
    if not series:
        raise program.InputError(f"{args.records} holds no accuracy or image metric")
    figure, axes = plots.plt.subplots(1, len(series), figsize=(3.2 * len(series), 2.8),
                                      squeeze=False)
    for axis, (metric, points) in zip(axes[0], series.items(), strict=True):
        axis.plot(*zip(*sorted(points.items()), strict=True), "o-")
        axis.set(xlabel="epoch", title=metric)
        axis.grid(alpha=0.3)
    plots.save_figure(args.out, figure)


def robustness(args):
    """Accuracy against budget, a line a method and attack (latest record of each point)."""
    lines = defaultdict(lambda: defaultdict(dict))
    n = 0
    for r in records.read_jsonl(args.records):
        if r["metric"] == "robust_accuracy":
            p, n = r["protocol"], r["n"]
            lines[p["norm"]][r["method"], p["attack"]][p.get("eps_255", p.get("eps"))] = r["value"]
    for norm, curves_of in lines.items():
        points = {key: tuple(zip(*sorted(line.items()), strict=True))
                  for key, line in curves_of.items()}
        plots.save_figure(f"{args.out}_{norm}.png", plots.robustness_curves(
            points, norm, f"Accuracy under attack, n = {n}"))


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("figure", choices=("p0", "curves", "evolution", "robustness"))
    p.add_argument("--out", required=True, help="the picture (robustness: without _linf.png)")
    p.add_argument("--records", default=None, help="a results file")
    p.add_argument("--line", nargs="+", action="append", default=[], metavar="LABEL RUN...",
                   help="a label and its run folders; may be repeated")
    flags.add_data(p)
    args = p.parse_args(argv)
    if args.figure == "curves" and not any(len(words) > 1 for words in args.line):
        raise program.InputError("curves: name runs with --line LABEL RUN...")
    if args.figure in ("evolution", "robustness") and not args.records:
        raise program.InputError(f"{args.figure}: name a results file with --records")
    draw = {"p0": p0, "curves": curves, "evolution": evolution, "robustness": robustness}
    draw[args.figure](args)
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
