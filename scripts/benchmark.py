#!/usr/bin/env python3
"""Time a sampling call and a training iteration, ours against scripts/literal.py, interleaved.

    python scripts/benchmark.py --dataset digits --depth 10 --width 1 --repeats 5 --json
    python scripts/benchmark.py --networks 28-10 28-2 --M 5 10 20 --N 5 10 20 --jem --fast
    python scripts/benchmark.py --check        # compare the two step by step, without timing

Accepts the flags of train_jempp.py. In each round, every configuration of a network has one turn.
Prints the medians over the rounds, their ratio, and the arithmetic rate from counted operations.
The ceiling is the rate of a matrix product in the same precision, measured between the turns. On a
CPU our turns use the memory settings of utils/machine.py. The literal turns use glibc's own, like
the released code.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import start  # noqa: E402

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

import torch  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity  # noqa: E402

import train_jempp  # noqa: E402
from models import network_name  # noqa: E402
from samplers import make_sampler  # noqa: E402
from scripts.literal import Literal, check  # noqa: E402
from scripts.operations import forward_flop, forward_images  # noqa: E402
from utils import cli, flags, machine, program  # noqa: E402
from utils.files import records  # noqa: E402
from utils.seeding import seed_step  # noqa: E402
from utils.training.build import Setup, build  # noqa: E402

SWITCHES = ("compile", "amp", "tf32", "cudnn_benchmark", "channels_last")
JEM_FLAGS = Path(__file__).with_name("jem.flags").read_text(encoding="utf-8").split()
# Flags that must keep these values: operations are counted for the first set, and the literal side
# implements the second.
COUNTED = {"p_x_weight": 1.0, "p_y_given_x_weight": 1.0, "p_x_y_weight": 0.0, "accumulate": 1,
           "adversarial": "none", "sam": 0.0}
LITERAL = {"optimizer": "sgd", "nesterov": False, "label_smoothing": 0.0, "ema": 0.0,
           "init": "informative", "sample_mode": "train", "sgld_lr": 0.0, "sgld_std": 0.0,
           "step_decay": 1.0, "pixel_clamp": True, "class_cond_p_x_sample": False}
TURN = {"cpu": 1, "cuda": 3}  # iterations; on a GPU the host runs ahead of the device


def milliseconds(work, device, n=1):
    """Mean wall time of ``n`` calls of ``work``, including the device's queue."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(n):
        work()
    wait()
    return 1000 * (time.perf_counter() - start) / n


def warm_up(build, iteration, device):
    """(the side made by ``build()``, facts measured before the timing).

    ``first_step_s`` includes compilation and the choice of algorithms. ``peak_gib`` is the side's
    peak GPU memory in a later iteration. ``reserved_gib`` also counts memory that only the
    allocator sees, such as that of CUDA graphs. Both are None on a CPU.
    """
    on_gpu = device.type == "cuda"
    before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if on_gpu else None
    side = build()
    facts = {"first_step_s": milliseconds(lambda: iteration(side), device) / 1000,
             "peak_gib": None, "reserved_gib": None}
    if on_gpu:
        milliseconds(lambda: iteration(side), device, 2)  # records CUDA graphs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        milliseconds(lambda: iteration(side), device)
        facts["peak_gib"] = (torch.cuda.max_memory_allocated() - before[0]) / 2**30
        facts["reserved_gib"] = (torch.cuda.max_memory_reserved() - before[1]) / 2**30
        torch.cuda.empty_cache()
    return side, facts


def our_iteration(args, state, data, p0):
    train_jempp.train_step(args, Setup(state, data, p0), make_sampler(args))


def our_sampling(args, state, data, p0):
    streams = seed_step(args.seed, state.step, 0, data.device)
    train_jempp.sample_negatives(state.model, make_sampler(args), state.buffer, p0,
                                 args.batch_size, args, streams)


def matrix_product(args, device):
    """(a large matrix product in the precision in use, its operations, the precision's name)."""
    n = 8192 if device.type == "cuda" else 2048
    name = "bfloat16" if args.amp == "bf16" else "float32"
    a, b, out = (torch.randn(n, n, device=device).to(getattr(torch, name)) for _ in range(3))
    rounded = name == "float32" and args.tf32 and device.type == "cuda"
    return functools.partial(torch.mm, a, b, out=out), 2 * n**3, "tf32" if rounded else name


def prepare(method, several, device, literal):
    """Yield (method, args, {name: work}, facts) for each configuration of a method, warmed up.

    Configurations differ only in M and N. They share weights and continue each other's training.
    """
    args = several[0]
    (state, data, p0), facts = warm_up(lambda: build(args, device)[:3],
                                       lambda side: our_iteration(args, *side), device)
    if literal:
        other, more = warm_up(lambda: Literal(args, data, p0), lambda side: side.step(args), device)
        facts |= {f"literal_{name}": value for name, value in more.items()}
    for args in several:
        work = {"fast_ms": functools.partial(our_iteration, args, state, data, p0),
                "sampling_ms": functools.partial(our_sampling, args, state, data, p0)}
        if literal:
            work |= {"literal_ms": functools.partial(other.step, args),
                     "literal_sampling_ms": functools.partial(other.sample, args)}
        facts["flop"] = forward_flop(state.model.config, args.image_size,
                                     forward_images(vars(args)))
        yield method, args, work, dict(facts)


