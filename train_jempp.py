#!/usr/bin/env python3
"""Train JEM++: Algorithm 2 of Yang & Ji, "Improved Techniques for Training JEM" (ICCV 2021).

    python train_jempp.py                                  # the paper's run: CIFAR-10, WRN-28-10
    python train_jempp.py --dataset digits --depth 10 --width 1 --run_dir runs/digits

The same command again continues the run. Exit codes: 0 finished, 2 bad input, 3 diverged,
75 stopped early with its state saved (run again to go on).
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models import energy
from samplers import make_sampler
from utils import checkpoint, cli, records
from utils.build import build, new_state, per_class
from utils.data import SPECS
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
    if args.p_x_weight + args.p_y_given_x_weight + args.p_x_y_weight == 0:
        raise cli.InputError("all loss weights are 0: nothing to train")
    if per_class(args) and args.buffer_size < spec.n_classes:
        raise cli.InputError(f"chains per class need a --buffer_size of at least {spec.n_classes}")
    return args


def learning_rate(step, epoch, args):
    """Linear warm-up from 0, then times decay_rate at each of decay_epochs."""
    warm = min(1.0, step / args.warmup_iters) if args.warmup_iters else 1.0
    return args.lr * warm * args.decay_rate ** sum(epoch >= e for e in args.decay_epochs)


def in_layout(x, args):
    """x [B, C, H, W] in the memory layout of the weights."""
    return x.contiguous(memory_format=torch.channels_last) if args.channels_last else x


def sample_negatives(model, draw, buffer, p0, args, streams, y=None):
    """Algorithm 2, lines 3, 4 and 6: x_0 from the buffer or p_0, a chain, back into the buffer.

    ``y`` [B] on the host makes the chains conditional. Returns x_neg [B, C, H, W].
    """
    x_0, slots = buffer.draw(args.batch_size, p0, args.reinit_freq, y, host=streams.host,
                             generator=streams.device)
    on_device = None if y is None else y.to(x_0.device, non_blocking=True)
    model.train(args.sample_mode == "train")
    x_neg = draw(model, in_layout(x_0, args), y=on_device, generator=streams.device)
    model.train()
    buffer.store(slots, x_neg)
    return x_neg


def joint_loss(model, draw, batch, buffer, p0, args, streams):
    """The loss of Eq. 5, and what to log of it (scalars on the device, by name).

    The order of the passes is the released code's; each has batch statistics of its own, so to
    batch norm the order matters and joining passes would change what is computed.
    """
    x_pos, (x_lab, y_lab) = batch
    x_pos, x_lab = in_layout(x_pos, args), in_layout(x_lab, args)
    loss, log = 0.0, {}

    if args.p_x_weight:  # log p(x), Eq. 2
        y = None
        if args.class_cond_p_x_sample:
            y = torch.randint(model.config["n_classes"], (args.batch_size,), generator=streams.host)
        e_pos = model.energy(x_pos).mean()
        x_neg = sample_negatives(model, draw, buffer, p0, args, streams, y)
        e_neg = model.energy(x_neg).mean()  # chains drawn per class are draws of p(x) all the same
        loss = loss + args.p_x_weight * (e_pos - e_neg)
        log |= {"e_pos": e_pos, "e_neg": e_neg, "saturated": (x_neg.abs() >= 1).float().mean()}

    if args.p_y_given_x_weight or args.p_x_y_weight:
        if args.adversarial != "none":
            x_lab = adversarial_batch(model, x_lab.clamp(-1, 1), y_lab,
                                      ball_radius(args.adv_eps, args.adversarial),
                                      args.adversarial, steps=args.adv_steps,
                                      generator=streams.device)
        logits = model(x_lab)
        log["ce"] = F.cross_entropy(logits, y_lab)
        log["accuracy"] = (logits.argmax(1) == y_lab).float().mean()
        loss = loss + args.p_y_given_x_weight * log["ce"]  # log p(y|x)

    if args.p_x_y_weight:  # log p(x, y)
        e_pos = energy(logits, y_lab).mean()
        x_neg = sample_negatives(model, draw, buffer, p0, args, streams, y_lab.cpu())
        e_neg = model.energy(x_neg, y_lab).mean()
        loss = loss + args.p_x_y_weight * (e_pos - e_neg)
        log |= {"e_pos_y": e_pos, "e_neg_y": e_neg, "saturated": (x_neg.abs() >= 1).float().mean()}

    return loss, {"loss": loss.detach()} | {name: value.detach() for name, value in log.items()}


def train_step(args, state, draw, data, p0):
    """Algorithm 2, lines 2 to 6, once. Returns what joint_loss logs."""
    lr = learning_rate(state.step, state.step // data.steps_per_epoch, args)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * state.lr_factor
    streams = seed_step(checkpoint.stream_key(args.seed, state.stream), state.step, 0, data.device)
    loss, metrics = joint_loss(state.model, draw, data.batch(state.step), state.buffer, p0, args,
                               streams)
    state.optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    metrics["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
    state.optimizer.step()
    state.step += 1
    return metrics


def train(args, state, data, p0, valid, test, log, stop):
    """The loop. Returns (reason, detail) of its end; RUN/last.pt then holds the last good state."""
    draw, run_dir, guard = make_sampler(args), Path(args.run_dir), Guard(args, data.spec.n_classes)
    last = args.n_epochs * data.steps_per_epoch
    total = min(last, args.max_steps or last)
    window, rows = [], []  # scalars of the last steps, on the device and fetched
    check_every = 1 if data.device.type == "cpu" else args.check_every
    bar = tqdm(total=total, initial=state.step, unit="step", disable=None)
    log.start_clock(state.step)
    while state.step < total:
        window.append(train_step(args, state, draw, data, p0))
        bar.update()

        epoch, position = divmod(state.step, data.steps_per_epoch)
        stopping = stop.reason()
        printing = state.step % args.print_every == 0
        saving = (position == 0 or state.step == total or stopping
                  or (args.ckpt_steps and state.step % args.ckpt_steps == 0))
        if not (printing or saving or state.step % check_every == 0):
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
        if position == 0 and (epoch % args.eval_every == 0 or state.step == last):
            evaluate(args, state, epoch, valid, test, means, log)
        if position == 0 and args.keep_every and epoch % args.keep_every == 0:
            checkpoint.save(run_dir / f"epoch_{epoch:04d}.pt", state, args, epoch, resumable=False)
        if saving:
            save_last(run_dir, state, args, epoch, log)
            log.start_clock(state.step)
        if stopping and state.step < total:
            return stopping, "state saved; the same command goes on"
    return ("finished", "") if state.step >= last else ("max_steps", "")


def evaluate(args, state, epoch, valid, test, means, log):
    """Accuracies in eval mode, a picture of the buffer, and best.pt, chosen by validation alone
    (without validation images: the latest)."""
    scores = {"valid_accuracy": accuracy(state.model, valid),
              "test_accuracy": accuracy(state.model, test)}
    log.write("eval", state.step, epoch=epoch, **scores)
    if state.buffer is not None:
        log.samples(f"epoch_{epoch:04d}", state.buffer.spread(100), state.step)
    if scores["valid_accuracy"] is None or scores["valid_accuracy"] > state.best:
        state.best = scores["valid_accuracy"] or -1.0
        checkpoint.save(Path(args.run_dir) / "best.pt", state, args, epoch, resumable=False)
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
    device = cli.pick_device(args.device, args.num_threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    state, data, p0, valid, test = build(args, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    with checkpoint.locked(run_dir):
        return run(args, run_dir, state, data, p0, valid, test)


def run(args, run_dir, state, data, p0, valid, test):
    """Resume if there is something to resume, train, close the log; the exit code."""
    if resume(run_dir, state, args):
        data.reseed(checkpoint.stream_key(args.seed, state.stream))
        cli.say(f"continuing {run_dir} after step {state.step}")
    records.write_json(run_dir / "args.json", vars(args))
    header = {"args": vars(args), "env": records.environment(data.device),
              "steps_per_epoch": data.steps_per_epoch, "n_train": len(data.images.y),
              "n_valid": len(valid.y), "n_test": len(test.y),
              "parameters": sum(p.numel() for p in state.model.parameters())}
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
