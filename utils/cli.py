"""Flags, one spelling each, in groups that both scripts share; and one clear line for bad input.

The defaults are the paper's main run: CIFAR-10, WRN-28-10, PYLD-10-5. Names are the released
code's; the paper's symbols are the metavars.
"""

import argparse
import json
import math
import os
import sys
import threading
import time
import traceback

EXIT_OK, EXIT_INPUT, EXIT_DIVERGED, EXIT_STOPPED = 0, 2, 3, 75


class InputError(Exception):
    """Something the user typed or has on disk is wrong; the message says what to do about it."""

    of_one_process = False  # of those of a node, where otherwise all find the same


class Unavailable(InputError):
    """Something that is not here now, a data set or a weights file; what needs it is left out."""


def run(main):
    """Exit with ``main()``'s code; bad input and file trouble become one line and code 2."""
    threading.excepthook = quiet_thread
    try:
        code = exit_code(main, os.path.basename(sys.argv[0]))
    except Exception:  # hidden from nobody: raised, or its traceback printed; only the exit is ours
        if not launched():
            raise
        traceback.print_exc()
        code = 1  # at once, or the others' word that this process is gone comes first
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads and the interpreter's end can wait for each other for ever
    sys.exit(code)


def exit_code(main, program):
    """``main()``'s code, or that of what went wrong, said in one line; what is no fault of the
    user's or the machine's is raised."""
    try:
        code = main()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0" and not error.of_one_process:
            time.sleep(3)  # most are everybody's: torchrun ends us once the first has said it
        print(f"{program}: error: {error}", file=sys.stderr)
        code = EXIT_INPUT
    except BrokenPipeError:  # whoever read our output has read enough, as in "... | head"
        mute()
        code = 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command starts over or goes on", file=sys.stderr)
        code = EXIT_STOPPED
    except RuntimeError as error:
        if lost_a_process(error):
            print(f"{program}: error: another process of this job is gone or silent: the same "
                  f"command goes on from the last checkpoint [{str(error).splitlines()[0][:120]}]",
                  file=sys.stderr)
            code = EXIT_STOPPED
            time.sleep(2)  # torchrun names as the cause whoever it sees gone first
        elif "allocate" in str(error) or "out of memory" in str(error):
            print(f"{program}: error: not enough memory: {str(error).splitlines()[0][:160]}",
                  file=sys.stderr)
            code = EXIT_INPUT
        else:
            raise
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"{program}: error: {error.strerror}{where}", file=sys.stderr)
        code = EXIT_INPUT
    return code


def launched():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_torchrun(why):
    """For scripts that are one process by nature."""
    if launched():
        raise InputError(f"start it without torchrun: it {why}")


def lost_a_process(error):
    """Whether PyTorch's engine (gloo, NCCL or its store) gave up on a peer."""
    import torch.distributed as dist

    said = str(error).lower()  # gloo names itself in all messages but that of a pair's closure
    return dist.is_initialized() and (isinstance(error, dist.DistError)
                                      or "gloo" in said or "pair closure" in said)


def quiet_thread(fault):
    """A disk that is full for a helper thread (TensorBoard's) is full for us, and we say so."""
    if not issubclass(fault.exc_type, OSError):
        sys.__excepthook__(fault.exc_type, fault.exc_value, fault.exc_traceback)


def say(message):
    """Print a line for whoever is watching; work goes on when nobody is any more. Of several
    processes, the first speaks."""
    if launched() and os.environ.get("RANK") != "0":
        return
    try:
        print(message, flush=True)
    except BrokenPipeError:
        mute()


def mute():
    """Send standard output nowhere from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def number(kind, low=-math.inf, high=math.inf, *, above=None, finite=True):
    """An argparse type: a ``kind`` in [low, high] or strictly above ``above``; infinity only where
    ``finite`` is False, NaN never."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if finite and math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if math.isnan(value) or not low <= value <= high or (above is not None and value <= above):
            bounds = f"> {above}" if above is not None else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return parse


def depth(text):
    value = number(int, 10)(text)
    if (value - 4) % 6:
        raise argparse.ArgumentTypeError(f"a Wide-ResNet's depth is 6n + 4 (10, 16, 22, 28, 34, "
                                         f"40, ...), not {value}")
    return value


