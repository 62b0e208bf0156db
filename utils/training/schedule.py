"""The learning rate of each step, the weight of log p(x), and when to log, evaluate and save."""

import math
from typing import NamedTuple

from utils.program import InputError

FEW_VISITS = 20  # per slot in a run: the network may learn to tell such young chains apart
# On a trained classifier an energy gap ran away within 350 steps, with slots visited six times by
# then. With 19 visits in 300 steps it held (scripts/README.md).
EARLY_STEPS, EARLY_VISITS = 300, 15


def learning_rate(step, steps_per_epoch, args):
    """The learning rate of a step (0-based): linear warm-up from 0, then --schedule.

    ``steps`` multiplies by --decay_rate at each of --decay_epochs. ``cosine`` and ``linear`` fall
    along a cosine or a line to 0 at the end of --n_epochs.
    """
    lr = args.lr * {"none": 1, "sqrt": (args.global_batch_size / 64) ** 0.5,
                    "linear": args.global_batch_size / 64}[args.lr_scaling]
    if step < args.warmup_iters:
        lr *= step / args.warmup_iters
    if args.schedule == "steps":
        epoch = step // steps_per_epoch
        return lr * args.decay_rate ** sum(epoch >= e for e in args.decay_epochs)
    after = args.n_epochs * steps_per_epoch - args.warmup_iters
    done = min(1.0, max(0, step - args.warmup_iters) / max(1, after))
    return lr * (1 - done if args.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def p_x_weight(step, steps_per_epoch, args):
    """The weight of log p(x) in a step (0-based).

    It is 0 until --p_x_from epochs are done. Then it rises linearly to --p_x_weight over
    --p_x_ramp steps.
    """
    taken = step - args.p_x_from * steps_per_epoch
    if taken < 0:
        return 0.0
    return args.p_x_weight * min(1.0, (taken + 1) / max(1, args.p_x_ramp))


def about_chains(steps_per_epoch, args):
    """One line for the user: when log p(x) begins, and how often the run visits a slot of the
    replay buffer. None if no chains run."""
    per_step = (bool(args.p_x_weight) * args.global_batch_size
                + bool(args.p_x_y_weight) * args.labelled_batch)
    draws = per_step * (args.n_epochs - args.p_x_from) * steps_per_epoch
    if not draws:
        return None
    begins = ""
    if args.p_x_from or args.p_x_ramp:
        ramp = f", with its whole weight {args.p_x_ramp} steps later" if args.p_x_ramp else ""
        begins = f"log p(x) begins after step {args.p_x_from * steps_per_epoch}{ramp}; "
    visits = draws / args.buffer_size
    line = f"{begins}a slot of the replay buffer will be visited {visits:.3g} times in this run"
    early = EARLY_STEPS * per_step // EARLY_VISITS
    if visits >= FEW_VISITS and trained_before(args) and args.buffer_size > early:
        return (f"{line}. Log p(x) begins on a trained network, so the first chains have to age "
                f"fast: a --buffer_size of {early} or less helps")
    if visits >= FEW_VISITS:
        return line
    return (f"{line}, fewer than {FEW_VISITS}: its chains stay young, and the energy gap may run "
            f"away. A smaller --buffer_size, {max(1, draws // FEW_VISITS)} or less, helps")


def trained_before(args):
    """Whether log p(x) begins on a network that has learnt already, with fresh chains."""
    return args.p_x_from or (args.load_path and not args.load_buffer)


def check_past_rates(before, now, step, steps_per_epoch):
    """InputError if the arguments ``now`` change the learning rate of a step already taken.

    The run has taken ``step`` steps with the arguments ``before``.
    """
    for taken in range(step):
        was, would_be = (learning_rate(taken, steps_per_epoch, args) for args in (before, now))
        if was != would_be:
            raise InputError(f"the run has taken step {taken + 1} at the rate {was:.4g}; with "
                             f"these --n_epochs and --decay_epochs that would have been "
                             f"{would_be:.4g}: change them only for steps still to come")


class Due(NamedTuple):
    """What to do after a step."""

    look: bool  # fetch scalars from the device, check them, and check for reasons to stop
    log: bool
    evaluate: bool
    keep: bool  # epoch_NNNN.pt
    save: bool


def due(step, total, steps_per_epoch, look_every, args):
    """What is ``Due`` after ``step`` steps. This run ends after ``total`` steps."""
    epoch, position = divmod(step, steps_per_epoch)
    at_end = step == args.n_epochs * steps_per_epoch
    save = (position == 0 or step == total
            or args.ckpt_steps is not None and step % args.ckpt_steps == 0)
    log = save or step % args.print_every == 0
    return Due(look=log or step % look_every == 0, log=log,
               evaluate=position == 0 and (epoch % args.eval_every == 0 or at_end),
               keep=position == 0 and bool(args.keep_every) and epoch % args.keep_every == 0,
               save=save)
