#!/usr/bin/env python3
"""Train JEM++: Algorithm 2 of Yang & Ji, "Improved Techniques for Training JEM" (ICCV 2021).

    python train_jempp.py                                  # the paper's run: CIFAR-10, WRN-28-10
    python train_jempp.py --dataset digits --depth 10 --width 1 --run_dir runs/digits

The same command again continues the run. Exit codes: 0 finished, 2 bad input, 3 diverged,
75 stopped early with its state saved (run again to continue).
"""

from utils import start

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models import energy, frozen, network_name, statistics_kept
from samplers import evenly_spaced, make_sampler, sampler_name
from utils import cli, distributed, machine, program
from utils.distributed import accumulating
from utils.evaluation.inference import accuracy, recalibrated
from utils.evaluation.robustness import adversarial_batch, ball_radius
from utils.files import checkpoint, records
from utils.program import InputError, say
from utils.seeding import seed_layers, seed_step
from utils.training.build import build
from utils.training.guard import Guard, Stop, fetch, resume, roll_back, save_last
from utils.training.run_log import RunLog, means_of
from utils.training.schedule import about_chains, due, learning_rate, p_x_weight
from utils.training.start import load_start


def layout_of(args):
    """The memory layout of the weights."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def in_layout(x, args):
    """Bring x [B, C, H, W] into the memory layout of the weights."""
    return x.contiguous(memory_format=layout_of(args))


def of_sampled(model, args):
    """The context for passes of sampled images: --bn_update real keeps running statistics."""
    return statistics_kept(model) if args.bn_update == "real" else nullcontext()


def sample_negatives(model, draw, buffer, p0, n, args, streams, y=None):
    """Algorithm 2, lines 3, 4 and 6: take x_0 from the buffer or p_0, run a chain, store its end.

    ``y`` [n] on the host makes the chains conditional. Returns x_neg [n, C, H, W].
    """
    x_0, slots, ages = buffer.draw(n, p0, args.reinit_freq, y, host=streams.host,
                                   generator=streams.device)
    on_device = None if y is None else y.to(x_0.device, non_blocking=True)
    model.train(args.sample_mode == "train")
    with frozen(model), of_sampled(model, args):
        x_neg = draw(model, in_layout(x_0, args), y=on_device, generator=streams.device)
    model.train()
    buffer.store(slots, x_neg, ages + args.n_steps)
    return x_neg


def loss_terms(state, draw, batch, buffer, p0, args, streams, p_x_weight):
    """The terms of Eq. 5 for one batch, as functions in the order of the released code's passes.

    Each returns (a term of the loss, {name: scalar on the device} to log). Each pass has its own
    batch statistics. So the order of the passes matters to batch norm, and joining passes would
    change the result. Backpropagate each term before computing the next. Then no graph outlives
    its pass, and none takes memory while the chains run. If called again, the terms reuse their
    negative samples (sharpness-aware minimisation needs this).
    """
    passes = Passes(state, draw, batch, buffer, p0, args, streams, p_x_weight)
    terms = [passes.real, passes.sampled] if p_x_weight else []
    terms += [passes.labelled] if args.p_y_given_x_weight or args.p_x_y_weight else []
    return terms + ([passes.sampled_per_class] if args.p_x_y_weight else [])


class Passes:
    """The passes of one batch. ``real`` and ``sampled`` are Eq. 2, d(-log p(x)) = dE(x+) - dE(x-).
    """

    def __init__(self, state, draw, batch, buffer, p0, args, streams, p_x_weight):
        x_pos, (x_lab, self.y_lab) = batch
        self.x_pos, self.x_lab = in_layout(x_pos, args), in_layout(x_lab, args)
        self.y = self.y_lab.to(x_lab.device, non_blocking=True)
        self.model, self.net, self.args = state.model, state.net, args
        self.streams, self.p_x_weight, self.negatives = streams, p_x_weight, {}
        self.chains = lambda n, y: sample_negatives(state.model, draw, buffer, p0, n, args,
                                                    streams, y)

    def real(self):
        """log p(x) of real images."""
        e = energy(self.net(self.x_pos))
        penalty, log = self.small(e, "l2_pos")
        return self.p_x_weight * e.mean() + penalty, {"e_pos": e.mean(), **log}

    def sampled(self):
        """log p(x) of sampled images."""
        classes, n = None, len(self.x_pos)
        if self.args.class_cond_p_x_sample:  # chains for uniform y, used as samples of p(x)
            classes = torch.randint(self.model.config["n_classes"], (n,),
                                    generator=self.streams.host)
        e, saturated = self.negative_energy("x", n, classes)
        penalty, log = self.small(e, "l2_neg")
        return (-self.p_x_weight * e.mean() + penalty,
                {"e_neg": e.mean(), "saturated": saturated, **log})

    def labelled(self):
        """log p(y|x), and log p(x, y) of real images."""
        args, x, y = self.args, self.x_lab, self.y
        if args.adversarial != "none":
            x = adversarial_batch(self.model, x.clamp(-1, 1), y,
                                  ball_radius(args.adv_eps, args.adversarial), args.adversarial,
                                  steps=args.adv_steps, generator=self.streams.device)
        logits = self.net(x)
        ce = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
        log = {"ce": ce, "accuracy": (logits.argmax(1) == y).float().mean()}
        loss = args.p_y_given_x_weight * ce
        if args.p_x_y_weight:
            log["e_pos_y"] = energy(logits, y).mean()
            loss = loss + args.p_x_y_weight * log["e_pos_y"]
        return loss, log

    def sampled_per_class(self):
        """log p(x, y) of sampled images."""
        e, saturated = self.negative_energy("x, y", len(self.y_lab), self.y_lab, self.y)
        return -self.args.p_x_y_weight * e.mean(), {"e_neg_y": e.mean(), "saturated": saturated}

    def negative_energy(self, name, n, classes, y_of_energy=None):
        """Energies [n] of the negative samples called ``name``, drawn at the first call, and the
        fraction of their pixels at the bounds."""
        if name not in self.negatives:
            self.negatives[name] = self.chains(n, classes)
        x_neg = self.negatives[name]
        with of_sampled(self.model, self.args):
            e = energy(self.net(x_neg), y_of_energy)
        return e, (x_neg.abs() >= 1).float().mean()

    def small(self, e, name):
        """--energy_l2: the penalty that keeps energies near 0, and what to log of it."""
        if not self.args.energy_l2:
            return 0.0, {}
        penalty = self.args.energy_l2 * e.square().mean()
        return penalty, {name: penalty}


def backward(parts, net):
    """Backpropagate the terms of every part of the batch. Returns the means of the logged scalars.

    Gradients are averaged over the parts. The last pass also averages them over the processes.
    """
    passes, logs = [term for part in parts for term in part], []
    for i, term in enumerate(passes):
        with accumulating(net) if i < len(passes) - 1 else nullcontext():
            loss, log = term()
            (loss / len(parts)).backward()
        logs.append({"loss": loss.detach()} | {k: v.detach() for k, v in log.items()})
    loss = sum(log["loss"] for log in logs) / len(parts)  # a part's is the sum of its terms
    return means_of(logs) | {"loss": loss}


def train_step(args, setup, draw):
    """One iteration of Algorithm 2, lines 2 to 6. Returns the means of the logged scalars."""
    state, data = setup.state, setup.data
    seed_layers(state.seed, state.step, distributed.rank())

    # set the learning rate
    lr = learning_rate(state.step, data.steps_per_epoch, args)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * state.lr_factor

    # prepare this process's parts of the global batch, which it computes one after the other
    weight, parts = p_x_weight(state.step, data.steps_per_epoch, args), []
    for i in range(args.accumulate):
        part = i * distributed.world() + distributed.rank()
        buffer = None if state.buffer is None else state.buffer.share(i, args.accumulate)
        parts.append(loss_terms(state, draw, data.batch(state.step, part), buffer, setup.p0, args,
                                seed_step(state.seed, state.step, part, data.device), weight))

    # run the chains, compute loss and gradients
    state.optimizer.zero_grad(set_to_none=False)  # see build.new_model
    metrics = backward(parts, state.net)
    parameters = list(state.model.parameters())
    metrics["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if args.sam:
        sharpness_aware(args.sam, state, parts, parameters, args.sam_adaptive)

    # update the weights
    state.optimizer.step()
    if state.average is not None:
        state.average.update_parameters(state.model)
    state.step += 1
    return metrics


def sharpness_aware(radius, state, parts, parameters, adaptive=False):
    """Replace the gradients g at the weights w by those at the worst point within ``radius``.

    To first order that point is w + radius * g / |g| (Foret et al., 2021). ``adaptive`` scales by
    the size of each weight: w + radius * w^2 g / |w g| (Kwon et al., 2021). Only the first pass
    updates the running statistics of batch norm.
    """
    with torch.no_grad():
        moves = [p.grad * p.square() if adaptive else p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(
            [p * p.grad for p in parameters] if adaptive else moves)
        weights = [p.detach().clone() for p in parameters]
        statistics = [b.clone() for b in state.model.buffers()]
        for p, move in zip(parameters, moves, strict=True):
            p += radius / (norm + 1e-12) * move
    state.optimizer.zero_grad(set_to_none=False)  # see build.new_model
    backward(parts, state.net)
    with torch.no_grad():
        for p, weight in zip(parameters, weights, strict=True):
            p.copy_(weight)
        for b, kept in zip(state.model.buffers(), statistics, strict=True):
            b.copy_(kept)


def train(args, setup, log, stop):
    """The loop. Returns (reason, detail) of its end. RUN/last.pt then holds the last good state."""
    state, data = setup.state, setup.data
    draw, guard = make_sampler(args), Guard(args, data.spec.n_classes)
    end = args.n_epochs * data.steps_per_epoch
    total = min(end, args.max_steps or end)
    look_every = 1 if data.device.type == "cpu" else args.check_every
    window, rows = [], []  # scalars of the last steps, on the device and fetched
    bar = tqdm(total=total, initial=state.step, unit="step",
               disable=distributed.rank() > 0 or None)
    log.start_clock(state.step)
    while state.step < total:
        # step: the logged scalars stay on the device
        window.append(train_step(args, setup, draw))
        bar.update()
        now = due(state.step, total, data.steps_per_epoch, look_every, args)
        if not now.look:
            continue  # do not wait for the device

        # check: has the run diverged? should it stop?
        new = fetch(window)
        window.clear()
        stopping = distributed.first(stop.reason())
        saving = now.save or stopping is not None
        if trouble := guard.look(state, new, before_saving=saving):
            if not go_back(args, setup, trouble, log, bar):
                return "diverged", f"{trouble[1]} at step {trouble[0]}"
            rows.clear()
            continue

        # log
        rows += new
        means = means_of(rows)
        if now.log or saving:
            log.steps(state, means)
            bar.set_postfix({k: f"{v:.3g}" for k, v in means.items()})
            rows.clear()

        # evaluate, save
        epoch = state.step // data.steps_per_epoch
        if now.evaluate or now.keep:
            judge(args, setup, now, epoch, means, log)
        if saving:
            save_last(args.run_dir, state, epoch, log, args.good_after)
            log.start_clock(state.step)
        if stopping and state.step < total:
            return stopping, "state saved; the same command goes on"
    return ("finished", "") if state.step >= end else ("max_steps", "")


def go_back(args, setup, trouble, log, bar):
    """Save the diverged state as diverged.pt and roll back. Returns False if not allowed to."""
    state, (step, cause) = setup.state, trouble
    checkpoint.save(Path(args.run_dir) / "diverged.pt", state,
                    state.step // setup.data.steps_per_epoch)
    if args.on_divergence == "stop" or state.rollbacks >= args.max_rollbacks:
        return False
    roll_back(args.run_dir, setup, args, step, cause, log)
    bar.clear()
    say(f"step {step}: {cause}: back to step {state.step} with other random numbers "
        f"(rollback {state.rollbacks} of {args.max_rollbacks})")
    bar.n = state.step
    return True


def judge(args, setup, now, epoch, means, log):
    """Evaluate the network and keep it as epoch_NNNN.pt, as far as that is due ``now``."""
    network = judged(args, setup.state, setup.data)
    if now.evaluate:
        evaluate(args, setup, network, epoch, means, log)
    if now.keep:
        checkpoint.save(log.dir / f"epoch_{epoch:04d}.pt", setup.state, epoch, judged=network)


def judged(args, state, data):
    """The network that is evaluated and published.

    With --ema it has the averaged weights. With --recalibrate_bn n its running statistics are
    recomputed over n training images.
    """
    model = state.model if state.average is None else state.average.module
    distributed.same_buffers(model)
    if args.recalibrate_bn:
        model = recalibrated(model, data.images.x[:args.recalibrate_bn], args.batch_size,
                             layout_of(args))
    return model


def evaluate(args, setup, network, epoch, means, log):
    """Log the accuracies of ``network`` in eval mode, draw buffer and curves, update best.pt.

    best.pt is chosen by validation accuracy. Without validation images it is the latest, and so it
    is before log p(x) begins (--p_x_from): no classifier of the first stage competes with the JEM,
    not even after a rollback to that stage.
    """
    state = setup.state
    begun = state.step > args.p_x_from * setup.data.steps_per_epoch
    scores = {"valid_accuracy": accuracy(network, setup.valid),
              "test_accuracy": accuracy(network, setup.test)}
    log.write("eval", state.step, epoch=epoch, **scores)
    log.curves()
    if state.buffer is not None:
        x = state.whole_buffer()
        log.samples(f"epoch_{epoch:04d}", x[evenly_spaced(len(x), 100)], state.step)
    if not state.is_finite(network):  # --recalibrate_bn can cause this
        say("best.pt is left as it is: the network's running statistics are not all finite")
    elif scores["valid_accuracy"] is None or (
            scores["valid_accuracy"] > state.best and (begun or state.best < 0)):
        state.best = (scores["valid_accuracy"] if begun else None) or -1.0
        checkpoint.save(log.dir / "best.pt", state, epoch, judged=network)
    parts = [f"{k} {100 * v:.2f} %" for k, v in scores.items() if v is not None]
    parts += [f"{k} {v:.3f}" for k, v in means.items() if k.startswith("e_")]
    say(f"epoch {epoch:3d}  {'  '.join(parts)}")


def main(argv=None):
    args = cli.train_args(argv)
    if args.dry_run:
        cli.print_json(vars(args))
        return program.EXIT_OK
    run_dir = Path(args.run_dir)
    cli.check_run_dir(run_dir, args)
    device = machine.pick_device(args.device, args.num_threads)
    machine.set_switches(args, device)
    distributed.start(device, args.dist_timeout)
    if args.sync_bn and device.type == "cpu":
        raise InputError("--sync_bn is for GPUs: PyTorch has none on a CPU")
    setup = build(args, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        refused = None
        if distributed.rank() == 0:
            try:
                held.enter_context(checkpoint.locked(run_dir))
            except InputError as error:
                refused = str(error)
        if refused := distributed.first(refused):
            raise InputError(refused)
        code = run(args, run_dir, setup)
    distributed.barrier()  # no process exits while another still needs it
    return code


def run(args, run_dir, setup):
    """Resume the run or start it, train, close the log. Returns the exit code."""
    state, data = setup.state, setup.data
    resumed = resume(run_dir, setup, args)
    if resumed is not None:
        say(f"continuing {run_dir} after step {state.step}")
    elif args.load_path:
        opened = load_start(args, state)
        say(f"starting with the weights of {args.load_path} (SHA-256 {opened.sha256[:8]})")
    for line in (about_chains(data.steps_per_epoch, args),
                 machine.about_threads(data.device, args.num_threads)):
        if line:
            say(line)
    distributed.barrier()  # all ranks have read the files that rank 0 may now replace
    if distributed.rank() == 0:
        records.write_json(run_dir / "args.json", vars(args))
    header = {"args": vars(args), "env": records.environment(data.device),
              "sampler": sampler_name(args), "network": network_name(vars(args)),
              "steps_per_epoch": data.steps_per_epoch, "n_train": len(data.images.y),
              "n_labelled": len(data.images.y if data.few is None else data.few),
              "n_valid": len(setup.valid.y), "n_test": len(setup.test.y),
              **data.images.about,
              "parameters": sum(p.numel() for p in state.model.parameters()),
              "processes": distributed.world(), **(resumed or {})}
    log = RunLog(run_dir, state.step, header, state.log_lines)
    reason, detail = train(args, setup, log, Stop(args.max_minutes))
    if reason in ("max_steps", "max_minutes") and not distributed.gather(
            (run_dir / "best.pt").exists())[0]:  # it ended before any evaluation
        evaluate(args, setup, judged(args, state, data), state.step // data.steps_per_epoch, {},
                 log)
    code = {"finished": program.EXIT_OK, "max_steps": program.EXIT_OK,
            "diverged": program.EXIT_DIVERGED}.get(reason, program.EXIT_STOPPED)
    log.close(state.step, reason=reason, detail=detail, exit_code=code,
              rollbacks=state.rollbacks)
    after = f" after {state.rollbacks} rollbacks" if state.rollbacks else ""
    say(f"{reason} at step {state.step}{after}{': ' if detail else ''}{detail} ({run_dir})")
    return code


if __name__ == "__main__":
    program.run(main)