POSITIVE, NATURAL = number(int, 1), number(int, 0, 2**63 - 1)
WEIGHT, RATE = number(float, 0, 1e9), number(float, 0, 1)
FLAG = argparse.BooleanOptionalAction


def parser(description):
    return argparse.ArgumentParser(description=description, allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_data_flags(p):
    g = p.add_argument_group("data")
    g.add_argument("--dataset", default="cifar10", help="cifar10, cifar100, svhn or digits")
    g.add_argument("--data_root", default="data", metavar="DIR", help="where data sets lie")
    g.add_argument("--download", action=FLAG, default=True, help="fetch what is missing")
    g.add_argument("--n_valid", type=NATURAL, default=None, metavar="n",
                   help="validation images taken from the training split (5000; digits 137)")
    g.add_argument("--n_train", type=POSITIVE, default=None, metavar="n",
                   help="use the first n training images only (small-scale studies)")
    g.add_argument("--image_size", type=int, choices=(16, 32), default=None,
                   help="side of the digits images (16)")


def add_model_flags(p):
    from models import NORMS

    g = p.add_argument_group("network (Wide-ResNet)")
    g.add_argument("--depth", type=depth, default=28, metavar="6n+4", help="layers")
    g.add_argument("--width", type=POSITIVE, default=10, metavar="k", help="widening factor")
    g.add_argument("--norm", choices=NORMS, default="batch", help="normalisation")
    g.add_argument("--bn_momentum", type=number(float, high=1, above=0), default=0.9,
                   help="PyTorch's sense: running = (1-m) old + m batch; released: 0.9")


def add_sampler_flags(p):
    g = p.add_argument_group("sampler (Algorithm 1)")
    g.add_argument("--n_steps", type=POSITIVE, default=10, metavar="M",
                   help="outer steps, each a forward and backward pass")
    g.add_argument("--in_steps", type=NATURAL, default=5, metavar="N",
                   help="inner steps; 0 is SGLD with --sgld_lr")
    g.add_argument("--pyld_lr", type=number(float, above=0), default=0.2, metavar="α",
                   help="step of one inner turn (the paper's α/2 · clamp, see Differences)")
    g.add_argument("--sgld_lr", type=number(float, 0), default=0.0, metavar="α",
                   help="step of SGLD where --in_steps is 0 (JEM: 1)")
    g.add_argument("--sgld_std", type=number(float, 0), default=0.0, metavar="σ",
                   help="std of the noise after each outer step (JEM: 0.01)")
    g.add_argument("--eps", type=number(float, above=0, finite=False), default=1.0, metavar="ε",
                   help="proximity: bound on each gradient component; inf switches it off")
    g.add_argument("--step_decay", type=number(float, high=1, above=0), default=1.0, metavar="γ",
                   help="outer step i is γ^i times as long as the first")
    g.add_argument("--pixel_clamp", action=FLAG, default=True,
                   help="keep chains in [-1, 1] after every inner step")
    g.add_argument("--literal_pyld", action=FLAG, default=False,
                   help="run the inner loop of Algorithm 1 step by step (same result, slower)")
    g.add_argument("--sample_mode", choices=("train", "eval"), default="train",
                   help="the network's mode while sampling (JEM: eval)")
    g.add_argument("--init", choices=("informative", "uniform"), default="informative",
                   help="p_0: class Gaussians (Eq. 14) or uniform noise (JEM)")
    g.add_argument("--buffer_size", type=POSITIVE, default=10000, metavar="|B|",
                   help="images in the replay buffer")
    g.add_argument("--reinit_freq", type=RATE, default=0.05, metavar="ρ",
                   help="probability that a chain starts anew from p_0")
    g.add_argument("--class_cond_p_x_sample", action=FLAG, default=False,
                   help="draw the chains of p(x) per class, y uniform")


def add_train_flags(p):
    g = p.add_argument_group("objective (Eq. 5)")
    g.add_argument("--p_x_weight", type=WEIGHT, default=1.0, help="weight of log p(x)")
    g.add_argument("--p_y_given_x_weight", type=WEIGHT, default=1.0, help="of log p(y|x)")
    g.add_argument("--p_x_y_weight", type=WEIGHT, default=0.0, help="of log p(x, y)")
    g.add_argument("--shared_batch", action=FLAG, default=False,
                   help="one real batch for p(x) and p(y|x) (Algorithm 2); released: two")
    g.add_argument("--sigma", type=number(float, 0), default=0.03, metavar="σ",
                   help="std of the noise on training images")
    g.add_argument("--clean_p_x", action=FLAG, default=False,
                   help="no crop, flip or noise on the real batch of p(x) (SADA-JEM)")
    g.add_argument("--label_smoothing", type=RATE, default=0.0, help="of the cross-entropy")
    g.add_argument("--alternating_flip", action=FLAG, default=False,
                   help="mirror each image every other epoch instead of at random")
    g.add_argument("--adversarial", choices=("none", "linf", "l2"), default="none",
                   help="PGD adversarial training of p(y|x) in this ball (a baseline of Fig. 9)")
    g.add_argument("--adv_eps", type=number(float, above=0), default=None, metavar="ε",
                   help="its radius: L-inf in 1/255 (8), L2 in [0, 1] images (0.5)")
    g.add_argument("--adv_steps", type=POSITIVE, default=7, help="its PGD steps")
    g = p.add_argument_group("optimiser")
    g.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd",
                   help="SGD with momentum 0.9, or Adam with betas 0.9 and 0.999")
    g.add_argument("--nesterov", action=FLAG, default=False, help="Nesterov momentum (SGD)")
    g.add_argument("--lr", type=number(float, above=0), default=None,
                   help="learning rate (sgd 0.1, adam 0.0001)")
    g.add_argument("--weight_decay", type=number(float, 0), default=4e-4, help="L2, all weights")
    g.add_argument("--schedule", choices=("steps", "cosine", "linear"), default="steps",
                   help="of the rate after its warm-up: steps at --decay_epochs, or down to 0 at "
                        "the end of --n_epochs (linear: a one-cycle schedule)")
    g.add_argument("--warmup_iters", type=NATURAL, default=1000, help="steps of linear warm-up")
    g.add_argument("--decay_epochs", type=NATURAL, nargs="*", default=[50, 100, 125],
                   help="epochs at which the learning rate is multiplied by --decay_rate")
    g.add_argument("--decay_rate", type=number(float, above=0), default=0.2, help="see above")
    g.add_argument("--batch_size", type=POSITIVE, default=None, metavar="B",
                   help="images a pass, real or sampled (64)")
    g.add_argument("--labelled_batch", type=POSITIVE, default=None, metavar="B",
                   help="images in the batch of p(y|x) (--batch_size)")
    g.add_argument("--accumulate", type=POSITIVE, default=1, metavar="k",
                   help="parts of B images whose gradients are averaged in one step")
    g.add_argument("--global_batch_size", type=POSITIVE, default=None,
                   help="images a step over all processes and parts; gives --batch_size")
    g.add_argument("--lr_scaling", choices=("none", "sqrt", "linear"), default="none",
                   help="multiply --lr by (global batch / 64), or its root")
    g.add_argument("--sync_bn", action=FLAG, default=False,
                   help="batch statistics over all processes' images (default: each its own)")
    g.add_argument("--sam", type=number(float, 0), default=0.0, metavar="ρ",
                   help="sharpness-aware minimisation with this radius (SADA-JEM); 0 is off")
    g.add_argument("--ema", type=number(float, 0, 0.999999), default=0.0, metavar="DECAY",
                   help="evaluate (and keep in best.pt) a running average of the weights; 0 is off")
    g.add_argument("--recalibrate_bn", type=NATURAL, default=0, metavar="n",
                   help="evaluate with running statistics over n training images; 0 is off")
    g.add_argument("--n_epochs", type=POSITIVE, default=150, help="epochs of labelled images")
    g = p.add_argument_group("run")
    g.add_argument("--run_dir", default="runs/jempp", metavar="RUN", help="all output goes here")
    g.add_argument("--seed", type=NATURAL, default=1, help="of weights, data order and chains")
    g.add_argument("--max_steps", type=POSITIVE, default=None, help="stop after this step")
    g.add_argument("--max_minutes", type=number(float, above=0), default=None,
                   help="save and stop after so many minutes (exit code 75)")
    g.add_argument("--ckpt_steps", type=POSITIVE, default=None, metavar="K",
                   help="save last.pt every K steps besides every epoch")
    g.add_argument("--print_every", type=POSITIVE, default=100, help="steps between records")
    g.add_argument("--eval_every", type=POSITIVE, default=1, help="epochs between evaluations")
    g.add_argument("--on_divergence", choices=("rollback", "stop"), default="rollback",
                   help="go back to the last good checkpoint with other random numbers, or stop")
    g.add_argument("--max_rollbacks", type=NATURAL, default=3, help="after them: exit code 3")
    g.add_argument("--rollback_lr_factor", type=number(float, high=1, above=0), default=1.0,
                   help="multiply the learning rate by this at each rollback")
    g.add_argument("--max_loss", type=number(float, above=0), default=1e8,
                   help="a larger |loss| counts as divergence (released: 1e8)")
    g.add_argument("--max_gap", type=number(float, above=0), default=1000.0,
                   help="a larger |E(x+) - E(x-)| counts as divergence")
    g.add_argument("--good_after", type=NATURAL, default=100, metavar="STEPS",
                   help="a checkpoint is good to go back to once the run survived it so long")
    g.add_argument("--check_every", type=POSITIVE, default=10, metavar="STEPS",
                   help="on a GPU, steps between looks at the device (CPU: every step)")
    g.add_argument("--dist_timeout", type=number(float, above=0), default=10.0, metavar="MINUTES",
                   help="under torchrun: a process silent for so long ends the job")
    g.add_argument("--keep_every", type=POSITIVE, default=None, metavar="K",
                   help="also keep epoch_NNNN.pt every K epochs, to evaluate (Fig. 6)")
    g.add_argument("--dry_run", action="store_true", help="print the resolved options and stop")


