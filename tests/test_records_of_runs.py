"""What a record says of its run, and what the table and figure scripts train."""

import json
import os
import re
import subprocess
import sys
from collections import namedtuple

import pytest
from helpers import ROOT

import eval_jempp
from models import network_name
from scripts import figures, keep_records, record_run, train_all
from scripts.tables.protocol import JEM, papers_training
from utils import cli, plots
from utils.evaluation.evaluations import EVALUATIONS
from utils.files import records

# ------------------------------------------------------------------------ what a record says

ENV = {"device": "cpu", "cpu": "a", "commit": "b"}
NAMES = {"sampler": "PYLD-5-5", "network": "WRN-10-1"}


def a_run(folder, words=(), evals=(0.5, 0.75), seed=1, **end):
    """A run folder as train_jempp.py leaves it, but for the checkpoints."""
    args = records.jsonable(vars(cli.train_args(
        ["--depth", "10", "--width", "1", "--n_steps", "5", "--seed", str(seed), *words])))
    folder.mkdir()
    records.write_jsonl(folder / "train.jsonl", [
        {"kind": "header", "step": 0, "args": args, "env": ENV, "n_test": 100,
         "n_train": 200, "steps_per_epoch": 3, **NAMES},
        *({"kind": "eval", "step": 3 * epoch, "epoch": epoch, "test_accuracy": value}
          for epoch, value in enumerate(evals, 1)),
        {"kind": "step", "step": 6, "images_per_s": 32.0},
        {"kind": "end", "step": 6, "reason": "finished", "detail": "", "rollbacks": 2,
         "time": "2026-01-01T00:00:00Z"} | end])
    return folder


def test_a_record_tells_every_argument_but_the_machines():
    args = vars(cli.train_args(["--p_x_weight", "0.1", "--eps", "inf", "--ema", "0.9"]))
    told = records.training_of(args, 7, **NAMES)
    assert told.items() >= {"p_x_weight": 0.1, "eps": "inf", "ema": 0.9, "labelled_batch": 64,
                            "pyld_lr": 0.2, "max_gap": 50.0, "step": 7, **NAMES}.items()
    assert args.keys() - told.keys() == records.ASIDE & args.keys()
    assert args.keys() >= records.ASIDE | records.GUARD
    computed = (cli.FREE | cli.MACHINE) - records.ASIDE - records.GUARD
    assert computed == {"batch_size", "accumulate"}


def test_both_programs_that_write_records_say_the_same(tmp_path, call):
    run = a_run(tmp_path / "run", ["--p_x_weight", "0.1"])
    assert call(record_run.main, [run, "--method", "M", "--results", tmp_path / "out"])[0] == 0
    (steps,) = records.read_jsonl(tmp_path / "out")
    args = records.read_jsonl(run / "train.jsonl")[0]["args"]
    assert steps["training"]["p_x_weight"] == 0.1 and steps["protocol"]["rollbacks"] == 2
    assert steps["seconds"] == 6 * 64 / 32
    opened = namedtuple("Opened", "args step")(args, 6)
    assert eval_jempp.training_of(opened) == steps["training"]
    assert eval_jempp.training_of(opened._replace(args=None)) is None


def test_a_runs_seconds_count_what_was_undone_and_its_latest_header_speaks():
    args = {"labelled_batch": 10, "n_epochs": 1}
    log = [{"kind": "header", "args": args}, {"kind": "step", "step": 4, "images_per_s": 10.0},
           {"kind": "rollback", "step": 6, "to_step": 1},  # two steps after the last record
           {"kind": "step", "step": 3, "images_per_s": 5.0},
           {"kind": "resume", "args": args | {"n_epochs": 2}},
           {"kind": "end", "step": 5}]
    assert records.seconds_of(log) == 4 + 2 + 2 * 2 + 2 * 2
    assert records.header_of(log)["args"]["n_epochs"] == 2


