"""Resolves flags that depend on each other, and refuses combinations that do not fit."""

import argparse
import contextlib
import json
import math
from pathlib import Path

import torch

from models import JEM, NETWORKS, network_words
from samplers.pyld import is_affine
from utils import distributed, flags, machine
from utils.data import spec_of
from utils.files.checkpoint import sha256_of
from utils.files.records import jsonable, read_json
from utils.own_images import is_own
from utils.program import InputError, parser, say

# Flags that a resumed run may change. They only say how far, how often or on what to run. The
# guard's bounds are among them: they change no step, only which steps are undone. Otherwise a run
# that the guard ended could not continue. Each resume line of train.jsonl records the bounds.
FREE = {"max_steps", "max_minutes", "ckpt_steps", "print_every", "keep_every", "on_divergence",
        "max_rollbacks", "num_threads", "run_dir", "data_root", "download", "device", "dry_run",
        "compile", "fast", "cudnn_benchmark", "batch_size", "accumulate", "dist_timeout",
        "max_loss", "max_gap", "max_saturated", "min_accuracy_ratio", "good_after"}
# Flags that a resumed run may change if the learning rates of all past steps stay the same.
SCHEDULE = {"n_epochs", "decay_epochs"}
# Settings that belong to a data set.
DATA = ("image_size", "n_valid", "n_train", "labels_per_class", "pad", "flip", "class_names")
# Flags that name a run in the records. Every run that was ever saved has them.
ALWAYS = {"dataset", "depth", "width", "in_steps", "n_steps"}
# Flags of the machine. An evaluation does not take them from the checkpoint.
MACHINE = {"device", "num_threads", "channels_last", "data_root", "download"}


def train_parser():
    """The parser of train_jempp.py."""
    p = parser("Train JEM++: Algorithm 2 of Yang & Ji, ICCV 2021.")
    for add in (flags.add_data, flags.add_model, flags.add_sampler, flags.add_train,
                flags.add_device, flags.add_speed):
        add(p)
    return p


def train_args(argv=None):
    """The resolved arguments of a training command. InputError if they do not fit together."""
    return resolve(train_parser().parse_args(argv))


def evaluation_args(argv, evaluations):
    """Parse an evaluation command into (protocol, overrides).

    ``protocol`` is a Namespace of the flags that only eval_jempp.py has. ``overrides`` is a dict of
    the other typed flags, which override the checkpoint's.
    """
    p = parser("Evaluate checkpoints: ours, and the released files of JEM, JEM++ and SADA-JEM.")
    flags.add_evaluation(p, evaluations)
    alone = evaluation_defaults(evaluations)
    for add in (flags.add_data, flags.add_sampler, flags.add_device):
        add(p, typed_only=True)
    args = vars(p.parse_args(argv))
    if args["labels"] and len(args["labels"]) != len(args["load_path"]):
        raise InputError(f"{len(args['labels'])} --labels for {len(args['load_path'])} checkpoints")
    if args["sigma"] and "robustness" in args["eval"]:
        raise InputError("--sigma does not go with --eval robustness: attacks stay in the image "
                         "box, noise leaves it. Evaluate robustness in a command without it")
    if (args["conditional"] or args["y"]) and args["source"] != "scratch":
        raise InputError("--conditional and --y are for fresh chains: add --source scratch")
    protocol = argparse.Namespace(**{k: v for k, v in args.items() if k in alone})
    return protocol, {k: v for k, v in args.items() if k not in alone}


def evaluation_defaults(evaluations):
    """The values of the flags that only eval_jempp.py has, where none is typed."""
    p = parser("")
    flags.add_evaluation(p, evaluations)
    return vars(p.parse_args(["--load_path", "x", "--eval", next(iter(evaluations))]))