def add_speed_flags(p):
    g = p.add_argument_group("speed")
    g.add_argument("--fast", action=FLAG, default=False,
                   help="the switches below that pay: on a CPU --compile default, on a GPU "
                        "--compile reduce-overhead --amp bf16 --cudnn_benchmark")
    g.add_argument("--compile", choices=("off", "default", "reduce-overhead", "max-autotune"),
                   default=None, help="torch.compile of the network's passes, by mode; the first "
                   "steps take a minute; reduce-overhead and max-autotune use CUDA graphs (off)")
    g.add_argument("--amp", choices=("off", "bf16"), default=None,
                   help="bfloat16 autocast inside the network; all else stays float32 (off)")
    g.add_argument("--tf32", action=FLAG, default=False,
                   help="let a GPU round float32 products to 10 bits")
    g.add_argument("--cudnn_benchmark", action=FLAG, default=None,
                   help="let cuDNN choose its algorithms by trial (off)")


def check_sampler(args):
    """InputError for sampler flags that do not go together."""
    if args.in_steps == 0 and args.sgld_lr == 0:
        raise InputError("--in_steps 0 is SGLD: give its step with --sgld_lr (JEM: 1)")
    if args.in_steps and args.sgld_lr:
        raise InputError("--sgld_lr is the step of SGLD (--in_steps 0); PYLD's is --pyld_lr")


def add_device_flags(p):
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: cuda if there)")
    g.add_argument("--num_threads", type=NATURAL, default=0, help="CPU threads, 0 = all cores")
    g.add_argument("--deterministic", action=FLAG, default=False,
                   help="on a GPU, same bits for the same seed (a CPU's are anyway); slower")
    g.add_argument("--channels_last", action=FLAG, default=True,
                   help="memory layout of images and weights; changes rounding only")


def print_json(options):
    """``--dry_run``: the resolved options, sorted, as JSON (infinity as the string "inf")."""
    say(json.dumps(jsonable(options), indent=2, sort_keys=True))


def jsonable(value):
    """``value`` in JSON's own types; non-finite floats become "inf", "-inf" or "nan"."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
