"""Programs start and end well: odd users, streams, signals, names and values each get one line."""

import contextlib
import errno
import io
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, tiny

import eval_jempp
import train_jempp
from utils import cli, flags, machine, program, start
from utils.evaluation.evaluations import file_name
from utils.files import checkpoint, records
from utils.training.guard import Stop

TRAIN = [sys.executable, "train_jempp.py"]


@pytest.fixture(autouse=True)
def handlers():
    """Signals go to whom they went to before."""
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT,
                                               signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def one_line(err, *words):
    assert len(err.splitlines()) == 1 and all(word in err for word in words), err


# -- starting -------------------------------------------------------------------------------------
def test_a_user_without_name_home_stderr_or_greek_letters_gets_help():
    """As in a container, ``docker run -u 4242``, with ``2>&-``."""
    env = {k: v for k, v in os.environ.items() if k not in ("USER", "LOGNAME", "HOME")}
    unknown = ["unshare", "-U", "--map-user=4242", "--map-group=4242"]
    if subprocess.run([*unknown, "true"], capture_output=True).returncode:
        unknown = []  # no user namespaces here
    done = subprocess.run(["bash", "-c", 'exec "$@" 2>&-', "", *unknown, *TRAIN, "--help"],
                          cwd=ROOT, env=env | {"PYTHONIOENCODING": "ascii"}, text=True,
                          stdout=subprocess.PIPE)
    assert done.returncode == 0 and "\\u03b1" in done.stdout