def measure(group, own, device):
    """Time the configurations {method: [args, ...]} of one network. Returns one result for each."""
    product, product_flop, precision = matrix_product(group["JEM++"][0], device)
    rows = [row for method, several in group.items() for row in
            prepare(method, several, device, literal=method == "JEM++" and own.only != "ours")]
    times, ceiling = [{name: [] for name in work} for _, _, work, _ in rows], []
    for _ in range(own.repeats):
        for (_, _, work, _), row_times in zip(rows, times, strict=True):
            for name, values in row_times.items():
                machine.keep_freed_memory(not name.startswith("literal"))
                values.append(milliseconds(work[name], device, TURN[device.type]))
        machine.keep_freed_memory()
        ceiling.append(product_flop / milliseconds(product, device, TURN[device.type]) / 1e9)
    shared = {"ceiling_tflops": statistics.median(ceiling), "ceiling_precision": precision,
              "repeats": own.repeats, **records.environment(device),
              "threads": torch.get_num_threads(), "time": records.now()}
    results = [summary(method, args, row_times, facts | shared)
               for (method, args, _, facts), row_times in zip(rows, times, strict=True)]
    for r in results:
        r["speedup_over"] = {other["method"]: other["fast_ms"] / r["fast_ms"] for other in results
                             if r["method"] == "JEM++" != other["method"]}
    if own.profile:
        with open(own.profile, "a") as file:
            file.writelines(
                f"{headline(r)}\n{profile(work['fast_ms'], device, r['fast_ms'])}\n\n"
                for (_, _, work, _), r in zip(rows, results, strict=True))
    return results


def summary(method, args, times, known):
    """One configuration's JSON object."""
    ms = dict.fromkeys(("literal_ms", "fast_ms", "literal_sampling_ms", "sampling_ms"))
    ms |= {name: statistics.median(values) for name, values in times.items()}
    tflops = known["flop"] / ms["fast_ms"] / 1e9
    return {"method": method, **ms, "ratio": ms["literal_ms"] and ms["literal_ms"] / ms["fast_ms"],
            "sampling_ratio": ms["literal_ms"] and ms["literal_sampling_ms"] / ms["sampling_ms"],
            "images_per_s": 1000 * args.batch_size / ms["fast_ms"], "tflops": tflops,
            "ceiling_share": tflops / known["ceiling_tflops"], **known, "times_ms": times,
            "args": vars(args)}


def profile(iteration, device, ms):
    """A text table of where the time of one iteration goes.

    It lists kernels and CUDA runtime calls on a GPU, operators on a CPU. ``ms`` is an iteration's
    time without the profiler. The GPU counts as idle for the part of it that kernels do not fill.
    """
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        milliseconds(iteration, device)
    events = [e for e in profiler.key_averages() if not e.is_user_annotation]
    rows = sorted(((e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key)
                   for e in events if (e.device_type == DeviceType.CUDA) == on_gpu), reverse=True)
    total = sum(us for us, _, _ in rows) / 1000
    lines = [f"  {total:.2f} ms of operators under the profiler, {ms:.2f} ms without it"]
    if on_gpu:
        calls = [f"{e.key} {e.count}" for e in events
                 if e.device_type == DeviceType.CPU and e.key.startswith("cu")]
        lines = [f"  {sum(count for _, count, _ in rows)} kernels and copies, {total:.2f} ms of "
                 f"{ms:.2f} ms: GPU idle {max(0.0, 100 - 100 * total / ms):.1f} %",
                 f"  runtime calls: {', '.join(calls)}"]
    lines += [f"  {us / 1000:9.2f} ms {us / total / 10:5.1f} % {count:6d} x  {key[:110]}"
              for us, count, key in rows[:15]]
    return "\n".join(lines)


def headline(r):
    args = r["args"]
    return (f"{network_name(args)} {r['method']}, M={args['n_steps']} "
            f"N={args['in_steps']}, norm {args['norm']}, B={args['batch_size']}; {r['device']}, "
            f"{r['threads']} threads; {', '.join(f'{name} {args[name]}' for name in SWITCHES)}")


