"""Several processes under torchrun, by gloo on the CPU: what PyTorch's engine makes of our code."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, TINY

import train_jempp
from utils import program
from utils.files import checkpoint
from utils.files.records import read_jsonl
from utils.training.guard import Stop

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
SMALL = [*TINY, "--n_train", "90", "--batch_size", "8", "--lr", "0.01"]  # 5 steps of 16 an epoch


def torchrun(processes, script, *words):
    """The Popen of a job, its output piped."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={processes}", ROOT / script, *words]
    return subprocess.Popen([str(w) for w in words], text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finished(job, timeout=120):
    """(exit code, output) of a job; whatever is left of it is killed."""
    try:
        output, _ = job.communicate(timeout=timeout)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, output


def difference(a, b):
    """The largest difference of two runs' weights and of their buffers."""
    a, b = (torch.load(d / "last.pt", weights_only=True) for d in (a, b))
    assert a["step"] == b["step"] and torch.equal(a["ages"], b["ages"])
    return max(*((a["model"][k].double() - b["model"][k].double()).abs().max().item()
                 for k in a["model"]), (a["buffer"] - b["buffer"]).abs().max().item())


def workers(job):
    """Process numbers of a job's ranks, in order of rank, once all have begun."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True,
                            text=True).stdout.split()
    return [int(pid) for pid in listed]


def wait_for_steps(run, n, job):
    """Until ``run`` has logged ``n`` steps."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and job.poll() is None:
        if (run / "last.pt").exists() and len(read_jsonl(run / "train.jsonl")) > n:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {n} steps: {finished(job, 1)}")


def test_two_processes_are_one_with_two_parts_also_across_resumes(tmp_path, call):
    flags = [*SMALL, "--norm", "none", "--n_epochs", "3"]
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    code, _, err = call(train_jempp.main, [*flags, "--accumulate", "2", "--run_dir", one,
                                           "--max_steps", "6"])
    assert code == 0, err
    jobs = [torchrun(2, "train_jempp.py", *flags, "--run_dir", two, "--max_steps", "6"),
            torchrun(2, "train_jempp.py", *flags, "--run_dir", mixed, "--max_steps", "2")]
    for job in jobs:
        code, output = finished(job)
        assert code == 0, output
    assert difference(one, two) < 1e-5
    steps = [[r for r in read_jsonl(d / "train.jsonl") if r["kind"] == "step"] for d in (one, two)]
    for a, b in zip(*steps, strict=True):
        for name in ("loss", "e_pos", "e_neg", "ce", "accuracy", "saturated", "grad_norm",
                     "chain_age"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    # another number of processes, at the same global batch, goes on where the last one was
    code, _, err = call(train_jempp.main, [*flags, "--run_dir", mixed])
    assert code == 2 and "global_batch_size" in err
    code, _, err = call(train_jempp.main, [*flags, "--accumulate", "2", "--run_dir", mixed,
                                           "--max_steps", "4"])
    assert code == 0, err
    code, output = finished(torchrun(2, "train_jempp.py", *flags, "--run_dir", mixed,
                                     "--max_steps", "6"))
    assert code == 0, output
    assert difference(one, mixed) < 1e-5
    processes = [r["processes"] for r in read_jsonl(mixed / "train.jsonl")
                 if r["kind"] in ("header", "resume")]
    assert processes == [2, 1, 2]


def test_two_processes_evaluate_to_the_records_of_one(tmp_path, call):
    import eval_jempp

    run = tmp_path / "run"
    assert call(train_jempp.main, [*TINY, "--n_epochs", "1", "--run_dir", run])[0] == 0
    flags = ["--load_path", run / "best.pt", "--no-download", "--num_threads", "1", "--device",
             "cpu", "--batch_size", "50", "--eval", "accuracy", "calibration", "ood", "robustness",
             "samples", "best_worst", "fid", "--features", run / "best.pt", "--ood", "interp",
             "uniform", "--n_images", "130", "--eps_linf", "8", "--eps_l2", "--attack_steps", "2",
             "--attack_restarts", "1", "--n_attack", "110", "--chain_steps", "2", "--chain_batch",
             "15", "--source", "scratch", "--n_samples", "40", "--splits", "test"]
    one, two = tmp_path / "one" / "r.jsonl", tmp_path / "two" / "r.jsonl"
    code, _, err = call(eval_jempp.main, [*flags, "--results", one])
    assert code == 0, err
    code, output = finished(torchrun(2, "eval_jempp.py", *flags, "--results", two))
    assert code == 0, output
    records = [[{k: v for k, v in r.items() if k not in ("seconds", "time")}
                for r in read_jsonl(path)] for path in (one, two)]
    assert len(records[0]) > 10 and records[0] == records[1]
    assert sorted(p.name for p in one.parent.iterdir()) == \
        sorted(p.name for p in two.parent.iterdir())
    for picture in one.parent.glob("*.png"):
        assert picture.read_bytes() == (two.parent / picture.name).read_bytes()


LONG = [*SMALL, "--n_epochs", "200", "--ckpt_steps", "5", "--eval_every", "1000"]


def test_a_killed_process_ends_the_job_and_the_run_goes_on(tmp_path):
    job = torchrun(2, "train_jempp.py", *LONG, "--run_dir", tmp_path)
    wait_for_steps(tmp_path, 8, job)
    os.kill(workers(job)[1], signal.SIGKILL)
    code, output = finished(job, 60)
    assert code != 0 and "the same command goes on" in output, output
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    code, output = finished(torchrun(2, "train_jempp.py", *LONG, "--run_dir", tmp_path,
                                     "--max_steps", step + 3))
    assert code == 0 and f"continuing {tmp_path} after step {step}" in output, output
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == step + 3


def test_bad_input_is_said_once(tmp_path):
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    with checkpoint.locked(tmp_path):
        for flags, words in (([], "another process is using"),
                             (["--global_batch_size", "17"], "does not divide into 2 parts")):
            code, output = finished(torchrun(2, "train_jempp.py", *SMALL, *flags, "--run_dir",
                                             tmp_path))
            assert code != 0 and output.count("train_jempp.py: error:") == 1, output
            assert output.count(words) == 1, output


BROKEN = """
import os, sys
sys.path.insert(0, {root!r})
import train_jempp
from utils import program

def rate(step, *others, of=train_jempp.learning_rate):
    if step == 4 and os.environ["RANK"] == "1":
        raise {error}
    return of(step, *others)

train_jempp.learning_rate = rate
program.run(train_jempp.main)
"""


def test_what_one_process_alone_finds_is_the_jobs_code_and_word(tmp_path):
    faults = {"KeyError('alone')": (1, "KeyError: 'alone'"),
              "program.InputError('alone')": (2, "error: alone")}
    jobs = []
    for i, error in enumerate(faults):
        script = tmp_path / f"broken{i}.py"
        script.write_text(BROKEN.format(root=str(ROOT), error=error))
        jobs.append(torchrun(2, script, *SMALL, "--run_dir", tmp_path / str(i),
                             "--ckpt_steps", "2"))
    for i, (job, (code, words)) in enumerate(zip(jobs, faults.values(), strict=True)):
        _, output = finished(job)
        root_cause = output.split("Root Cause")[1]
        assert "rank      : 1" in root_cause and f"exitcode  : {code} " in root_cause, output
        assert output.count(words) == 1, output
        assert torch.load(tmp_path / str(i) / "last.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize("message, lost", [
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer", True),
    ("Application timeout caused pair closure", True),  # which of them it is, is a matter of luck
    ("The size of tensor a (2) must match the size of tensor b (3)", False)])
def test_gloos_words_for_a_lost_process_are_known(monkeypatch, message, lost):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert program.lost_a_process(RuntimeError(message)) is lost


def test_a_silent_process_ends_the_job(tmp_path):
    job = torchrun(2, "train_jempp.py", *LONG, "--run_dir", tmp_path, "--dist_timeout", "0.05")
    wait_for_steps(tmp_path, 8, job)
    os.kill(workers(job)[1], signal.SIGSTOP)
    code, output = finished(job, 90)
    assert code != 0 and "the same command goes on" in output, output
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] >= 5


