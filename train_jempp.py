#!/usr/bin/env python3
"""Train JEM++: Algorithm 2 of Yang & Ji, "Improved Techniques for Training JEM" (ICCV 2021).

    python train_jempp.py                                  # the paper's run: CIFAR-10, WRN-28-10
    python train_jempp.py --dataset digits --depth 10 --width 1 --run_dir runs/digits

The same command again continues the run. Exit codes: 0 finished, 2 bad input, 3 diverged,
75 stopped early with its state saved (run again to go on).
"""

import copy
import math
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from models import energy, frozen
from samplers import make_sampler, to_pixels
from utils import checkpoint, cli, distributed, machine, records
from utils.build import build, n_parts, new_state, per_class
from utils.data import SPECS
from utils.distributed import accumulating
from utils.guard import Guard, Stop, fetch, resume, roll_back, save_last
from utils.inference import accuracy
from utils.robustness import adversarial_batch, ball_radius
from utils.run_log import RunLog
from utils.seeding import seed_step


def parse_args(argv=None):
    p = cli.parser(__doc__.splitlines()[0])
    cli.add_data_flags(p)
    cli.add_model_flags(p)
    cli.add_sampler_flags(p)
    cli.add_train_flags(p)
    cli.add_device_flags(p)
    cli.add_speed_flags(p)
    return resolve(p.parse_args(argv))


def resolve(args):
    """Fill in what depends on other flags, and refuse what does not go together."""
    if args.dataset not in SPECS:
        raise cli.InputError(f"unknown --dataset {args.dataset}: choose from {', '.join(SPECS)}")
    spec = SPECS[args.dataset]
    if args.image_size is not None and args.dataset != "digits":
        raise cli.InputError("--image_size is for --dataset digits")
    args.image_size = args.image_size or spec.size
    args.n_valid = spec.n_valid if args.n_valid is None else args.n_valid
    args.lr = args.lr or {"sgd": 0.1, "adam": 1e-4}[args.optimizer]
    args.adv_eps = args.adv_eps or {"linf": 8.0, "l2": 0.5}.get(args.adversarial)
    cli.check_sampler(args)
    machine.fill_in_switches(args)
    resolve_batches(args)
    if args.p_x_weight + args.p_y_given_x_weight + args.p_x_y_weight == 0:
        raise cli.InputError("all loss weights are 0: nothing to train")
    classes = spec.n_classes if per_class(args) else 1
    if args.buffer_size < classes * n_parts(args):
        raise cli.InputError(f"--buffer_size {args.buffer_size}: at least "
                             f"{classes * n_parts(args)} here, an image for each of "
                             f"{n_parts(args)} parts of a step{' and each class' * (classes > 1)}")
    return args


