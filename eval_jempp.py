#!/usr/bin/env python3
"""Evaluate checkpoints: ours, and the released files of JEM, JEM++ and SADA-JEM.

    python eval_jempp.py --load_path runs/quickstart/best.pt --eval accuracy calibration ood

Model, data and sampler settings come from the checkpoint; what is typed overrides them and is
recorded. Each number becomes one JSON line in --results, raw scores and pictures lie beside it.
Exit codes: 0 done (what could not be measured is said in a line each), 2 bad input.
"""

import argparse
import os
import re
import time
from pathlib import Path

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox would insist on a git binary

import train_jempp
from utils import checkpoint, cli, distributed, machine, ood, plots, records
from utils.evaluations import EVALUATIONS, skip
from utils.subject import Output, Subject

DIST_TIMEOUT = 30  # minutes that a process may be busy with its share while others wait
MACHINE = {"device", "num_threads", "channels_last", "data_root", "download"}


def parse_args(argv=None):
    p = cli.parser(__doc__.splitlines()[0])
    p.add_argument("--load_path", nargs="+", required=True, metavar="FILE", help="checkpoints")
    p.add_argument("--eval", nargs="+", required=True, choices=EVALUATIONS, metavar="NAME",
                   help=", ".join(EVALUATIONS))
    p.add_argument("--results", default=None, metavar="OUT.jsonl",
                   help="append records here (eval/results.jsonl beside the first checkpoint)")
    p.add_argument("--labels", nargs="+", default=None, help="names of the checkpoints in pictures")
    p.add_argument("--method", default=None, help="method in the records (from the arguments)")
    g = p.add_argument_group("protocol")
    g.add_argument("--n_images", type=cli.POSITIVE, default=None, metavar="n",
                   help="first n images of each real set (all)")
    g.add_argument("--splits", nargs="+", choices=("train", "valid", "test"),
                   default=["train", "valid", "test"], help="of accuracy")
    g.add_argument("--sigma", type=cli.number(float, 0), default=0.0, metavar="σ",
                   help="input noise (the released evaluation adds 0.03, the tables have none)")
    g.add_argument("--bins", type=cli.POSITIVE, default=20, help="of the ECE (Eq. 16)")
    g.add_argument("--ood", nargs="+", metavar="NAME",
                   default=["svhn", "interp", "cifar10", "cifar100", "celeba", "uniform",
                            "constant"], help="out sets; folder:PATH for your own images")
    g.add_argument("--attacks", nargs="+", choices=("pgd", "margin", "autoattack"),
                   default=["pgd", "margin"], help="of robustness")
    g.add_argument("--eps_linf", nargs="*", type=cli.number(float, 0), metavar="ε·255",
                   default=[2, 4, 8, 16, 30], help="L-inf budgets")
    g.add_argument("--eps_l2", nargs="*", type=cli.number(float, 0), metavar="ε",
                   default=[0.25, 0.5, 1, 2], help="L2 budgets in [0, 1] images")
    g.add_argument("--attack_steps", type=cli.POSITIVE, default=40, help="of PGD and margin")
    g.add_argument("--attack_restarts", type=cli.POSITIVE, default=5, help="of margin")
    g.add_argument("--n_attack", type=cli.NATURAL, default=300, metavar="n",
                   help="attack the first n test images; 0: all")
    g = p.add_argument_group("generated images")
    g.add_argument("--source", choices=("buffer", "scratch"), default="buffer",
                   help="judge the replay buffer or fresh chains")
    g.add_argument("--n_samples", type=cli.POSITIVE, default=None, metavar="n",
                   help="how many (buffer: all; scratch: 1000)")
    g.add_argument("--chain_steps", type=cli.POSITIVE, default=1000, metavar="M",
                   help="outer steps of chains from scratch")
    g.add_argument("--chain_batch", type=cli.number(int, 2), default=100,
                   help="chains that share their batch statistics")
    g.add_argument("--top", type=cli.number(float, high=1, above=0), default=1.0,
                   help="fraction per predicted class kept by p(y|x) before FID")
    g.add_argument("--reference", choices=("train", "train+test", "test"), default="train+test",
                   help="real images of FID (the paper's: train+test)")
    g.add_argument("--is_splits", type=cli.POSITIVE, default=10, help="of the Inception Score")
    g.add_argument("--kid_subsets", type=cli.POSITIVE, default=100)
    g.add_argument("--kid_subset_size", type=cli.number(int, 2), default=1000)
    g.add_argument("--inception_weights", default=None, metavar="FILE",
                   help="pt_inception-2015-12-05-6726825d.pth (torch hub's cache or download)")
    g.add_argument("--features", default=None, metavar="FILE",
                   help="a checkpoint whose penultimate features judge images (fd_features)")
    g = p.add_argument_group("run")
    g.add_argument("--batch_size", type=cli.POSITIVE, default=500, help="images a pass")
    g.add_argument("--seed", type=cli.NATURAL, default=0, help="of noise, chains and attacks")
    g.add_argument("--dry_run", action="store_true", help="print the resolved options and stop")
    own = set(vars(p.parse_args(["--load_path", "x", "--eval", "accuracy"])))
    cli.add_data_flags(p)
    cli.add_sampler_flags(p)
    cli.add_device_flags(p)
    for action in p._actions:
        if action.dest not in own and action.dest != "help":
            action.default = argparse.SUPPRESS  # absent unless typed: the checkpoint decides
    args = p.parse_args(argv)
    if args.labels and len(args.labels) != len(args.load_path):
        raise cli.InputError(f"{len(args.labels)} --labels for {len(args.load_path)} checkpoints")
    ood.check_names(args.ood)
    typed = {k: v for k, v in vars(args).items() if k not in own}
    return argparse.Namespace(**{k: v for k, v in vars(args).items() if k in own}), typed