def test_the_last_gap_is_that_of_the_steps_since_a_rollback(tmp_path, call):
    run = a_run(tmp_path / "run", reason="diverged", step=8)
    log = records.read_jsonl(run / "train.jsonl")
    gap = {"kind": "step", "step": 4, "images_per_s": 1.0, "gap": -1.0}
    log[-2:-1] = [gap, {"kind": "rollback", "step": 7, "to_step": 0}, gap | {"gap": -2.0}]
    records.write_jsonl(run / "train.jsonl", log)
    assert call(record_run.main, [run, "--method", "M", "--results", tmp_path / "out"])[0] == 0
    steps, last, lost = records.read_jsonl(tmp_path / "out")
    assert (last["value"], last["protocol"]) == (-2.0, {"from_step": 0, "to_step": 4})
    assert (lost["value"], steps["seconds"]) == (8, (7 + 8) * 64)


def test_a_run_that_was_extended_is_recorded_with_its_latest_arguments(tmp_path, call):
    run = a_run(tmp_path / "run")
    log = records.read_jsonl(run / "train.jsonl")
    later = log[0] | {"kind": "resume", "step": 6, "args": log[0]["args"] | {"n_epochs": 7}}
    records.write_jsonl(run / "train.jsonl", [*log, later, log[-1] | {"step": 9}])
    assert call(record_run.main, [run, "--method", "M", "--results", tmp_path / "out"])[0] == 0
    (steps,) = records.read_jsonl(tmp_path / "out")
    assert (steps["training"]["n_epochs"], steps["value"]) == (7, 9)


@pytest.mark.parametrize(("number", "change"), [
    (0, {"kind": "resume"}), (0, {"args": None}), (0, {"args": {}}), (0, {"env": "x"}), (1, None),
    (1, {"kind": 3}), (-2, {"images_per_s": "inf"}), (-2, {"step": None}), (-1, {"reason": None}),
    (-1, {"time": 3}), (-1, {"step": "6"})])