def test_a_signal_saves_once_and_all_stop_together(tmp_path):
    job = torchrun(2, "train_jempp.py", *LONG, "--run_dir", tmp_path)
    wait_for_steps(tmp_path, 8, job)
    os.kill(workers(job)[1], signal.SIGTERM)  # one of them is enough
    code, output = finished(job, 60)
    end = read_jsonl(tmp_path / "train.jsonl")[-1]
    assert code != 0 and "exitcode  : 75" in output, output
    assert (end["reason"], end["exit_code"]) == ("SIGTERM", 75)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == end["step"]


@pytest.mark.parametrize("launched, then", ((True, signal.SIG_IGN), (False, signal.SIG_DFL)))
def test_torchruns_own_sigterm_after_a_schedulers_does_not_cut_the_saving(monkeypatch, launched,
                                                                          then):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    try:
        stop = Stop(None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == "SIGTERM" and signal.getsignal(signal.SIGTERM) == then
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_divergence_is_decided_together(tmp_path):
    flags = [*SMALL, "--run_dir", tmp_path, "--max_loss", "1", "--max_rollbacks", "1"]
    code, output = finished(torchrun(2, "train_jempp.py", *flags))
    assert code != 0 and "exitcode  : 3" in output, output
    log = read_jsonl(tmp_path / "train.jsonl")
    assert [r["kind"] for r in log] == ["header", "rollback", "end"]
    assert log[-1]["exit_code"] == 3 and output.count("rollback 1 of 1") == 1


@pytest.mark.slow
def test_two_processes_learn_as_well_as_one(tmp_path, call):
    flags = ["--dataset", "digits", "--depth", "10", "--width", "1", "--stride_first",
             "--stem_stride", "2", "--n_steps", "3", "--buffer_size", "400", "--warmup_iters", "30",
             "--n_epochs", "16", "--decay_epochs", "12", "--global_batch_size", "64",
             "--num_threads", "1", "--device", "cpu", "--bn_momentum", "0.5"]
    code, _, err = call(train_jempp.main, [*flags, "--run_dir", tmp_path / "one"])
    assert code == 0, err
    code, output = finished(torchrun(2, "train_jempp.py", *flags, "--run_dir", tmp_path / "two"),
                            300)
    assert code == 0, output
    ends = [[r for r in read_jsonl(tmp_path / name / "train.jsonl") if r["kind"] == "eval"][-1]
            for name in ("one", "two")]
    accuracy = [end["test_accuracy"] for end in ends]
    assert min(accuracy) > 0.9 and abs(accuracy[0] - accuracy[1]) < 0.04, accuracy