def show(r):
    """Print a result as text."""
    print(headline(r))
    for found in r.get("check", []):
        print(f"    {r['precision']} step {found['step']} - the literal one, largest: weights "
              f"{found['weights']:.1e} (all: {found['relative']:.1e} of the step), statistics "
              f"{found['statistics']:.1e}, buffer {found['buffer']:.1e}")
    if "check" in r:
        return

    def literal(theirs, ours):
        return "" if theirs is None else f" (literal {theirs:.5g}, {theirs / ours:.2f}x)"

    words = [f"iteration {r['fast_ms']:.5g} ms" + literal(r["literal_ms"], r["fast_ms"]),
             f"sampling {r['sampling_ms']:.5g} ms"
             + literal(r["literal_sampling_ms"], r["sampling_ms"]),
             f"{r['images_per_s']:.0f} images/s",
             f"{r['tflops']:.3g} TFLOP/s, {100 * r['ceiling_share']:.1f} % of "
             f"{r['ceiling_tflops']:.3g} ({r['ceiling_precision']})"]
    if r["peak_gib"] is not None:
        words.append(f"peak {r['peak_gib']:.2f} GiB"
                     + literal(r.get("literal_peak_gib"), r["peak_gib"]))
    words += [f"{name} takes {value:.2f}x" for name, value in r["speedup_over"].items()]
    print(f"    {'; '.join(words)}; first iteration {r['first_step_s']:.1f} s")


def configurations(own, rest):
    """[{method: [args, ...]}, ...], one for each network. InputError for unsupported flags."""
    networks = [["--depth", d, "--width", w] for d, w in own.networks or []] or [[]]
    samplers = [m + n for m in [["--n_steps", str(m)] for m in own.M or []] or [[]]
                for n in [["--in_steps", str(n)] for n in own.N or []] or [[]]]
    groups = []
    for network in networks:
        def parsed(words, network=network):
            return cli.train_args([*rest, *network, *words])

        several = [parsed(words) for words in samplers]
        groups.append({"JEM++": several})
        if own.jem:
            groups[-1] |= {"JEM": [parsed(JEM_FLAGS)],
                           "JEM, same norm": [parsed([*JEM_FLAGS, "--norm", several[0].norm])]}
        keep = COUNTED if own.only == "ours" and not own.check else COUNTED | LITERAL
        wrong = [f"--{k}" for k, v in keep.items() if getattr(several[0], k) != v]
        if wrong:
            raise program.InputError(f"{', '.join(wrong)}: the literal side does not have this, or "
                                 "operations are not counted for it (--only ours allows more)")
    return groups


def network(text):
    """An argparse type: "28-10" to ("28", "10")."""
    depth, dash, width = text.partition("-")
    if not (dash and depth.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no network: depth-width, as in 28-10")
    return depth, width


def checked(group, own, device):
    """Yield the result of ``check`` for each configuration of JEM++."""
    for args in group["JEM++"]:
        state, data, p0, _, _ = build(args, device)
        state.step = args.warmup_iters
        yield {"method": "JEM++", "precision": own.check,
               "check": check(args, state, data, p0, getattr(torch, own.check)),
               **records.environment(device), "threads": torch.get_num_threads(),
               "args": vars(args), "time": records.now()}


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("--networks", type=network, nargs="+", metavar="DEPTH-WIDTH",
                   help="of a grid, as 28-10 28-2 (--depth and --width)")
    p.add_argument("--M", type=flags.POSITIVE, nargs="+", help="of a grid (--n_steps)")
    p.add_argument("--N", type=flags.POSITIVE, nargs="+", help="of a grid (--in_steps)")
    p.add_argument("--jem", action="store_true",
                   help="time JEM, K = 20, too: as published, and with the same norm as JEM++")
    p.add_argument("--only", choices=("ours",), help="leave the literal side out")
    p.add_argument("--repeats", type=flags.POSITIVE, default=5, help="interleaved rounds")
    p.add_argument("--profile", type=program.path, metavar="FILE",
                   help="append a table of where the time of one iteration goes")
    p.add_argument("--check", nargs="?", choices=("float32", "float64"), const="float32",
                   help="instead of times, the largest differences between three of our steps and "
                        "the literal ones from the same states, past the warm-up")
    p.add_argument("--json", action="store_true", help="a JSON object a configuration, no text")
    p.add_argument("--show", type=program.path, metavar="FILE",
                   help="print what --json left in FILE, and stop")
    own, rest = p.parse_known_args(argv)
    program.refuse_torchrun("times one process; benchmark_scaling.py times several")
    if own.show:
        if not Path(own.show).is_file():
            raise program.InputError(f"--show {own.show}: there is no such file")
        for r in records.read_jsonl(own.show):
            show(r)
        return program.EXIT_OK
    if own.profile:
        open(own.profile, "a").close()  # fail now, not after hours, if it cannot be written
    if own.check:
        rest = [*rest, "--reinit_freq", "0"]  # both sides get the same x_0
    groups = configurations(own, rest)
    first = groups[0]["JEM++"][0]
    device = machine.pick_device(first.device, first.num_threads)
    machine.set_switches(first, device)
    for group in groups:
        for r in checked(group, own, device) if own.check else measure(group, own, device):
            if own.json:
                print(json.dumps(records.jsonable(r)), flush=True)
            else:
                show(r)
        torch.compiler.reset()  # free this network's programs and CUDA graphs
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