def test_what_is_no_training_log_is_refused_before_anything_is_written(tmp_path, call, number,
                                                                       change):
    run = a_run(tmp_path / "run")
    log = records.read_jsonl(run / "train.jsonl")
    log[number] = change and log[number] | change
    records.write_jsonl(run / "train.jsonl", log)
    code, _, err = call(record_run.main, [run, "--method", "M", "--results", tmp_path / "out"])
    assert code == 2 and "train.jsonl" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_results_does_not_make_the_code_look_changed(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", *words], cwd=tmp_path,
                       check=True, capture_output=True)

    for name in ("utils/files/records.py", "results/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    git("init"), git("add", "."), git("commit", "-m", "a")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "utils/files/records.py"))
    for name, dirty in (("results/a.jsonl", False), ("utils/files/records.py", True)):
        (tmp_path / name).write_text("changed")
        assert records.git_state()[1] is dirty


def test_recording_a_run_waits_for_no_torch():
    code = "import sys; sys.path.insert(0, '.'); import scripts.record_run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          check=True)
    assert "utils.files.records" in done.stdout.split() and "torch" not in done.stdout.split()


# ------------------------------------------------------------------------ what scripts train

STUB = '''
import json, pathlib, sys
program, *words = sys.argv[1:]
def after(flag):
    return words[words.index(flag) + 1]
with open({calls!r}, "a") as file:
    file.write(json.dumps([program, *words]) + "\\n")
if program == {broken!r} == "scripts/train_all.py" and sys.stdin.read():
    sys.exit({code})
if program == "train_jempp.py":
    if {broken!r} and {broken!r} in words:
        sys.exit("no such data") if {code} == 1 else sys.exit({code})
    run = pathlib.Path(after("--run_dir"))
    run.mkdir(parents=True)
    header = json.dumps({{"args": {{"norm": after("--norm") if "--norm" in words else "batch"}}}})
    (run / "train.jsonl").write_text(header + '\\n{{"kind": "end", "reason": "finished"}}\\n')
    for name in ("best.pt", "last.pt"):
        (run / name).write_text("")
if program == "eval_jempp.py" and words[words.index("--eval") + 1] == "samples":
    for name in ("a", "b"):
        (pathlib.Path(after("--load_path")).parent / "eval" / (name + "_scratch_by_class.png")
         ).write_text(name)
if program.endswith("keep_records.py"):
    open(words[1], "a").write(open(words[0]).read())
if program.endswith("figures.py") and words[0] == "curves":
    open(after("--records"), "a").write("".join(
        '{{"run": "%s/%s"}}\\n' % (after("--scale"), pathlib.Path(w).name) for w in words))
if program.endswith(("record_run.py", "benchmark_table4.py")):
    open(after("--results"), "a").write(json.dumps({{"run": after("--name")}}) + "\\n")
'''


@pytest.fixture
def script(tmp_path):
    """Run a script in which nothing is computed; returns (exit code, stderr, commands)."""
    def run(name, broken="", code=2, **env):
        calls, stub = tmp_path / "calls", tmp_path / "stub.py"
        calls.write_text("")
        stub.write_text(STUB.format(calls=str(calls), broken=broken, code=code))
        ours = ("SEEDS", "DATA", "DATASET", "DATASETS", "KEEP")
        env = {"SCALE": "paper", "RUNS": str(tmp_path / "runs"), "OUT": str(tmp_path / "out"),
               "BASH_FUNC_python%%": f'() {{ {sys.executable} -S {stub} "$@"; }}', **env}
        done = subprocess.run(["bash", f"scripts/{name}.sh"], cwd=ROOT, text=True,
                              env={k: v for k, v in os.environ.items() if k not in ours} | env,
                              capture_output=True)
        return done.returncode, done.stderr, [json.loads(line) for line in open(calls)]

    return run


def trained_rows(commands):
    """{(method, run folder): resolved training arguments} of a script's commands. They begin at
    --load_path where nothing was trained, so it is left out."""
    def without_start(words):
        at = words.index("--load_path") if "--load_path" in words else len(words)
        return words[:at] + words[at + 2:]

    runs = {words[words.index("--run_dir") + 1]: cli.train_args(without_start(words))
            for program, *words in commands if program == "train_jempp.py"}
    return {(words[words.index("--method") + 1], words[0]): runs[words[0]]
            for program, *words in commands if program.endswith("record_run.py")}


@pytest.mark.parametrize(("name", "n_rows"), [("table2", 6), ("table3", 8), ("table5", 6),
                                              ("table7", 6), ("fig10_11", 8),
                                              ("sada_jem", 1)])
def test_each_row_of_a_table_script_is_the_papers_run(script, name, n_rows):
    code, err, commands = script(name)
    rows = trained_rows(commands)
    assert (code, err, len(rows)) == (0, "", n_rows)
    for (method, _), args in rows.items():
        ours = records.training_of(vars(args), None, network=network_name(vars(args)))
        paper = papers_training(method, args.dataset)
        assert {k: ours[k] for k in paper} == paper
        stops = method in ("JEM (K=20)", "random init (w/o BN)")
        assert args.on_divergence == ("stop" if stops else "rollback"), method


DIGITS = {"depth": 10, "width": 2, "batch_size": 32, "global_batch_size": 32, "labelled_batch": 32,
          "network": "WRN-10-2, stride first, stem stride 2", "n_epochs": 75, "warmup_iters": 50,
          "decay_epochs": [25, 50, 62]}
NOT_IN_A_TABLE = {  # rows of digits.sh that no table of the paper has: a row of one, and a change
    "informative init (w/o BN), SGD at 0.1": ("JEM++", {"norm": "none"}),
    "w/o Proximity (M=5)": ("w/o Proximity", {"n_steps": 5}),
    "JEM (K=20), Adam at 0.001": ("JEM (K=20)", {"lr": 0.001}),
    "random init (w/ BN), guard off": ("random init (w/ BN)", {})}
CPU = {"depth": 16, "width": 2, "network": "WRN-16-2, stride first, stem stride 2", "n_epochs": 10,
       "warmup_iters": 500, "decay_epochs": [4, 6, 8]}


@pytest.mark.parametrize(("name", "scale", "size", "n_rows", "buffer_size"), [
    ("digits", "digits", DIGITS, 28, 290), ("table2", "cpu", CPU, 10, 2000),
    ("table5", "cpu", CPU, 12, 2000), ("table3", "cpu", CPU, 6, 2000)])
def test_rows_of_a_smaller_scale_are_the_papers_in_all_but_size(script, name, scale, size, n_rows,
                                                                buffer_size):
    code, err, commands = script(name, SEEDS="1 2", SCALE=scale)
    rows, jems_drops = trained_rows(commands), [60, 67] if scale == "digits" else [8, 9]
    assert (code, err, len(rows)) == (0, "", n_rows)
    for (method, run), args in rows.items():
        ours = records.training_of(vars(args), None, network=network_name(vars(args)))
        papers_row, change = NOT_IN_A_TABLE.get(method, (method, {}))
        paper = papers_training(papers_row, args.dataset)
        changed = {k: v for k, v in ours.items() if k in paper and v != paper[k]}
        for free in ("decay_rate", "buffer_size", "amp"):  # --fast turns bf16 on where it pays
            changed.pop(free, None)
        drops = {"decay_epochs": jems_drops} if method.startswith("JEM (K=20)") else {}
        assert changed == size | drops | change | {"stride_first": True, "stem_stride": 2}, method
        assert args.buffer_size == buffer_size and args.fast and args.keep_every
        assert run.endswith(f"-seed{args.seed}")
    if name == "digits":
        assert {run.split("/")[-1].rsplit("-", 1)[0] for _, run in rows} == {
            "softmax", "jempp-m5", "jempp-m10", "jempp-m20", "jem-k20", "no-proximity", "adam",
            "uniform-bn", "uniform-no-bn", "informative-no-bn", "informative-no-bn-sgd",
            "no-proximity-m5", "jem-k20-fast", "uniform-bn-unguarded"}


def test_a_row_that_is_in_the_records_is_done_even_where_its_run_is_not(script, tmp_path):
    """Records are committed, run folders are not. Another scale's records are another row's."""
    _, _, first = script("table5", SEEDS="1 2")
    elsewhere = {"RUNS": str(tmp_path / "elsewhere")}
    assert len(trained_rows(first)) == 12
    assert script("table5", SEEDS="1 2", **elsewhere) == (0, "", [])
    tenth = {"OUT": str(tmp_path / "tenth")}
    script("table5", SEEDS="10", **tenth)
    there = {"RUNS": str(tmp_path / "there"), **tenth}
    assert len(trained_rows(script("table5", SEEDS="1 10", **there)[2])) == 6
    for wanted, n_rows in ({"SEEDS": "3"}, 6), ({"SEEDS": "1", "SCALE": "cpu"}, 6):
        assert len(trained_rows(script("table5", **elsewhere | wanted)[2])) == n_rows


def test_what_a_small_scale_measures_is_less_and_svhn_may_be_a_folder(script, tmp_path):
    (tmp_path / "data" / "svhn-test-10000").mkdir(parents=True)
    _, _, commands = script("table7", SCALE="cpu", DATA=str(tmp_path / "data"))
    told = [vars(cli.evaluation_args(words, EVALUATIONS)[0]) for program, *words in commands
            if program == "eval_jempp.py"]
    expected = {"splits": ["test"], "attack_restarts": 2, "chain_steps": 200,
                "ood": [f"svhn=folder:{tmp_path}/data/svhn-test-10000", "interp", "cifar100",
                        "celeba"]}
    assert len(told) == 5 and all(words | expected == words for words in told)


def test_table_4_is_timed_once_a_scale(script):
    """Else reproduce.sh, going on, would put the times of a busy machine in its place."""
    for scale, n_timed in (("paper", 1), ("paper", 0), ("cpu", 1), ("cpu", 0)):
        code, err, commands = script("table4_speed", SCALE=scale)
        timed = [words for words in commands if words[0].endswith("benchmark_table4.py")]
        assert (code, err, len(timed)) == (0, "", n_timed)


def test_networks_with_batch_norm_are_measured_with_statistics_measured_anew_too(script):
    _, _, commands = script("table5", SCALE="cpu", SEEDS="1")
    anew = [words[words.index("--method") + 1] for words in commands if "--recalibrate_bn" in words]
    assert anew == ["JEM++", "w/o Proximity", "w/ Adam", "random init (w/ BN)"]


def test_a_seed_that_is_named_twice_is_one_row(script):
    code, err, commands = script("table5", SEEDS="2  1 2")
    assert (code, err, len(trained_rows(commands))) == (0, "", 12)


@pytest.mark.parametrize("name", ("table2", "table5", "fig5", "fig6", "fig9", "digits"))
def test_a_script_measures_only_what_is_ready(script, tmp_path, name):
    """Where the records are lost, the same is measured again, of the checkpoint of the scale."""
    def said():
        code, err, commands = script(name, SCALE=scale, SEEDS="1", **ready)
        assert (code, err) == (0, "")
        return [[re.sub(r"\.\d+\.jsonl", ".jsonl", word) for word in words]
                for words in commands if words[0] != "train_jempp.py" or ready]

    scale, ready = "digits" if name == "digits" else "paper", {"READY": "1"}
    assert said() == []
    ready = {}
    first = said()
    checkpoint = "last.pt" if name == "digits" else "best.pt"
    loaded = [words[words.index("--load_path") + 1] for words in first if "--load_path" in words]
    assert name == "fig5" or loaded
    assert name == "fig6" or all(path.endswith(checkpoint) for path in loaded)
    ready = {"READY": "1"}
    (tmp_path / "out").rename(tmp_path / "lost")
    assert said() == first


def test_the_softmax_network_is_trained_before_a_row_that_it_judges(script, tmp_path):
    for scale, judge in (("paper", "softmax-seed1/best.pt"), ("cpu", "models/cifar10_judge")):
        _, _, commands = script("table5", SCALE=scale, SEEDS="2", RUNS=str(tmp_path / scale))
        trained = [words for words in commands if words[0] == "train_jempp.py"]
        assert ("softmax-seed1" in str(trained[0])) == (scale == "paper")
        measured = [words for words in commands if "--features" in words]
        assert len(measured) == 6
        assert all(words[words.index("--features") + 1].endswith(judge) for words in measured)


def test_a_run_without_its_checkpoint_is_not_recorded_as_measured(script, tmp_path):
    script("table7", SEEDS="1")
    (tmp_path / "out").rename(tmp_path / "lost")
    (tmp_path / "runs" / "softmax-seed1" / "best.pt").unlink()
    code, err, commands = script("table7", SEEDS="1")
    assert code == 2 and "best.pt" in err and err.count("left out: ") == 1
    assert len([words for words in commands if words[0] == "eval_jempp.py"]) == 5
    assert "softmax" not in (tmp_path / "out" / "table7.jsonl").read_text()


def test_what_a_killed_script_of_the_same_number_left_is_not_kept(script, tmp_path):
    """In a container every script may be process 1."""
    script("table7", SEEDS="1")
    (tmp_path / "out").rename(tmp_path / "lost")
    left = tmp_path / "begin"  # bash runs it first
    left.write_text(f'echo old > "{tmp_path}/runs/softmax-seed1/eval/table7.$$.jsonl"\n')
    assert script("table7", SEEDS="1", BASH_ENV=str(left))[0] == 0
    assert "old" not in (tmp_path / "out" / "table7.jsonl").read_text()


def test_a_run_that_went_on_after_its_end_is_measured_where_it_ends_again(script, tmp_path):
    script("table7", SEEDS="1")
    (tmp_path / "out").rename(tmp_path / "lost")
    with open(tmp_path / "runs" / "softmax-seed1" / "train.jsonl", "a") as log:
        log.write('{"kind": "end", "reason": "max_minutes"}\n')
    _, err, commands = script("table7", SEEDS="1", READY="1")
    assert len([words for words in commands if words[0] == "eval_jempp.py"]) == 5


def test_a_robustness_figure_leaves_out_what_diverged(tmp_path, call, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "save_figure", lambda *words: None)
    monkeypatch.setattr(plots, "robustness_curves", lambda curves, *words: shown.append(curves))
    lost = attack(90) | {"metric": "diverged", "protocol": {"cause": "a"}}
    records.write_jsonl(tmp_path / "fig9.jsonl", [
        attack(0.1), lost, attack(0.5, seed=2), attack(0.2, "JEM"), lost | {"method": "JEM"}])
    assert call(figures.main, ["robustness", "--records", tmp_path / "fig9.jsonl", "--out",
                               tmp_path / "fig9"])[0] == 0
    assert shown[0]["JEM++", "pgd"][1] == [0.5]


@pytest.mark.parametrize("name", ("fig5", "fig6"))
def test_a_figure_is_drawn_from_records_where_its_runs_are_not(script, tmp_path, name):
    script(name, SEEDS="1", RUNS=str(tmp_path / "elsewhere"))
    code, err, ((program, *words),) = script(name, SEEDS="1")
    assert (code, err, program) == (0, "", "scripts/figures.py") and "--records" in words


def test_the_pictures_of_a_row_are_kept_beside_its_records(script, tmp_path):
    assert script("fig3_4_12", SCALE="cpu", SEEDS="2")[:2] == (0, "")
    names = [path.name for path in sorted((tmp_path / "out" / "figures").iterdir())]
    assert names == [f"cpu_{run}-seed2_scratch_by_class.png"
                     for run in ("cifar100-jempp-m10", "jempp-m10")]
    assert (tmp_path / "out" / "figures" / names[0]).read_text() == "b"  # the latest


def test_records_are_kept_all_or_none(tmp_path, call, monkeypatch):
    """After a line that a crash cut short, and on a disk that fills."""
    new, kept = tmp_path / "new", tmp_path / "kept"
    records.write_jsonl(new, [{"a": 1}, {"a": 2}])
    kept.write_text('{"b": 1}\n{"b": ')
    write, room = os.write, iter((5, 0))

    def full(handle, data):
        left = next(room)
        if not left:
            raise OSError(28, "No space left on device")
        return write(handle, data[:left])

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        code, _, err = call(keep_records.main, [new, kept])
    assert code == 2 and len(err.splitlines()) == 1 and kept.read_text() == '{"b": 1}\n'
    assert call(keep_records.main, [new, kept])[0] == 0
    assert records.read_jsonl(kept) == [{"b": 1}, {"a": 1}, {"a": 2}]
    assert call(keep_records.main, [tmp_path / "none", kept])[0] == 2


def test_reproduce_measures_what_has_ended_when_its_time_is_over(script):
    ended = ("scripts/train_all.py", 75)
    code, err, commands = script("reproduce", *ended, MINUTES="1", SEEDS="1", SCALE="cpu")
    assert (code, err) == (75, "") and commands[-1][0] == "scripts/make_tables.py"
    assert "train_jempp.py" not in {program for program, *_ in commands}


def test_each_probe_changes_one_thing(script):
    code, err, commands = script("probes", SEEDS="1")
    runs = {method: records.training_of(vars(args), None)
            for (method, _), args in trained_rows(commands).items()}
    parts = {"softmax: rate 0.1": 4, "joint stage: weight 0.3, rate 0.02, B 500": 7,
             "statistics: momentum 0.9": 3}
    assert (code, err, len(runs)) == (0, "", sum(parts.values()) + len(parts) + 4)
    for base, n_others in parts.items():
        kind = base.split(":")[0] + ":"
        changed = {m: {k for k, v in run.items() if v != runs[base][k]} - {"global_batch_size"}
                   for m, run in runs.items() if m.startswith(kind) and m != base}
        assert len(changed) == n_others
        for method, names in changed.items():
            together = {"batch_size", "buffer_size"} if "chains" in method else {"bn_momentum",
                                                                                 "bn_update"}
            assert len(names) == 1 or names == together, (method, names)
    starts = [words[words.index("--load_path") + 1] for program, *words in commands
              if program == "train_jempp.py" and "--load_path" in words]
    assert len(starts) == 8 + 4 and all("probe-softmax-seed1/last.pt" in name for name in starts)


@pytest.mark.parametrize("name", ("table2", "table5", "fig5", "fig6", "fig9"))
def test_a_plan_is_what_the_script_would_train_and_leaves_nothing(script, tmp_path, name):
    where = {"SCALE": "tiny", "RUNS": str(tmp_path / "planned"), "OUT": str(tmp_path / "none")}
    done = subprocess.run(["bash", f"scripts/{name}.sh"], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | where | {"PLAN": "1"})
    planned = train_all.planned(done.stdout.splitlines())
    assert done.returncode == 0 and not done.stderr
    assert not (tmp_path / "planned").exists() and not (tmp_path / "none").exists()
    trained = {words[words.index("--run_dir") + 1]: words
               for program, *words in script(name, **where)[2] if program == "train_jempp.py"}
    assert planned == trained and len(planned) >= 2


def test_every_file_of_records_has_its_command():
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(ROOT / "results").as_posix()
             for path in (ROOT / "results").rglob("*.jsonl") if "models" not in path.parts]
    assert [name for name in files if f"`{name}`" not in page] == []
    for words in (line.split() for line in page.splitlines() if line.startswith("python ")):
        if words[1] == "train_jempp.py":
            cli.train_args(words[2:])
        if words[1] == "eval_jempp.py":
            cli.evaluation_args(words[2:], EVALUATIONS)
    scripts = set(re.findall(r"scripts/\w+\.(?:sh|py)", page))
    assert len(scripts) > 5 and all((ROOT / name).exists() for name in scripts)