def settings_of(opened, own, typed):
    """The options in force for one checkpoint: defaults, its own, then what was typed."""
    if opened.args is None and "dataset" not in typed:
        raise cli.InputError(f"{opened.path} is a released file, which does not say what it was "
                             "trained on: type --dataset")
    if opened.args is None:
        cli.say(f"{opened.path} holds no arguments: the paper's sampler settings are used where "
                "none are typed" + ("" if opened.buffer is not None else "; it holds no buffer"))
    saved = {k: float(v) if v in ("inf", "-inf") else v for k, v in (opened.args or {}).items()
             if k not in MACHINE}
    base = vars(train_jempp.parse_args(
        ["--dataset", typed["dataset"]] if "dataset" in typed else []))
    if "dataset" in typed and typed["dataset"] != saved.get("dataset"):
        for name in ("image_size", "n_valid", "n_train"):  # those are another data set's
            saved.pop(name, None)
    merged = argparse.Namespace(**base | saved | typed | vars(own))
    for name in ("image_size", "n_valid"):  # typed as such, or not at all
        if getattr(merged, name) is None:
            setattr(merged, name, base[name])
    saved_root = (opened.args or {}).get("data_root")
    if "data_root" not in typed and isinstance(saved_root, str) and Path(saved_root).is_dir():
        merged.data_root = saved_root
    cli.check_sampler(merged)
    return merged


def overrides_of(opened, typed):
    """What was typed against the checkpoint, for the record."""
    saved = opened.args or {}
    return {k: v for k, v in typed.items()
            if k not in MACHINE and saved.get(k) != cli.jsonable(v)}


def method_of(opened, own):
    """A word for the records: what kind of training the checkpoint comes from."""
    if own.method:
        return own.method
    a = opened.args
    if a is None:
        return "released file"
    if not a.get("p_x_weight") and not a.get("p_x_y_weight"):
        return "softmax"
    return f"{'jempp M' if a.get('in_steps') else 'jem K'}={a.get('n_steps')}"


def training_of(opened):
    """How the checkpoint was trained, for the record; None for a released file."""
    if opened.args is None:
        return None
    trained = {name: opened.args.get(name) for name in records.TRAINING}
    return trained | {"step": opened.step}