def test_an_unknown_user_gets_a_name_and_a_home(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    start.name_the_user()
    assert os.environ["USER"] == f"uid{os.getuid()}"
    assert Path.home() == Path(os.environ["MPLCONFIGDIR"]) == tmp_path / f"jempp-uid{os.getuid()}"


def test_ctrl_c_while_importing_is_one_line_and_code_130():
    process = subprocess.Popen(  # whoever runs the tests may ignore SIGINT, as background jobs do
        [*TRAIN, "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130
    one_line(err, "train_jempp.py: interrupted")


def test_importing_the_programs_changes_no_handler_and_main_has_pythons():
    assert signal.getsignal(signal.SIGINT) is not start.quit_at_once  # they are imported above
    signal.signal(signal.SIGINT, start.quit_at_once)
    with pytest.raises(SystemExit):
        program.run(lambda: int(signal.getsignal(signal.SIGINT) is start.quit_at_once))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_main_is_one_line_and_code_130(call, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_args", interrupted)
    code, _, err = call(train_jempp.main, [])
    assert code == 130
    one_line(err, "interrupted")


def test_training_without_standard_streams(tmp_path):
    words = [sys.executable, ROOT / "train_jempp.py", *tiny(tmp_path, "--max_steps", "1")]
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" 1>&- 2>&-', *map(str, words)])
    assert done.returncode == 0
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1


def test_standard_output_on_a_full_disk_does_not_end_the_work(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        program.say("hello")
        program.say("hello")
        monkeypatch.undo()
        one_line(capsys.readouterr().err, "No space left on device", "the work goes on")


# -- signals --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ("SIGHUP", "SIGUSR1"))
def test_a_closed_terminal_and_slurms_warning_save_and_stop(tmp_path, call, monkeypatch, name):
    step = train_jempp.train_step
    signal.signal(getattr(signal, name), signal.SIG_DFL)  # whoever runs the tests may ignore it

    def signalled(args, setup, draw):
        os.kill(os.getpid(), getattr(signal, name))
        os.kill(os.getpid(), getattr(signal, name))
        return step(args, setup, draw)

    monkeypatch.setattr(train_jempp, "train_step", signalled)
    code, out, _ = call(train_jempp.main, tiny(tmp_path, "--n_epochs", "2"))
    assert code == 75 and f"{name} at step 1: state saved" in out
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1


def test_nohup_keeps_its_word():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Stop(None)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_main_in_another_thread(tmp_path):
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(train_jempp.main(tiny(tmp_path, "--max_steps", "1"))))
    thread.start()
    thread.join()
    assert codes == [0]


# -- typed values ---------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [
    ["--lr", "1e39"], ["--weight_decay", "1e39"], ["--eps", "1e39"], ["--decay_rate", "1e308"],
    ["--decay_rate", "1e8", "--decay_epochs", *"12345"], ["--width", str(2**63)],
    ["--depth", "6000000004"], ["--num_threads", "100000"], ["--buffer_size", str(2**63)],
    ["--seed", str(2**63)], ["--dist_timeout", "1e39"], ["--max_gap", "1e-320"], ["--run_dir", ""],
    ["--run_dir", "\udcff"], ["--n_steps", "9" * 5000], ["--norm", "a\nb"], ["--a\nb"],
    ["--data_root=~nobody-of-this-name/x"], ["--depth", "1000", "--width", "100"]],
    ids=lambda words: " ".join(words)[:30].encode("unicode_escape").decode())
def test_a_value_beyond_its_bounds_is_one_short_line(tmp_path, call, words):
    code, _, err = call(train_jempp.main, tiny(tmp_path / "run", *words))
    assert code == 2 and len(err) < 400 and not (tmp_path / "run").exists()
    one_line(err, "train_jempp.py: error: ")
    assert "--help" in err or "decay" in err or "GiB" in err


@pytest.mark.parametrize("words", [
    ["--eps_l2", "1e-320"], ["--bins", str(2**63)], ["--bins", "1000000"],
    ["--chain_steps", str(2**63)], ["--chain_batch", str(2**63)], ["--n_samples", str(2**63)],
    ["--load_path", ""], ["--eps_linf", "1e39"]], ids=" ".join)
def test_a_value_of_an_evaluation_too(call, words):
    code, _, err = call(eval_jempp.main, ["--load_path", "x", "--eval", "accuracy", *words])
    assert code == 2
    one_line(err, "eval_jempp.py: error: argument", words[0], "--help")


def test_numbers_at_their_bounds():
    assert flags.number(float)("3.4028234663852886e38") == torch.finfo(torch.float32).max
    assert flags.number(float)("1.1754943508222875e-38") == torch.finfo(torch.float32).tiny
    assert flags.NATURAL(str(2**63 - 1)) == 2**63 - 1
    assert flags.number(float, above=0, finite=False)("inf") == float("inf")


def test_the_tilde_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = cli.train_args(["--data_root=~/data", "--run_dir=~/x"])
    assert (args.data_root, args.run_dir) == (f"{tmp_path}/data", f"{tmp_path}/x")
    own, _ = cli.evaluation_args(
        ["--load_path", "~/a.pt", "--results=~/r", "--features=~/f", "--inception_weights=~/i",
         "--ood", "folder:~/p", "svhn", "--eval", "ood"], eval_jempp.EVALUATIONS)
    found = [*own.load_path, own.results, own.features, own.inception_weights, *own.ood]
    assert found == [*(f"{tmp_path}/{name}" for name in ("a.pt", "r", "f", "i")),
                     f"folder:{tmp_path}/p", "svhn"]


# -- files ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained")
    assert train_jempp.main(tiny(run, "--n_epochs", "1")) == 0
    return run / "best.pt"


def test_names_that_are_not_utf_8_end_in_records(trained, tmp_path, call, monkeypatch):
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    shutil.copy(trained, odd)
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    code, _, err = call(eval_jempp.main, [
        "--load_path", odd / "best.pt", "--n_images", "20", "--labels", os.fsdecode(b"\xff"),
        "--eval", "accuracy", "calibration", "robustness", "--attacks", "pgd", "--n_attack", "2",
        "--attack_steps", "1", "--eps_linf", "8", "--eps_l2"])
    assert code == 0, err
    found = records.read_jsonl(odd / "eval" / "results.jsonl")
    assert {r["label"] for r in found} == {"�"}
    assert list((odd / "eval").glob("*.png"))


def test_an_out_set_whose_name_is_not_utf_8_has_a_name_for_files():
    assert file_name("folder:/a/" + os.fsdecode(b"\xff")) == "folder-�"


def test_results_that_cannot_be_written_name_the_way_out(trained, call, monkeypatch):
    def read_only(self, **words):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    code, _, err = call(eval_jempp.main,
                        ["--load_path", trained, "--eval", "accuracy"])
    assert code == 2
    one_line(err, "cannot be written (Read-only file system)", "--results")


def test_a_full_disk_says_so_and_names_the_file(tmp_path, call, monkeypatch):
    def on_a_full_disk(path, *words, **more):
        return open("/dev/full" if ".pt." in Path(path).name else path, *words, **more)

    monkeypatch.setattr(records, "open", on_a_full_disk, raising=False)
    code, _, err = call(train_jempp.main, tiny(tmp_path, "--max_steps", "1"))
    assert code == 2
    one_line(err, f"{os.strerror(errno.ENOSPC)} ({tmp_path}/last.pt)")


def test_blank_lines_among_records_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n\n  \n{"b": 2}\n\n')
    assert records.read_jsonl(path) == [{"a": 1}, {"b": 2}]


def test_two_processes_append_long_records_to_one_file(tmp_path):
    path, n, children = tmp_path / "a.jsonl", 150, []
    for who in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                for i in range(n):
                    records.append_jsonl(path, {"who": who, "i": i, "long": "x" * 30_000})
                code = 0
            os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((r["who"], r["i"]) for r in found) == [(w, i) for w in (0, 1) for i in range(n)]


# -- bfloat16 -------------------------------------------------------------------------------------
def cpu(monkeypatch, error=0.003, **has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(machine, "bf16_error", lambda: error)


def test_this_cpu_convolves_bfloat16_to_its_rounding():
    assert 0 < machine.bf16_error() < machine.BF16_BOUND


@pytest.mark.parametrize("has", ("avx512_bf16", "amx_bf16", "sve_bf16"))
def test_fast_turns_bfloat16_on_where_the_cpu_has_it_and_it_is_right(monkeypatch, has):
    words = ["--device", "cpu", "--fast"]
    cpu(monkeypatch, **{has: True})
    assert cli.train_args(words).amp == "bf16"
    assert cli.train_args([*words, "--amp", "off"]).amp == "off"
    assert cli.train_args(words[:2]).amp == "off"
    cpu(monkeypatch, error=0.5, **{has: True})
    assert cli.train_args(words).amp == "off"
    cpu(monkeypatch, **{has: False})
    assert cli.train_args(words).amp == "off"


def test_bfloat16_that_is_slow_gets_a_line_and_what_is_wrong_is_refused(
        tmp_path, call, monkeypatch):
    words = tiny(tmp_path, "--amp", "bf16", "--max_steps", "1")
    cpu(monkeypatch)
    code, out, _ = call(train_jempp.main, words)
    assert code == 0 and "no bfloat16 of its own" in out
    for error in (0.5, float("nan")):
        cpu(monkeypatch, error=error)
        code, _, err = call(train_jempp.main, words)
        assert code == 2
        one_line(err, "--amp off")


def test_a_fast_run_on_another_machine_says_how_to_go_on(tmp_path, monkeypatch, call):
    words = tiny(tmp_path, "--fast", "--compile", "off", "--max_steps", "1")
    cpu(monkeypatch, avx512_bf16=True)
    assert call(train_jempp.main, words)[0] == 0
    cpu(monkeypatch)
    code, _, err = call(train_jempp.main, words)
    assert code == 2
    one_line(err, "--amp bf16 there", "type --amp bf16")
    assert call(train_jempp.main, [*words, "--amp", "bf16"])[0] == 0