def evaluation_settings(saved, typed, protocol):
    """All settings for evaluating one checkpoint, as a dict.

    Later sources override earlier ones: the defaults, the file's arguments ``saved`` (or None), the
    ``typed`` flags, and ``protocol``.
    """
    if saved is not None:
        check_values(saved)
    saved_root = (saved or {}).get("data_root")
    saved = {k: float(v) if v in ("inf", "-inf") else v for k, v in (saved or {}).items()
             if k not in MACHINE}
    defaults = vars(train_args(["--dataset", typed["dataset"]] if "dataset" in typed else []))
    if "dataset" in typed and typed["dataset"] != saved.get("dataset"):
        for name in DATA:  # they belong to the other data set
            saved.pop(name, None)
    merged = defaults | saved | typed | vars(protocol)
    for name in ("image_size", "n_valid"):  # None means the data set's default
        if merged[name] is None and not is_own(merged["dataset"]):
            merged[name] = defaults[name]
    if saved and "class_names" not in saved and "dataset" not in typed:  # an older run's
        merged["class_names"] = list(spec_of(merged["dataset"]).names)
    if "data_root" not in typed and isinstance(saved_root, str) and Path(saved_root).is_dir():
        merged["data_root"] = saved_root
    check_sampler(argparse.Namespace(**merged))
    return merged


def print_json(options):
    """``--dry_run``: the resolved options, sorted, as JSON (infinity as the string "inf")."""
    say(json.dumps(jsonable(options), indent=2, sort_keys=True))


def resolve(args):
    """Fill in values that depend on other flags. InputError if flags do not fit together."""
    spec = spec_of(args.dataset)
    resolve_data(args, spec)
    resolve_network(args)
    args.lr = args.lr or {"sgd": 0.1, "adam": 1e-4}[args.optimizer]
    args.adv_eps = args.adv_eps or {"linf": 8.0, "l2": 0.5}.get(args.adversarial)
    machine.fill_in_switches(args)
    resolve_batches(args)
    resolve_start(args)
    check_sampler(args)
    check_together(args)
    classes = spec.n_classes if per_class(args) else 1
    if args.buffer_size < classes * n_parts(args):
        raise InputError(f"--buffer_size {args.buffer_size}: at least {classes * n_parts(args)} "
                         f"here, an image for each of {n_parts(args)} parts of a step"
                         f"{' and each class' * (classes > 1)}")
    return args


def resolve_data(args, spec):
    """Fill in the data set's defaults and the names of its classes."""
    args.image_size = spec.image_size(args.image_size)
    args.n_valid = spec.n_valid if args.n_valid is None else args.n_valid
    if args.pad is None:
        args.pad = args.image_size // 8 if spec.pad is None else spec.pad
    if args.pad >= args.image_size:
        raise InputError(f"--pad {args.pad}: images of {args.image_size} pixels are mirrored at "
                         f"their border by at most {args.image_size - 1}")
    args.flip = spec.flip if args.flip is None else args.flip
    args.class_names = list(spec.names)


def resolve_network(args):
    """Fill in the defaults of --network. Flags that it does not have are refused and stay None."""
    words = network_words(args.network)
    every = {word for name in NETWORKS for word in network_words(name)}
    for word in sorted(every):
        if word in words and getattr(args, word, None) is None:
            setattr(args, word, words[word])
        elif word not in words and getattr(args, word, None) is not None:
            raise InputError(f"--network {args.network} has no --{word}: drop it")
    check_stem(args)


def check_stem(args):
    """InputError if the flags make no network, or if PYLD's short cut is wrong for its stem."""
    try:
        with torch.device("meta"):  # takes no memory and no time
            stem = JEM.build(args.network, **network_config(args)).stem
    except ValueError as error:
        raise InputError(f"--network {args.network}: {error}") from error
    draws = args.p_x_weight or args.p_x_y_weight
    if draws and args.in_steps and not args.literal_pyld and not is_affine(stem):
        raise InputError(f"the stem of --network {args.network} is not affine, which PYLD's short "
                         "cut needs: add --literal_pyld (Algorithm 1 as written, for any stem)")


def network_config(args):
    """The arguments of the network that the flags describe, without the number of classes."""
    return {word: getattr(args, word) for word in network_words(args.network)}