def test_each_committed_run_has_its_name_so_that_no_script_trains_it_again():
    found = [(path.name, r["method"]) for path in (ROOT / "results").rglob("*.jsonl")
             if "models" not in path.parts for r in records.read_jsonl(path)
             if r.get("metric") == "steps" and not r.get("run")]
    assert found == []


def test_scripts_go_on_past_data_that_is_not_there(script):
    code, err, commands = script("table3", broken="svhn")
    assert code == 2 and err.count("left out: ") == 4
    assert {args.dataset for args in trained_rows(commands).values()} == {"cifar100"}
    assert len(trained_rows(commands)) == 4


@pytest.mark.parametrize("code", [75, 130])
def test_a_script_whose_run_is_stopped_ends_there(script, code):
    ended, _, commands = script("table3", broken="svhn", code=code)
    assert ended == code and len(commands) == 1


def test_jems_flags_stand_once():
    assert JEM.count("\n") == 0 and JEM.startswith("--norm none ")
    holding = [path for path in (ROOT / "scripts").rglob("*.*") if path.suffix != ".pyc"
               and "--sgld_std 0.01 --n_steps" in path.read_text(encoding="utf-8")]
    assert [path.name for path in holding] == ["jem.flags"]


# ------------------------------------------------------------------------------- figures

