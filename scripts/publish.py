#!/usr/bin/env python3
"""Make a publishable model from a finished run, and a model card from its records.

    python scripts/publish.py model runs/jempp results/models/NAME
    python eval_jempp.py --load_path results/models/NAME --results results/models/NAME/...
    python scripts/publish.py card results/models/NAME

``model`` writes NAME/model.safetensors, NAME/config.json and NAME/run.json. model.safetensors holds
the weights of best.pt (--half: rounded to float16) and --n_buffer images of its replay buffer as
uint8. config.json holds what evaluation needs. run.json describes the run. ``card`` writes
NAME/README.md from run.json, NAME/*.jsonl and the pictures beside them.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import start  # noqa: E402

if __name__ == "__main__":
    start.begin()  # before the imports, which take seconds

from samplers import evenly_spaced  # noqa: E402
from scripts.operations import run_pflop  # noqa: E402
from utils import cli, flags, plots, program  # noqa: E402
from utils.files import checkpoint, published, records  # noqa: E402
from utils.files.torch_files import read  # noqa: E402

# flags on which the defaults of others depend
DECIDING = ("dataset", "image_size", "optimizer", "global_batch_size")
# of a machine; batch_size, one process's share, follows from --global_batch_size
NOT_TYPED = {"run_dir", "data_root", "download", "num_threads", "device", "max_minutes",
             "batch_size"}
PERCENT = {"accuracy", "ece", "ece_adaptive", "robust_accuracy"}


def publish(run_dir, out, n_buffer, half=False, start=None):
    """Write RUN/best.pt without what only training needs. Returns the folder ``out``.

    ``start`` is the folder of the run with whose best.pt it began (--load_path).
    """
    content = checkpoint.check(read(run_dir / "best.pt"), run_dir / "best.pt")
    log, begun = records.read_log(run_dir), start and beginning(start, content)
    if not log or log[-1].get("reason") != "finished":
        raise program.InputError(f"{run_dir} has not finished: run its training command again")
    if content["buffer"] is not None:
        slots = published_slots(content, n_buffer)
        content["buffer"] = plots.to_uint8(content["buffer"][slots])
    if half:
        content["model"] = {k: v.half() if v.is_floating_point() else v
                            for k, v in content["model"].items()}
        if not checkpoint.all_finite(content["model"]):
            raise program.InputError(f"{run_dir}/best.pt has numbers beyond float16: drop --half")
    content.pop("ages", None)  # of the whole buffer; nobody goes on with these chains
    for name in ("run_dir", "data_root"):  # of this machine
        content["args"].pop(name, None)
    content["args"] |= {"data_root": "data", "run_dir": run_dir.name}
    if content["args"].get("load_path"):
        content["args"]["load_path"] = Path(content["args"]["load_path"]).name
    content["format"] = checkpoint.FORMAT
    published.write(out, content, checkpoint.digest)
    write_account(out, log, content, begun)
    return out


def published_slots(content, n):
    """The numbers of ``n`` slots of the replay buffer. Class blocks stay class blocks."""
    classes = content["config"]["n_classes"]
    if cli.per_class(argparse.Namespace(**content["args"])) and n > classes:
        n -= n % classes
    return evenly_spaced(len(content["buffer"]), n)


def beginning(start, content):
    """The account of START/best.pt, with whose weights the run of ``content`` began."""
    if checkpoint.sha256_of(start / "best.pt") != content["args"].get("load_sha256"):
        raise program.InputError(f"the run did not begin with the weights of {start}/best.pt")
    first, log = read(start / "best.pt"), records.read_log(start)
    args = records.header_of(log)["args"] | {"max_steps": first["step"]}
    return account([r for r in log if r["step"] <= first["step"]], first["config"], args)


def write_account(out, log, content, begun):
    """Write NAME/run.json: the run's flags, cost, machine and epochs, and how it had ``begun``.

    step and epoch are those of the weights, run_step and run_epoch those at the run's end.
    """
    header = records.header_of(log)
    steps = [r for r in log if r["kind"] == "step"]
    records.write_json(out / "run.json", {
        **account(log, content["config"], header["args"] | content["args"]), "env": header["env"],
        "threads": header["args"]["num_threads"], "parameters": header["parameters"],
        "n_train": header["n_train"], "step": content["step"], "epoch": content["epoch"],
        "rollbacks": log[-1].get("rollbacks"),
        **({"start": begun} if begun else {}),
        "evaluations": [
            {k: r.get(k) for k in ("epoch", "valid_accuracy", "test_accuracy")}
            for r in log if r["kind"] == "eval"],
        "last_step": {k: v for k, v in steps[-1].items() if k != "kind"}})


def account(log, config, args):
    """Of the flags ``args`` those that are no defaults, and what the steps of ``log`` cost."""
    header, taken = records.header_of(log), log[-1]["step"]
    plain = vars(cli.train_args(["--dataset", args["dataset"]]))
    first = [f"--{k}={args[k]}" for k in DECIDING if args.get(k) is not None]
    defaults = vars(cli.train_args(first)) | {k: plain[k] for k in DECIDING}
    names = vars(cli.train_parser().parse_args([])).keys() - NOT_TYPED
    typed = {k: v for k, v in args.items() if k in names
             and (k == "dataset" or records.jsonable(defaults.get(k)) != v)}
    return {"flags": typed, "minutes": round(records.seconds_of(log) / 60, 1), "run_step": taken,
            "run_epoch": taken // header["steps_per_epoch"],
            "pflop": run_pflop(header["args"], config, header["n_train"], taken)}


def training(name, start, run):
    """The commands that trained model NAME, from its run.json: of the run it began with, too."""
    if not start:
        return [command(run["flags"])]
    first = f"runs/{name}-start"
    return [command(start["flags"] | {"run_dir": first}),
            command(run["flags"] | {"load_path": f"{first}/best.pt"})]


def command(flags):
    """A training command."""
    words = []
    for name, value in sorted(flags.items()):
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([f"--{name}", *map(str, values)]))
    return "python train_jempp.py " + " ".join(words)


def card(out):
    """Write NAME/README.md from run.json, the records and the pictures."""
    run = json.loads((out / "run.json").read_text())
    weights = hashlib.sha256((out / published.TENSORS).read_bytes()).hexdigest()
    env, flags = run["env"], run["flags"]
    shown = out.name if out.is_absolute() else out.as_posix()  # no path of this machine
    kind, buffer, precision = "softmax network", "", weights_precision(out)
    epoch = run.get("run_epoch", run["epoch"])
    best = f" The weights are those after epoch {run['epoch']}." if epoch != run["epoch"] else ""
    start = run.get("start")
    begun = f", after the first command's run of {cost(start)}" if start else ""
    if flags.get("p_x_weight", 1) or flags.get("p_x_y_weight", 0):
        kind, buffer = "JEM++", " and images of the replay buffer as uint8"
    lines = [
        f"# {out.name}", "",
        f"A {kind} of {run['parameters']:,} parameters on {flags.get('dataset', 'cifar10')}, "
        f"trained for {cost(run)}{begun}, on {env['device']}, {env['cpu']}, "
        f"{run['threads'] or 'all'} thread(s), with torch {env['torch']} at "
        f"commit {(env['commit'] or 'unknown')[:8]}. Rollbacks: {run['rollbacks']}.{best}", "",
        "All numbers on this page are †: the network is far smaller and the run far shorter than "
        f"the paper's. `{published.TENSORS}` holds {precision} weights{buffer}. Its SHA-256 is "
        f"`{weights}`.", "",
        "```bash", *training(out.name, start, run), "",
        *(f"python eval_jempp.py --load_path {shown} {words}" for words in measuring(out)),
        "```", "", *table(out), ""]
    for picture in sorted(out.glob("*.png")):
        lines += [f"![{picture.stem}]({picture.name})", ""]
    if (out / "limits.md").exists():
        lines.append((out / "limits.md").read_text())
    with records.replacing(out / "README.md", "w") as file:
        file.write("\n".join(lines).rstrip() + "\n")


def cost(run):
    """A run's epochs, steps, operations and minutes, in words."""
    epoch, step = (run.get(f"run_{name}", run.get(name)) for name in ("epoch", "step"))
    pflop = f"{run['pflop']:.3g}·10¹⁵ operations, " if "pflop" in run else ""
    return (f"{epoch} epoch{'s' * (epoch != 1)} ({step:,} steps, {pflop}"
            f"{run['minutes']} minutes of training)")


