"""Several runs at a time: what the scripts plan, and how train_all.py takes it."""

import io
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from helpers import RELEASED, tiny

import train_jempp
from scripts import train_all
from utils import cli
from utils.files.records import read_jsonl, training_of, write_jsonl


@pytest.fixture
def runs(monkeypatch, tmp_path, call):
    """Call train_all.py with {name: what the run does}; (code, lines)."""
    monkeypatch.chdir(tmp_path)

    def begin(run, words, stop, threads, slot):
        with open(f"{run}.log", "w") as log:
            return subprocess.Popen([sys.executable, "-c", words[0]], stderr=log)

    def run(endings, *flags):
        monkeypatch.setattr(train_all, "begin", begin)
        monkeypatch.setattr(train_all, "about", lambda run, *_: f"{run}: begins")
        plan = "".join(f"train_jempp.py\t{code}\t--run_dir\t{name}\n"
                       for name, code in endings.items())
        monkeypatch.setattr(sys, "stdin", io.StringIO("== a row\n" + 2 * plan))
        code, out, err = call(train_all.main, flags)
        assert not err
        return code, out.splitlines()

    return run


FINE, LOST, BAD, LONG = "pass", "exit(3)", "exit(2)", "import time; time.sleep(60)"
TELLS = "import sys; sys.stderr.write('began\\nno data: unpack it\\n'); exit(2)"


@pytest.mark.parametrize(("endings", "code"), (
    ((FINE, FINE), 0), ((FINE, LOST), 0), ((BAD, FINE), 2), ((), 0)))
def test_each_run_is_trained_once_and_the_worst_ending_is_the_code(runs, endings, code):
    found, lines = runs(dict(zip("ab"[:len(endings)], endings, strict=True)), "--jobs", "2")
    assert found == code and len(lines) == 2 * len(endings)
    assert [line for line in lines if "begins" in line] == [
        f"{name}: begins" for name in "ab"[:len(endings)]]


def test_a_run_that_fails_says_why(runs):
    assert runs({"a": TELLS, "b": BAD}) == (2, [
        "a: begins", "a: failed: no data: unpack it (code 2, a.log)",
        "b: begins", "b: failed: it said nothing (code 2, b.log)"])


def test_a_signal_stops_all_runs_and_the_rest_wait(runs):
    def interrupt():
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    code, lines = runs({"a": LONG, "b": LONG, "c": FINE}, "--jobs", "2")
    assert code == 75 and time.monotonic() - began < 20
    assert [line for line in lines if line[0] == "c"] == []


def test_no_run_begins_when_the_time_is_over(runs):
    assert runs({"a": FINE}, "--max_minutes", "1e-9") == (75, [])


def test_a_line_tells_how_long_a_run_took_in_the_records(tmp_path):
    """Two rows of this scale at 0.2 and 0.1 PFLOP/s, one of another."""
    words = tiny(tmp_path / "cpu" / "a", *RELEASED, "--n_epochs", "4")
    pflop = train_all.cost(words, 0)
    trained = training_of(vars(cli.train_args(words)), 4 * 3)
    row = {"metric": "steps", "value": 12, "n": 1, "method": "a", "dataset": "digits",
           "protocol": {}, "env": {"device": "cpu", "cpu": "old one", "commit": "b"},
           "time": "2026-01-01T00:00:00Z", "training": trained}
    write_jsonl(tmp_path / "t.jsonl", [
        row | {"run": name, "seconds": seconds} for name, seconds in (
            ("cpu/a", 3600), ("cpu/b", 7200), ("digits/a", 1), ("cpu/unknown", None))])
    rows = train_all.timed_rows([tmp_path / "t.jsonl", tmp_path / "none"])
    line = train_all.about(str(tmp_path / "cpu" / "a"), words, rows)
    assert f"{pflop:.2g}·10" in line and "about 90 minutes on the cpu of the records" in line
    assert "(old one)" in line
    line = train_all.about(str(tmp_path / "tiny" / "a"), words, rows)
    assert "known after the first run" in line


def test_a_line_tells_how_long_a_run_takes_from_those_beside_it(tmp_path, call):
    words = tiny(tmp_path / "a", *RELEASED, "--n_epochs", "4")
    assert "known after the first run" in train_all.about(str(tmp_path / "a"), words)
    assert call(train_jempp.main, words)[0] == 0
    log = read_jsonl(tmp_path / "a" / "train.jsonl")
    for r in log:
        if r["kind"] == "step":
            r["images_per_s"] = log[0]["args"]["labelled_batch"] / 600  # ten minutes a step
    write_jsonl(tmp_path / "a" / "train.jsonl", log)
    steps = log[-1]["step"]
    again = train_all.about(str(tmp_path / "b"), tiny(tmp_path / "b", *RELEASED, "--n_epochs", "4"))
    assert f"about {10 * steps} minutes" in again
    assert "about 0 minutes" in train_all.about(str(tmp_path / "a"), words)
    softmax = train_all.about(str(tmp_path / "b"), [*words, "--p_x_weight", "0"])
    assert int(re.search(r"about (\d+)", softmax)[1]) == pytest.approx(10 * steps * 3 / 13, abs=1)
    assert train_all.about("c", [*words, "--dataset", "svhn"]) == "c"  # not there
    for name in ("stride_first", "network"):  # of a run that older code began
        del log[0]["args"][name]
    write_jsonl(tmp_path / "a" / "train.jsonl", log)
    assert train_all.about(str(tmp_path / "b"), [*words, "--p_x_weight", "0"]) == softmax


def test_what_is_left_of_the_time_goes_to_each_run(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: begun.append((words, more)))
    stop = types.SimpleNamespace(end=math.inf, minutes=lambda: 3.0)
    train_all.begin(str(tmp_path / "deep" / "a"), ["--seed", "1"], stop, 2)
    stop.end = 1.0
    train_all.begin(str(tmp_path / "deep" / "a"), ["--seed", "1"], stop, 2)
    (plain, more), (limited, _) = begun
    assert plain[2:] == ["--seed", "1"] and limited[2:] == [*plain[2:], "--max_minutes", "3.00"]
    assert more["env"]["OMP_NUM_THREADS"] == "2" and more["cwd"] == train_all.ROOT
    assert (tmp_path / "deep" / "a.log").exists()


def test_a_run_that_the_signal_killed_has_stopped(runs):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert runs({"a": kill})[0] == 75