def resolve_start(args):
    """Set ``load_sha256``, the hash of --load_path.

    A run that has started continues from its own checkpoint and keeps the hash that it recorded.
    The file may have been deleted or changed since.
    """
    path, run_dir = args.load_path, Path(args.run_dir)
    if path is None and (args.load_buffer or not args.load_head):
        raise InputError("--load_buffer and --no-load_head say what to take of --load_path FILE")
    if getattr(args, "load_sha256", None) or path is None:
        args.load_sha256 = getattr(args, "load_sha256", None)
        return
    saved = None
    if any(run_dir.glob("*.pt")):
        with contextlib.suppress(FileNotFoundError, ValueError):  # check_run_dir reports these
            saved = read_json(run_dir / "args.json")
    if isinstance(saved, dict) and saved.get("load_path") == path:
        args.load_sha256 = saved.get("load_sha256")
    else:
        args.load_sha256 = sha256_of(path)


def resolve_batches(args):
    """Compute --batch_size, --global_batch_size and --labelled_batch from those that were typed."""
    parts = n_parts(args)
    words = f"{distributed.world()} processes x --accumulate {args.accumulate}"
    if args.global_batch_size is None:
        args.batch_size = args.batch_size or 64
        args.global_batch_size = parts * args.batch_size
    elif args.global_batch_size % parts:
        raise InputError(f"--global_batch_size {args.global_batch_size} does not divide into "
                         f"{parts} parts ({words})")
    elif args.batch_size not in (None, args.global_batch_size // parts):
        raise InputError(f"--global_batch_size {args.global_batch_size} in {parts} parts "
                         f"({words}) is not --batch_size {args.batch_size}: type one of them")
    args.batch_size = args.global_batch_size // parts
    args.labelled_batch = args.labelled_batch or args.global_batch_size
    if args.labelled_batch % parts:
        raise InputError(f"--labelled_batch {args.labelled_batch} does not divide into {parts} "
                         f"parts ({words})")


def check_sampler(args):
    """InputError for sampler flags that do not fit together."""
    if args.in_steps == 0 and args.sgld_lr == 0:
        raise InputError("--in_steps 0 is SGLD: give its step with --sgld_lr (JEM: 1)")
    if args.in_steps and args.sgld_lr:
        raise InputError("--sgld_lr is the step of SGLD (--in_steps 0); PYLD's is --pyld_lr")


def check_together(args):
    """InputError for training flags that do not fit together."""
    if args.p_x_weight + args.p_y_given_x_weight + args.p_x_y_weight == 0:
        raise InputError("all loss weights are 0: nothing to train")
    if args.shared_batch and args.labelled_batch != args.global_batch_size:
        raise InputError("--shared_batch is one batch for p(x) and p(y|x): drop --labelled_batch")
    if args.shared_batch and args.clean_p_x:
        raise InputError("--shared_batch has no p(x) batch of its own for --clean_p_x")
    if args.shared_batch and args.labels_per_class:
        raise InputError("--shared_batch gives p(x) the labelled batch, which --labels_per_class "
                         "makes small: drop it, or --labels_per_class")
    if args.energy_l2 and not args.p_x_weight:
        raise InputError("--energy_l2 bounds the energies of log p(x), which --p_x_weight 0 leaves "
                         "out: drop one of them")
    if args.sam_adaptive and not args.sam:
        raise InputError("--sam_adaptive needs a radius: --sam ρ")
    if args.sync_bn and args.compile != "off":
        raise InputError("--sync_bn goes without compilation: add --compile off")
    if args.literal_pyld and (args.compile != "off" or args.amp != "off"):
        raise InputError("--literal_pyld is uncompiled and float32: drop --fast, --compile, --amp")
    if args.p_x_from or args.p_x_ramp:
        check_beginning(args)
    if args.load_buffer and not (args.p_x_weight or args.p_x_y_weight):
        raise InputError("--load_buffer: a run that trains p(y|x) alone has no replay buffer")
    grown = math.log2(args.lr) + len(args.decay_epochs) * math.log2(args.decay_rate)
    if grown + math.log2(args.global_batch_size) > 127:
        raise InputError("--lr times --decay_rate at all --decay_epochs is beyond float32")
    if args.nesterov and args.optimizer != "sgd":
        raise InputError("--nesterov goes with --optimizer sgd")


def check_beginning(args):
    """InputError if log p(x) never begins, or if nothing is trained before it does."""
    if args.p_x_y_weight or not args.p_x_weight:
        raise InputError("--p_x_from and --p_x_ramp say when log p(x) begins: they go with a "
                         "--p_x_weight, and without --p_x_y_weight")
    if args.p_x_from and not args.p_y_given_x_weight:
        raise InputError("--p_x_from: with --p_y_given_x_weight 0 nothing is trained before")
    if args.p_x_from >= args.n_epochs:
        raise InputError(f"--p_x_from {args.p_x_from}: with --n_epochs {args.n_epochs} log p(x) "
                         "would never begin")


def per_class(args):
    """Whether chains are drawn for given classes."""
    return args.class_cond_p_x_sample or args.p_x_y_weight > 0


def n_parts(args):
    """The number of parts, of --batch_size images each, in a step's global batch."""
    return distributed.world() * args.accumulate


def check_values(saved):
    """InputError if one of the ``saved`` arguments has a value that its flag does not accept, or
    if one is missing that every run has."""
    def refuse(message):
        raise InputError(f"a run's arguments hold a value that no flag accepts: {message[:200]}")

    p, words = train_parser(), []
    p.error = refuse
    for name in vars(p.parse_args([])).keys() & saved.keys() - MACHINE - {"run_dir", "dry_run"}:
        value = saved[name]
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    p.parse_args(words)
    if lacking := ALWAYS - saved.keys():
        raise InputError(f"a run's arguments lack {', '.join(sorted(lacking))}")
    for name in ("dataset", "network"):
        if not isinstance(saved.get(name, ""), str):
            refuse(name)
    names = saved.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse("class_names")


def completed(saved):
    """The ``saved`` arguments of a run. Flags that are newer than the run get their defaults."""
    check_values(saved)
    known = vars(train_parser().parse_args([]))
    args = argparse.Namespace(**known | saved)
    args.batch_size, args.accumulate = None, 1  # they depend on the number of processes
    return saved | {k: v for k, v in jsonable(vars(resolve(args))).items() if k not in saved}


def check_same_run(path, saved, now):
    """Refuse to continue a run under other arguments, and show the difference.

    The run's ``saved`` arguments come from ``path``. A flag that is newer than the run counts as
    its default. Returns the saved arguments, completed by such flags.
    """
    now = jsonable(now)
    try:
        before = completed(saved)
    except (InputError, TypeError, KeyError) as error:
        raise InputError(f"{path} holds arguments that are not valid here ({error}): choose "
                         "another --run_dir") from error
    if gone := sorted(before.keys() - now.keys()):
        raise InputError(f"{path} is of a run with --{', --'.join(gone)}, which this version does "
                         "not have: choose another --run_dir, or the version that made it")
    changed = [f"--{name} {before[name]} there, {now[name]} here"
               for name in sorted(now.keys() - FREE - SCHEDULE) if before[name] != now[name]]
    if changed:
        chosen = f" (--fast chose here: type --amp {before['amp']})" * (
            bool(now["fast"]) and before["amp"] != now["amp"])
        raise InputError(f"{path} is of a run with other arguments: {'; '.join(changed)}{chosen}. "
                         "Type the same ones, or choose another --run_dir")
    return before


def check_run_dir(run_dir, args):
    """InputError if ``run_dir`` holds a run with other arguments, or is a file."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run_dir {run_dir} is a file")
    path = run_dir / "args.json"
    try:
        saved = read_json(path)
    except FileNotFoundError:
        return
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise InputError(f"{path} is not what a run writes: repair it, or choose another --run_dir")
    check_same_run(path, saved, vars(args))