def weights_precision(out):
    """The dtype of the published weights, float32 or float16."""
    weights = published.read(out)[0]["model"].values()
    return str(next(v.dtype for v in weights if v.is_floating_point())).removeprefix("torch.")


def measuring(out):
    """The words of eval_jempp.py, a command each, that measure the main numbers of a card again."""
    path = out / "records.jsonl"
    found = records.read_jsonl(path) if path.exists() else []
    yield "--eval accuracy calibration --splits test"
    ood = [r for r in found if r["metric"] == "auroc"]
    if ood:
        sets = dict.fromkeys(out_set(r["protocol"]) for r in ood)
        yield f"--eval ood --ood {' '.join(sets)}{n_images(ood[0]['protocol']['n_in'])}"
    attacks = {}
    for r in found:
        if r["metric"] == "robust_accuracy":
            attacks.setdefault(r["protocol"]["attack"], []).append(r)
    for name, points in attacks.items():
        how = points[0]["protocol"]
        restarts = f" --attack_restarts {how['restarts']}" if "restarts" in how else ""
        budgets = {norm: " ".join(f"{r['protocol'][key]:g}" for r in points
                                  if r["protocol"]["norm"] == norm and r["protocol"][key])
                   for norm, key in (("linf", "eps_255"), ("l2", "eps"))}
        steps = f" --attack_steps {how['steps']}" if "steps" in how else ""
        yield (f"--eval robustness --attacks {name}{restarts}{steps} "
               f"--eps_linf {budgets['linf']} --eps_l2 {budgets['l2']} "
               f"--n_attack {points[0]['n']}").replace("  ", " ")