def test_points_of_the_learning_curves_are_records(tmp_path, call):
    """Drawn once more they stand once, and a run folder that is gone is drawn from them."""
    runs = [a_run(tmp_path / "run1"), a_run(tmp_path / "run2", seed=2, reason="diverged")]
    file = tmp_path / "fig5.jsonl"
    for gone in (None, "nothing", "the end", "the log"):
        for run in runs:
            log = records.read_jsonl(run / "train.jsonl")
            if gone == "the end":  # of a run that is trained once more
                records.write_jsonl(run / "train.jsonl", log[:2])
            elif gone == "the log":
                (run / "train.jsonl").unlink()
        code, _, err = call(figures.main, ["curves", "--line", "M=5", *runs, "--records", file,
                                           "--out", tmp_path / "fig5.png"])
        assert code == 0, err
    found = records.read_jsonl(file)
    points = [("M=5", seed, epoch, value, 100) for seed in (1, 2)
              for epoch, value in ((1, 0.5), (2, 0.75))]
    assert [(r["method"], r["seed"], r["checkpoint"]["epoch"], r["value"], r["n"])
            for r in found] == [*points, ("M=5", 2, 2, 6, 100)]
    assert [r["metric"] for r in found] == 4 * ["accuracy"] + ["diverged"]
    assert found[0]["training"]["p_x_weight"] == 1 and found[0]["training"]["step"] == 3