def resolve_batches(args):
    """--batch_size, --global_batch_size and --labelled_batch from whichever were typed."""
    parts = n_parts(args)
    words = f"{distributed.world()} processes x --accumulate {args.accumulate}"
    if args.global_batch_size is None:
        args.batch_size = args.batch_size or 64
        args.global_batch_size = parts * args.batch_size
    elif args.global_batch_size % parts:
        raise cli.InputError(f"--global_batch_size {args.global_batch_size} does not divide into "
                             f"{parts} parts ({words})")
    elif args.batch_size not in (None, args.global_batch_size // parts):
        raise cli.InputError(f"--global_batch_size {args.global_batch_size} in {parts} parts "
                             f"({words}) is not --batch_size {args.batch_size}: type one of them")
    args.batch_size = args.global_batch_size // parts
    args.labelled_batch = args.labelled_batch or args.global_batch_size
    if args.labelled_batch % parts:
        raise cli.InputError(f"--labelled_batch {args.labelled_batch} does not divide into {parts} "
                             f"parts ({words})")
    if args.shared_batch and args.labelled_batch != args.global_batch_size:
        raise cli.InputError("--shared_batch is one batch for p(x) and p(y|x): drop "
                             "--labelled_batch")
    if args.shared_batch and args.clean_p_x:
        raise cli.InputError("--shared_batch has no p(x) batch of its own for --clean_p_x")
    if args.sync_bn and args.compile != "off":
        raise cli.InputError("--sync_bn goes without compilation: add --compile off")
    if args.literal_pyld and (args.compile != "off" or args.amp != "off"):
        raise cli.InputError("--literal_pyld is uncompiled and float32: drop --fast, --compile, "
                             "--amp")
    if args.nesterov and args.optimizer != "sgd":
        raise cli.InputError("--nesterov goes with --optimizer sgd")


def learning_rate(step, steps_per_epoch, args):
    """Linear warm-up from 0, then by --schedule: times decay_rate at each of decay_epochs, or along
    a cosine or a line to 0 at the last step."""
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


def in_layout(x, args):
    """x [B, C, H, W] in the memory layout of the weights."""
    return x.contiguous(memory_format=torch.channels_last) if args.channels_last else x


def sample_negatives(model, draw, buffer, p0, n, args, streams, y=None):
    """Algorithm 2, lines 3, 4 and 6: x_0 from the buffer or p_0, a chain, back into the buffer.

    ``y`` [n] on the host makes the chains conditional. Returns x_neg [n, C, H, W].
    """
    x_0, slots = buffer.draw(n, p0, args.reinit_freq, y, host=streams.host,
                             generator=streams.device)
    on_device = None if y is None else y.to(x_0.device, non_blocking=True)
    model.train(args.sample_mode == "train")
    with frozen(model):
        x_neg = draw(model, in_layout(x_0, args), y=on_device, generator=streams.device)
    model.train()
    buffer.store(slots, x_neg)
    return x_neg


def joint_loss(state, draw, batch, buffer, p0, args, streams):
    """The terms of Eq. 5 for one batch: functions, in the order of the released code's passes, each
    returning (a term of the loss, what to log of it: scalars on the device, by name).

    Each pass has batch statistics of its own, so to batch norm their order matters and joining them
    would change what is computed. Backpropagate a term before the next is computed: no graph then
    outlives its pass, and none lies there while the chains run. Called a second time, the terms use
    the same negative samples (as sharpness-aware minimisation does).
    """
    model, net = state.model, state.net
    x_pos, (x_lab, y_lab) = batch
    x_pos, x_lab = in_layout(x_pos, args), in_layout(x_lab, args)
    y = y_lab.to(x_lab.device, non_blocking=True)
    negatives = {}

    def negative_energy(name, classes, y_of_energy=None):
        if name not in negatives:
            n = len(x_pos) if classes is None else len(classes)
            negatives[name] = sample_negatives(model, draw, buffer, p0, n, args, streams, classes)
        x_neg = negatives[name]
        return energy(net(x_neg), y_of_energy).mean(), (x_neg.abs() >= 1).float().mean()

    def real():  # log p(x), Eq. 2
        e_pos = energy(net(x_pos)).mean()
        return args.p_x_weight * e_pos, {"e_pos": e_pos}

    def sampled():
        classes = None
        if args.class_cond_p_x_sample:  # chains drawn per class are draws of p(x) all the same
            classes = torch.randint(model.config["n_classes"], (len(x_pos),),
                                    generator=streams.host)
        e_neg, saturated = negative_energy("x", classes)
        return -args.p_x_weight * e_neg, {"e_neg": e_neg, "saturated": saturated}

    def labelled():
        x = x_lab
        if args.adversarial != "none":
            x = adversarial_batch(model, x_lab.clamp(-1, 1), y,
                                  ball_radius(args.adv_eps, args.adversarial), args.adversarial,
                                  steps=args.adv_steps, generator=streams.device)
        logits = net(x)
        ce = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
        log = {"ce": ce, "accuracy": (logits.argmax(1) == y).float().mean()}
        loss = args.p_y_given_x_weight * ce  # log p(y|x)
        if args.p_x_y_weight:  # log p(x, y)
            log["e_pos_y"] = energy(logits, y).mean()
            loss = loss + args.p_x_y_weight * log["e_pos_y"]
        return loss, log

    def sampled_per_class():
        e_neg, saturated = negative_energy("x, y", y_lab, y)
        return -args.p_x_y_weight * e_neg, {"e_neg_y": e_neg, "saturated": saturated}

    terms = [real, sampled] if args.p_x_weight else []
    terms += [labelled] if args.p_y_given_x_weight or args.p_x_y_weight else []
    return terms + ([sampled_per_class] if args.p_x_y_weight else [])


def backward(parts, net):
    """Backpropagate the terms of every part of the batch into .grad, averaged over the parts (and
    the processes, by the last of the passes). Returns the mean of what they log."""
    passes, logs = [term for part in parts for term in part], []
    for i, term in enumerate(passes):
        with accumulating(net) if i < len(passes) - 1 else nullcontext():
            loss, log = term()
            (loss / len(parts)).backward()
        logs.append({"loss": loss.detach()} | {k: v.detach() for k, v in log.items()})
    means = {}
    for name in dict.fromkeys(name for log in logs for name in log):
        values = [log[name] for log in logs if name in log]
        # a part's loss is the sum of its terms
        means[name] = sum(values) / (len(parts) if name == "loss" else len(values))
    return means


def train_step(args, state, draw, data, p0):
    """Algorithm 2, lines 2 to 6, once. Returns what joint_loss logs."""
    lr = learning_rate(state.step, data.steps_per_epoch, args)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * state.lr_factor
    key, parts = checkpoint.stream_key(args.seed, state.stream), []
    for i in range(args.accumulate):
        part = i * distributed.world() + distributed.rank()
        buffer = None if state.buffer is None else state.buffer.share(i, args.accumulate)
        parts.append(joint_loss(state, draw, data.batch(state.step, part), buffer, p0, args,
                                seed_step(key, state.step, part, data.device)))
    state.optimizer.zero_grad(set_to_none=False)  # see build.new_state
    metrics = backward(parts, state.net)
    parameters = list(state.model.parameters())
    metrics["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if args.sam:
        sharpness_aware(args.sam, state, parts, parameters, metrics["grad_norm"])
    state.optimizer.step()
    if state.average is not None:
        state.average.update_parameters(state.model)
    state.step += 1
    return metrics


def sharpness_aware(radius, state, parts, parameters, norm):
    """Replace the gradients by those at w + radius * gradient / norm (Foret et al., 2021). Only the
    first pass counts for the running statistics of batch norm."""
    with torch.no_grad():
        moves = [radius / (norm + 1e-12) * p.grad for p in parameters]
        weights = [p.detach().clone() for p in parameters]
        statistics = [b.clone() for b in state.model.buffers()]
        for p, move in zip(parameters, moves, strict=True):
            p += move
    state.optimizer.zero_grad(set_to_none=False)  # see build.new_state
    backward(parts, state.net)
    with torch.no_grad():
        for p, weight in zip(parameters, weights, strict=True):
            p.copy_(weight)
        for b, kept in zip(state.model.buffers(), statistics, strict=True):
            b.copy_(kept)


def train(args, state, data, p0, valid, test, log, stop):
    """The loop. Returns (reason, detail) of its end; RUN/last.pt then holds the last good state."""
    draw, run_dir, guard = make_sampler(args), Path(args.run_dir), Guard(args, data.spec.n_classes)
    last = args.n_epochs * data.steps_per_epoch
    total = min(last, args.max_steps or last)
    window, rows = [], []  # scalars of the last steps, on the device and fetched
    check_every = 1 if data.device.type == "cpu" else args.check_every
    bar = tqdm(total=total, initial=state.step, unit="step",
               disable=distributed.rank() > 0 or None)
    log.start_clock(state.step)
    while state.step < total:
        window.append(train_step(args, state, draw, data, p0))
        bar.update()

        epoch, position = divmod(state.step, data.steps_per_epoch)
        looking = state.step % check_every == 0
        stopping = distributed.first(stop.reason()) if looking else None
        printing = state.step % args.print_every == 0
        saving = (position == 0 or state.step == total or stopping
                  or (args.ckpt_steps and state.step % args.ckpt_steps == 0))
        if not (printing or saving or looking):
            continue  # nothing waits for the device in between

        new = fetch(window)
        window.clear()
        trouble = guard.look(state, new)
        if not trouble and saving and not checkpoint.is_finite(state):
            trouble = state.step, "weights or buffer are not finite"
        if trouble:
            checkpoint.save(run_dir / "diverged.pt", state, args, epoch)
            if args.on_divergence == "stop" or state.rollbacks >= args.max_rollbacks:
                return "diverged", f"{trouble[1]} at step {trouble[0]}"
            roll_back(*trouble, run_dir, state, args,
                      lambda stream: new_state(args, data, p0, state.p0, stream), log)
            data.reseed(checkpoint.stream_key(args.seed, state.stream))
            bar.clear()
            cli.say(f"step {trouble[0]}: {trouble[1]}: back to step {state.step} with other "
                    f"random numbers (rollback {state.rollbacks} of {args.max_rollbacks})")
            rows.clear()
            bar.n = state.step
            continue
        rows += new
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        if printing or saving:
            log.steps(state, args, means)
            bar.set_postfix({k: f"{v:.3g}" for k, v in means.items()})
            rows.clear()
        evaluating = position == 0 and (epoch % args.eval_every == 0 or state.step == last)
        keeping = position == 0 and args.keep_every and epoch % args.keep_every == 0
        if evaluating or keeping:
            network = judged(args, state, data)
        if evaluating:
            evaluate(args, state, network, epoch, valid, test, means, log)
        if keeping:
            checkpoint.save(run_dir / f"epoch_{epoch:04d}.pt", state, args, epoch, judged=network)
        if saving:
            save_last(run_dir, state, args, epoch, log)
            log.start_clock(state.step)
        if stopping and state.step < total:
            return stopping, "state saved; the same command goes on"
    return ("finished", "") if state.step >= last else ("max_steps", "")


def judged(args, state, data):
    """The network that is evaluated and published: the one in training or, by --ema, the average of
    its weights; by --recalibrate_bn with running statistics over so many training images."""
    model = state.model if state.average is None else state.average.module
    distributed.same_buffers(model)
    if args.recalibrate_bn:
        model = copy.deepcopy(model)
        batches = data.images.x[:args.recalibrate_bn].split(args.batch_size)
        with machine.eager():
            update_bn((in_layout(to_pixels(x), args) for x in batches), model)
    return model


def evaluate(args, state, network, epoch, valid, test, means, log):
    """Accuracies of ``network`` in eval mode, a picture of the buffer, and best.pt, chosen by
    validation alone (without validation images: the latest)."""
    scores = {"valid_accuracy": accuracy(network, valid), "test_accuracy": accuracy(network, test)}
    log.write("eval", state.step, epoch=epoch, **scores)
    if state.buffer is not None:
        x = state.whole_buffer()
        every = max(1, len(x) // 100)  # evenly spaced over the slots and so over the classes
        log.samples(f"epoch_{epoch:04d}", x[::every][:100], state.step)
    if scores["valid_accuracy"] is None or scores["valid_accuracy"] > state.best:
        state.best = scores["valid_accuracy"] or -1.0
        checkpoint.save(Path(args.run_dir) / "best.pt", state, args, epoch, judged=network)
    parts = [f"{k} {100 * v:.2f} %" for k, v in scores.items() if v is not None]
    parts += [f"{k} {v:.3f}" for k, v in means.items() if k.startswith("e_")]
    cli.say(f"epoch {epoch:3d}  {'  '.join(parts)}")


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run:
        cli.print_json(vars(args))
        return cli.EXIT_OK
    run_dir = Path(args.run_dir)
    checkpoint.check_run_dir(run_dir, args)
    device = machine.pick_device(args.device, args.num_threads)
    machine.set_switches(args, device)
    distributed.start(device, args.dist_timeout)
    if args.sync_bn and device.type == "cpu":
        raise cli.InputError("--sync_bn is for GPUs: PyTorch has none on a CPU")
    state, data, p0, valid, test = build(args, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        refused = None
        if distributed.rank() == 0:
            try:
                held.enter_context(checkpoint.locked(run_dir))
            except cli.InputError as error:
                refused = str(error)
        if refused := distributed.first(refused):
            raise cli.InputError(refused)
        code = run(args, run_dir, state, data, p0, valid, test)
    distributed.barrier()  # nobody leaves while another still needs it
    return code


def run(args, run_dir, state, data, p0, valid, test):
    """Resume if there is something to resume, train, close the log; the exit code."""
    if resume(run_dir, state, args):
        data.reseed(checkpoint.stream_key(args.seed, state.stream))
        cli.say(f"continuing {run_dir} after step {state.step}")
    distributed.barrier()  # all have read what the first may now replace
    if distributed.rank() == 0:
        records.write_json(run_dir / "args.json", vars(args))
    header = {"args": vars(args), "env": records.environment(data.device),
              "steps_per_epoch": data.steps_per_epoch, "n_train": len(data.images.y),
              "n_valid": len(valid.y), "n_test": len(test.y),
              "parameters": sum(p.numel() for p in state.model.parameters()),
              "processes": distributed.world()}
    log = RunLog(run_dir, state.step, header, state.log_lines)
    reason, detail = train(args, state, data, p0, valid, test, log, Stop(args.max_minutes))
    code = {"finished": cli.EXIT_OK, "max_steps": cli.EXIT_OK,
            "diverged": cli.EXIT_DIVERGED}.get(reason, cli.EXIT_STOPPED)
    log.close(state.step, reason=reason, detail=detail, exit_code=code,
              rollbacks=state.rollbacks)
    after = f" after {state.rollbacks} rollbacks" if state.rollbacks else ""
    cli.say(f"{reason} at step {state.step}{after}{': ' if detail else ''}{detail} ({run_dir})")
    return code


if __name__ == "__main__":
    cli.run(main)