def out_set(protocol):
    """The word of --ood for an out set."""
    return f"{protocol['out']}={protocol['origin']}" if "origin" in protocol else protocol["out"]


def n_images(n, whole=10_000):
    return f" --n_images {n}" if n < whole else ""


def table(out):
    """The numbers as Markdown lines, a row for each measurement.

    The columns are this model (NAME/records.jsonl) and others to compare with (NAME/OTHER.jsonl).
    """
    others = sorted(path.stem for path in out.glob("*.jsonl") if path.stem != "records")
    columns, rows = ["records", *others], {}
    for column in columns:
        path = out / f"{column}.jsonl"
        for r in records.read_jsonl(path) if path.exists() else []:
            words = records.shown(r["protocol"])
            value = (f"{100 * r['value']:.2f} %" if r["metric"] in PERCENT
                     else f"{r['value']:.4g}")
            rows.setdefault((r["metric"], words, r["n"]), {})[column] = value
    heads = ["metric", "this model", *others, "n", "protocol"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 2), "---"]]
    for (metric, words, n), values in rows.items():
        lines.append([metric, *(values.get(column, "–") for column in columns), str(n), words])
    return [f"| {' | '.join(line)} |" for line in lines]


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("what", choices=("model", "card"))
    p.add_argument("paths", nargs="+", type=program.path, metavar="RUN OUT | OUT")
    p.add_argument("--n_buffer", type=flags.POSITIVE, default=300, help="buffer images to publish")
    p.add_argument("--start", type=program.path, metavar="RUN",
                   help="the run whose weights RUN began with (--load_path), for the cost")
    p.add_argument("--half", action="store_true", help="publish float16 weights, half the size")
    args = p.parse_args(argv)
    if len(args.paths) != {"model": 2, "card": 1}[args.what]:
        raise program.InputError("type `model RUN OUT` or `card OUT`")
    if args.what == "model":
        out = publish(*map(Path, args.paths), args.n_buffer, args.half,
                      args.start and Path(args.start))
        program.say(f"wrote {out}")
    else:
        out = Path(args.paths[0])
        card(out)
        program.say(f"wrote {out / 'README.md'}")
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