def attack(value, method="JEM++", seed=1, time=0, eps=2, attack="pgd", **training):
    args = vars(cli.train_args(["--depth", "10", "--width", "1", "--seed", str(seed)]))
    return {"metric": "robust_accuracy", "value": value, "n": 300, "method": method,
            "dataset": "cifar10", "env": {"device": "cpu", "cpu": "a", "commit": "b"},
            "time": f"2026-01-01T00:00:{time:02d}Z",
            "protocol": {"norm": "linf", "attack": attack, "eps_255": eps},
            "training": records.training_of(args | training, 9)}


def test_robustness_shows_mean_and_spread_of_what_belongs_together(tmp_path, call, monkeypatch):
    shown = []
    draw = plots.robustness_curves
    monkeypatch.setattr(plots, "robustness_curves",
                        lambda curves, *words: shown.append(curves) or draw(curves, *words))
    found = [attack(0.1, width=2), attack(0.2, p_x_weight=0.1),
             attack(0.3, time=1), attack(0.4, time=2), attack(0.6, seed=2, time=3),
             attack(0.8, eps=0.0, time=4), attack(0.5, "Softmax", time=5, p_x_weight=0.0)]
    records.write_jsonl(tmp_path / "fig9.jsonl", found)
    code, out, err = call(figures.main, ["robustness", "--records", tmp_path / "fig9.jsonl",
                                         "--out", tmp_path / "fig9"])
    assert code == 0, err
    assert "left out: 2 records" in out + err
    (curves,) = shown
    eps, means, spread = curves["JEM++", "pgd"]
    assert eps == [0.0, 2.0] and means == pytest.approx([0.8, 0.5])
    assert spread == pytest.approx([0, 0.02 ** 0.5])
    assert curves["Softmax", "pgd"][1] == [0.5]


