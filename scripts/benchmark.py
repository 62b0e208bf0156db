#!/usr/bin/env python3
"""Time a sampling call and a training iteration, ours against scripts/literal.py, interleaved.

    python scripts/benchmark.py --dataset digits --depth 10 --width 1 --repeats 5 --json

Takes the flags of train_jempp.py besides its own. Prints medians over the repeats, their ratio,
the arithmetic rate from counted operations, and a matrix product's rate measured in between
(float32, TF32 off) as the ceiling.
"""

import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_jempp  # noqa: E402
from models import JEM  # noqa: E402
from samplers import make_sampler  # noqa: E402
from scripts.literal import OneByOneGaussians, literal_sample, literal_step  # noqa: E402
from utils import cli, records  # noqa: E402
from utils.seeding import seed_step  # noqa: E402


def milliseconds(work, device):
    """Wall time of ``work()``, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def forward_flop(config, size, batch_size):
    """Operations (2 per multiply-add) of one forward pass over a batch, counted on no device."""
    with torch.device("meta"):
        model, x = JEM.wide_resnet(**config).eval(), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() * batch_size


def forward_equivalents(args):
    """Passes of one iteration in forwards (backward to the input 1, to the weights as well 2)."""
    real = 3 * bool(args.p_y_given_x_weight) + 3 * bool(args.p_x_weight)
    return real + bool(args.p_x_weight) * (2 * args.n_steps + 3)


def matrix_product_tflops(device, n):
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    return 2 * n**3 / milliseconds(lambda: a @ b, device) / 1e9


def measure(args, repeats):
    """One configuration: build it twice, warm both up, then time them turn by turn."""
    device = cli.pick_device(args.device, args.num_threads)
    state, data, p0, _, _ = train_jempp.build(args, device)
    literal = copy.deepcopy(state)
    literal.model.to(memory_format=torch.contiguous_format)
    literal.optimizer = torch.optim.SGD(literal.model.parameters(), args.lr, momentum=0.9,
                                        weight_decay=args.weight_decay)
    gaussians, draw = OneByOneGaussians(p0), make_sampler(args)

    def fast_sampling():
        streams = seed_step(args.seed, 0, 0, device)
        train_jempp.sample_negatives(state.model, draw, state.buffer, p0, args, streams)

    timed = {
        "literal_ms": lambda: literal_step(literal, data.batch(state.step), gaussians, args),
        "fast_ms": lambda: train_jempp.train_step(args, state, draw, data, p0),
        "literal_sampling_ms": lambda: literal_sample(literal.model, literal.buffer.images,
                                                      gaussians, args),
        "sampling_ms": fast_sampling}
    size = 4096 if device.type == "cuda" else 2048
    times, ceiling = {name: [] for name in timed}, []
    for work in timed.values():
        work()
    matrix_product_tflops(device, size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        for name, work in timed.items():
            times[name].append(milliseconds(work, device))
        ceiling.append(matrix_product_tflops(device, size))
    result = {name: statistics.median(values) for name, values in times.items()}
    flop = forward_flop(state.model.config, args.image_size, args.batch_size)
    result |= {
        "ratio": result["literal_ms"] / result["fast_ms"],
        "sampling_ratio": result["literal_sampling_ms"] / result["sampling_ms"],
        "images_per_s": 1000 * args.batch_size / result["fast_ms"],
        "tflops": flop * forward_equivalents(args) / result["fast_ms"] / 1e9,
        "ceiling_tflops": statistics.median(ceiling), "repeats": repeats,
        "times_ms": times, **records.environment(device),
        "threads": torch.get_num_threads(), "args": vars(args), "time": records.now()}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return result


def main(argv=None):
    p = cli.parser(__doc__.splitlines()[0])
    p.add_argument("--repeats", type=cli.POSITIVE, default=5, help="interleaved rounds")
    p.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    own, rest = p.parse_known_args(argv)
    args = train_jempp.parse_args(rest)
    if not args.p_x_weight or not args.in_steps or args.init != "informative":
        raise cli.InputError("the literal side is PYLD from class Gaussians: keep --p_x_weight, "
                             "--in_steps and --init as they are")
    result = measure(args, own.repeats)
    if own.json:
        print(json.dumps(cli.jsonable(result)))
        return cli.EXIT_OK
    print(f"WRN-{args.depth}-{args.width}, PYLD-{args.n_steps}-{args.in_steps}, B={args.batch_size}"
          f", {result['device']}, {result['threads']} threads, medians of {own.repeats}")
    for what, a, b, ratio in (("sampling call", "literal_sampling_ms", "sampling_ms",
                               "sampling_ratio"), ("iteration", "literal_ms", "fast_ms", "ratio")):
        print(f"{what:14s} literal {result[a]:9.1f} ms   ours {result[b]:9.1f} ms   "
              f"ratio {result[ratio]:.2f}")
    print(f"{result['images_per_s']:.0f} images/s, {result['tflops']:.3f} TFLOP/s of a measured "
          f"{result['ceiling_tflops']:.3f}")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