def label_of(path):
    """runs/quickstart/best.pt -> quickstart-best"""
    path = Path(os.path.abspath(path))
    return os.fsencode(f"{path.parent.name}-{path.stem}").decode(errors="replace")


def unique(names):
    """``names`` with -2, -3, ... behind those that stood there before: they name files."""
    seen, result = {}, []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return result


def main(argv=None):
    own, typed = parse_args(argv)
    if own.dry_run:
        cli.print_json(vars(own) | typed)
        return cli.EXIT_OK
    device = machine.pick_device(typed.get("device", "auto"), typed.get("num_threads", 0))
    machine.set_precision(deterministic=typed.get("deterministic", False))
    distributed.start(device, DIST_TIMEOUT)
    results = Path(own.results or Path(own.load_path[0]).parent / "eval" / "results.jsonl")
    records.read_jsonl(results)  # a file of another kind is not appended to
    labels = unique(own.labels or [label_of(path) for path in own.load_path])
    stems = unique([re.sub(r"[^\w.+=-]+", "_", label) for label in labels])
    subjects = []
    for path, label in zip(own.load_path, labels, strict=True):
        opened = checkpoint.open_any(path)
        subjects.append(Subject(opened, settings_of(opened, own, typed), label, device))
    env = records.environment(device)
    results.parent.mkdir(parents=True, exist_ok=True)
    if distributed.rank() == 0:
        with open(results, "a"):  # what cannot be written is told before anything is measured
            pass
    curves, measured, left_out = {}, False, None
    for name in own.eval:
        for s, stem in zip(subjects, stems, strict=True):
            started = time.monotonic()
            try:
                for number in EVALUATIONS[name](s, Output(results.parent, stem)):
                    report(number, s, typed, own, env, time.monotonic() - started, results)
                    if number.metric == "robust_accuracy":
                        collect(curves, s.label, number)
                measured = True
            except cli.Unavailable as error:  # bad input, on the other hand, ends the command
                skip(f"{name} of {s.label}", error)
                left_out = error
    for norm, lines in curves.items():
        n = max(number_n for _, _, number_n in lines.values())
        Output(results.parent, "robustness").figure(norm, plots.robustness_curves(
            {key: (eps, accuracy) for key, (eps, accuracy, _) in lines.items()}, norm,
            f"Accuracy under attack, n = {n}"))
    distributed.barrier()
    if left_out and not measured:
        raise cli.InputError("nothing could be measured, for the reasons above")
    cli.say(f"records in {results}, pictures and raw scores beside it")
    return cli.EXIT_OK


def report(number, s, typed, own, env, seconds, results):
    """One number: a line on the terminal and a record appended to the results."""
    if distributed.rank():
        return
    o = s.opened
    records.append_jsonl(results, {
        "metric": number.metric, "value": number.value, "unit": number.unit, "n": number.n,
        "protocol": number.protocol,
        "checkpoint": {"path": o.path, "sha256": o.sha256, "step": o.step, "epoch": o.epoch},
        "overrides": overrides_of(o, typed), "method": method_of(o, own), "label": s.label,
        "training": training_of(o),
        "dataset": s.args.dataset, "seed": own.seed, "env": env, "seconds": round(seconds, 3),
        "time": records.now()})
    shown = {k: v for k, v in number.protocol.items()
             if k in ("split", "score", "out", "attack", "norm", "eps", "eps_255", "source",
                      "selection", "reference")}
    cli.say(f"{s.label:24s} {number.metric:16s} {number.value:10.5g} {number.unit:9s} "
            f"n={number.n:<6d} {' '.join(f'{k}={v}' for k, v in shown.items())}")


def collect(curves, label, number):
    """Add a point to the curve of its norm, checkpoint and attack."""
    protocol = number.protocol
    key = label, protocol["attack"]
    line = curves.setdefault(protocol["norm"], {}).setdefault(key, ([], [], number.n))
    line[0].append(protocol.get("eps_255", protocol.get("eps")))
    line[1].append(number.value)


if __name__ == "__main__":
    cli.run(main)