def test_curves_that_are_drawn_leave_the_points_of_other_runs(tmp_path, call):
    file = tmp_path / "fig5.jsonl"
    for name in ("run1", "run2"):
        assert call(figures.main, ["curves", "--line", "M=5", a_run(tmp_path / name), "--records",
                                   file, "--out", tmp_path / "fig5.png"])[0] == 0
    assert [r["run"].split("/")[-1] for r in records.read_jsonl(file)] == 2 * ["run1"] + 2 * [
        "run2"]


def test_curves_of_a_run_that_goes_on_are_drawn_and_not_kept(tmp_path, call):
    run, file = a_run(tmp_path / "run"), tmp_path / "fig5.jsonl"
    log = records.read_jsonl(run / "train.jsonl")
    records.write_jsonl(run / "train.jsonl", log[:-1])
    for _ in range(2):
        assert call(figures.main, ["curves", "--line", "M=5", run, "--records", file, "--out",
                                   tmp_path / "fig5.png"])[0] == 0
    assert records.read_jsonl(file) == []


def test_figure_6_shows_the_checkpoints_of_its_run_alone(tmp_path, call, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda path, figure: drawn.extend(
        axis.lines[0].get_xydata().tolist() for axis in figure.axes))
    found = [attack(value) | {"metric": "accuracy", "checkpoint": {
        "path": f"elsewhere/{run}/epoch.pt", "epoch": epoch}}
        for run, epoch, value in (("a", 2, 0.5), ("a", 1, 0.25), ("a", None, 0.9), ("b", 3, 0.75))]
    records.write_jsonl(tmp_path / "fig6.jsonl", found)
    code, _, err = call(figures.main, ["evolution", tmp_path / "a", "--records",
                                       tmp_path / "fig6.jsonl", "--out", tmp_path / "a.png"])
    assert (code, err) == (0, "") and drawn == [[[1, 25], [2, 50]]]


def test_robustness_of_a_seed_is_its_latest_whatever_the_order_of_lines(tmp_path, call,
                                                                        monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "save_figure", lambda *words: None)
    monkeypatch.setattr(plots, "robustness_curves", lambda curves, *words: shown.append(curves))
    records.write_jsonl(tmp_path / "fig9.jsonl", [attack(0.4, time=2), attack(0.3, time=1)])
    assert call(figures.main, ["robustness", "--records", tmp_path / "fig9.jsonl", "--out",
                               tmp_path / "fig9"])[0] == 0
    assert shown[0]["JEM++", "pgd"][1] == [0.4]


@pytest.mark.parametrize("figure", ("robustness", "evolution"))
@pytest.mark.parametrize("line", ('{"a": 1}', "[1]", '{"metric": "accuracy"}'))
def test_a_line_that_is_no_record_is_named(tmp_path, call, figure, line):
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n")
    code, _, err = call(figures.main, [figure, "--records", tmp_path / "a.jsonl", "--out",
                                       tmp_path / "a"])
    assert code == 2 and err.count("\n") == 1 and "a.jsonl:2: " in err


def test_a_model_has_one_colour_and_an_attack_one_line_style():
    names = [f"m{k}" for k in range(6)]
    curves = {(name, attack): ([0, 1], [1, 0.5], [0.1, 0.1])
              for name in names for attack in ("pgd", "margin")}
    axis = plots.robustness_curves(curves, "linf", "title").axes[0]
    lines = [bars.lines[0] for bars in axis.containers]
    styles = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(styles)) == 12 and len({color for color, _ in styles}) == 6
    assert styles[0][0] == styles[1][0] and styles[0][1] == styles[2][1]
