"""What is opened is a regular file of bounded size, checked before it is believed: special files,
hostile and damaged checkpoints, strangers' weights, file systems that refuse; and what is saved."""

import errno
import hashlib
import json
import os
import pickle
import signal
import stat
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import legacy_copy, released_file, tiny
from safetensors.torch import save_file
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

import eval_jempp
import train_jempp
from models import JEM
from utils import cli
from utils.files import checkpoint, records, torch_files
from utils.files.records import read_jsonl
from utils.program import InputError
from utils.training.build import build
from utils.training.guard import Guard

SMALL = ["--eval_every", "9", "--good_after", "1", "--ckpt_steps", "1"]


@pytest.fixture(autouse=True)
def in_bounded_time():
    """What waits for ever ends its test, not the suite."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it never ends"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with last.pt, candidate.pt and good.pt; not to be written to."""
    folder = tmp_path_factory.mktemp("run")
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                                                 signal.SIGUSR1)}
    assert train_jempp.main(tiny(folder, *SMALL, "--max_steps", "4")) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert {p.name for p in folder.glob("*.pt")} == {"last.pt", "candidate.pt", "good.pt",
                                                     "best.pt"}
    return folder


def copied(run, folder, *names):
    """The named files of ``run`` in ``folder``, all of the root for none. Returns ``folder``."""
    folder.mkdir(exist_ok=True)
    for path in run.iterdir():
        if path.is_file() and (not names or path.name in names):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def resigned(run, path, change):
    """last.pt of ``run`` after ``change(content)``, with a checksum that fits. Returns ``path``."""
    content = torch.load(run / "last.pt", weights_only=True)
    change(content)
    content["sha256"] = checkpoint.digest(content)
    torch.save(content, path)
    return path


def refused(result, *words):
    code, _, err = result
    assert code == 2 and len(err.strip().splitlines()) == 1, result
    assert all(word in err for word in words), err


# -- special files --------------------------------------------------------------------------------
def special(kind, path):
    """A special file at ``path``. Returns it."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 5 * 2**30)
    else:
        path.symlink_to(kind)
    return path


SPECIAL = ("pipe", "/dev/zero", "/dev/full", "/dev/random", "loop", "sparse")


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_not_evaluated(run, tmp_path, call, kind):
    path = special(kind, tmp_path / "x")
    argv = ["--eval", "accuracy", "--device", "cpu", "--load_path"]
    refused(call(eval_jempp.main, [*argv, path]), "x")
    refused(call(eval_jempp.main, [*argv, run / "best.pt", "--results", path]), "x")
    with pytest.raises(InputError):
        torch_files.read(path)


@pytest.mark.parametrize("name, kind", [
    ("last.pt", "pipe"), ("last.pt", "loop"), ("candidate.pt", "/dev/zero"), ("args.json", "pipe"),
    ("args.json", "sparse"), ("train.jsonl", "/dev/zero"), ("train.jsonl", "sparse"),
    (".lock", "pipe"), (".lock", "/dev/full")])
def test_special_files_in_a_run_folder_end_in_one_line(run, tmp_path, call, name, kind):
    folder = copied(run, tmp_path / "run")
    special(kind, folder / name)
    refused(call(train_jempp.main, tiny(folder, *SMALL, "--max_steps", "5")), name)


# -- hostile and damaged checkpoints --------------------------------------------------------------
def nested(kind):
    """A few bytes of lists (or tuples) in lists that stand for 10^30 objects."""
    inside = kind()
    for _ in range(30):
        inside = kind([inside] * 10)
    return inside


def tuple_key():
    """The pickle of {nested(tuple): 1}, which Python itself cannot make: it would hash the key."""
    pickled = b"\x80\x02})q\x00"
    for i in range(30):
        pickled += b"0(" + b"h%c" % i * 10 + b"tq%c" % (i + 1)
    return pickled + b"K\x01s."


@pytest.mark.parametrize("legacy", (False, True))
@pytest.mark.parametrize("place", ("root", "tuple", "key", "guard"))
def test_nested_objects_are_refused_before_they_are_walked_through(run, tmp_path, place, legacy):
    path = tmp_path / "a.pt"
    content = {"root": nested(list), "tuple": {"model": nested(tuple)}, "key": {},
               "guard": torch.load(run / "last.pt", weights_only=True) | {"guard": nested(list)}}
    torch.save(content[place], path, _use_new_zipfile_serialization=not legacy)
    if place == "key" and legacy:
        path.write_bytes(b"".join([*(pickle.dumps(x, 2) for x in (
            MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True})), tuple_key(),
            pickle.dumps([], 2)]))
    elif place == "key":
        with zipfile.ZipFile(path) as file:
            entries = {e.filename: file.read(e) for e in file.infolist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, data in entries.items():
                file.writestr(name, tuple_key() if name.endswith("data.pkl") else data)
    with pytest.raises(InputError, match="holds more than 200,000 objects"):
        checkpoint.open_any(path)


@pytest.mark.parametrize("data, words", [
    (b"<!DOCTYPE html>\n<html>", "it begins with '<!DOCTYPE': a failed download"),
    (b"404: Not Found", "'404:': a failed download"), (b"", "it is empty"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    (b"\x1f\x8b\x08\x00abc", "compressed by gzip"), (bytes(99), "it begins with")])
def test_what_is_no_checkpoint_is_called_so(tmp_path, data, words):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(InputError, match="is no PyTorch checkpoint") as error:
        checkpoint.open_any(tmp_path / "a.pt")
    assert words in str(error.value)


@pytest.mark.parametrize("value, name", [(Namespace(a=1), "argparse.Namespace"),
                                         (np.float64(1), "numpy._core.multiarray.scalar")])
def test_a_global_that_is_refused_is_named_with_a_way_out(tmp_path, value, name):
    torch.save({"args": value}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=name) as error:
        checkpoint.open_any(tmp_path / "a.pt")
    assert "weights_only=False" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda c: c["config"].update(bn_momentum={}), lambda c: c["config"].pop("depth"),
    lambda c: c["config"].update(depth=994, width=100), lambda c: c.update(step=-1),
    lambda c: c["args"].update(image_size=10**9), lambda c: c["args"].update(n_epochs="many"),
    lambda c: c["args"].update(class_names=5), lambda c: c["args"].update(dataset=5),
    lambda c: c["args"].pop("n_steps"), lambda c: c["args"].pop("depth"),
    lambda c: c["guard"].update(mean="x"), lambda c: c.update(buffer=c["buffer"][:1])])
def test_values_of_a_wrong_kind_are_one_line(run, tmp_path, call, change):
    folder = copied(run, tmp_path / "run", "args.json")
    path = resigned(run, folder / "last.pt", change)
    evaluate = ["--load_path", path, "--eval", "histogram", "--ood", "constant", "--device", "cpu"]
    results = [call(eval_jempp.main, evaluate),
               call(train_jempp.main, tiny(folder, *SMALL, "--max_steps", "5"))]
    assert all("Traceback" not in err for _, _, err in results)
    assert 2 in [code for code, _, _ in results]
    for result in results:
        if result[0]:
            refused(result, "")


def test_a_legacy_file_with_flipped_bits_is_refused_or_read(run, tmp_path):
    whole = legacy_copy(run / "best.pt", tmp_path / "a.pt").read_bytes()
    for place in range(2, 1500, 60):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        (tmp_path / "a.pt").write_bytes(data)
        try:
            checkpoint.open_any(tmp_path / "a.pt")
        except InputError as error:
            assert "\n" not in str(error)


def test_the_hash_is_of_the_file_that_was_loaded(run, tmp_path, monkeypatch):
    path, other = tmp_path / "a.pt", (run / "good.pt").read_bytes()
    path.write_bytes((run / "last.pt").read_bytes())
    load = torch.load

    def replaced_meanwhile(*args, **kwargs):
        content = load(*args, **kwargs)
        (tmp_path / "b.pt").write_bytes(other)
        (tmp_path / "b.pt").replace(path)
        return content

    monkeypatch.setattr(torch, "load", replaced_meanwhile)
    opened = checkpoint.open_any(path)
    assert opened.step == 4
    assert opened.sha256 == hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()


# -- strangers' weights ---------------------------------------------------------------------------
def prefixed(state, *prefixes):
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("save", [
    lambda theirs, ours, path: torch.save(ours, path),
    lambda theirs, ours, path: torch.save({"state_dict": ours, "epoch": 3}, path),
    lambda theirs, ours, path: torch.save({"model": {"state_dict": theirs}}, path),
    lambda theirs, ours, path: torch.save(prefixed(theirs, "_orig_mod.", "module."), path),
    lambda theirs, ours, path: torch.save(
        {"state_dict": prefixed(ours, "module.", "_orig_mod.", "module.")}, path),
    lambda theirs, ours, path: torch.save(
        {n.replace("f.", "f._orig_mod.", 1): t for n, t in theirs.items()}, path),
    lambda theirs, ours, path: torch.save(
        prefixed(ours, "module.") | {"n_averaged": torch.tensor(7)}, path),
    lambda theirs, ours, path: save_file(ours, path),
    lambda theirs, ours, path: save_file(prefixed(theirs, "module."), path)])
def test_weights_are_read_in_every_wrapping_and_in_eval_mode(tmp_path, save):
    theirs = released_file(tmp_path / "released.pt")["model_state_dict"]
    torch.manual_seed(0)
    ours = JEM.build(depth=10, width=1).state_dict()
    save(theirs, ours, tmp_path / "a")
    opened = checkpoint.open_any(tmp_path / "a")
    assert not any(module.training for module in opened.model.modules())
    state = opened.model.state_dict()
    assert state.keys() == ours.keys() and all(torch.equal(v, ours[k]) for k, v in state.items())


def test_what_is_opened_is_in_eval_mode(run):
    model = checkpoint.open_any(run / "last.pt").model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.rand(4, 3, 16, 16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_message_for_other_weights_lists_what_is_read(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="JEM, JEM.. and SADA-JEM.*safetensors.*state_dict"):
        checkpoint.open_any(tmp_path / "a.pt")
    state = JEM.build(depth=10, width=1).state_dict()
    torch.save(state | prefixed(state, "module."), tmp_path / "a.pt")
    with pytest.raises(InputError, match="two tensors"):
        checkpoint.open_any(tmp_path / "a.pt")


# -- what is saved --------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ("average", "momentum", "second moment", "buffer", "weights"))
def test_what_is_not_finite_anywhere_is_seen_before_it_is_saved(place):
    adam = ["--optimizer", "adam"] if place == "second moment" else []
    state = build(cli.train_args(tiny("x", "--ema", "0.9", *adam)), torch.device("cpu")).state
    state.model(torch.rand(4, 3, 16, 16)).sum().backward()
    state.optimizer.step()
    assert state.is_finite()
    kept = next(iter(state.optimizer.state.values()))
    tensor = {"average": state.average.module.stem.bias, "weights": state.model.stem.bias,
              "momentum": kept.get("momentum_buffer"), "second moment": kept.get("exp_avg_sq"),
              "buffer": state.buffer.images}[place]
    tensor.data[(0,) * tensor.dim()] = float("inf")
    assert not state.is_finite()
    found = Guard(Namespace(**state.args), 10).look(state, [{"loss": 1.0}], before_saving=True)
    assert found and "not finite" in found[1]


def test_a_network_that_is_not_finite_never_becomes_best_pt(tmp_path, call, monkeypatch):
    spoil = lambda batches, model: model.trunk.norm.running_mean.fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr("utils.evaluation.inference.update_bn", spoil)
    code, out, _ = call(train_jempp.main, tiny(tmp_path, "--n_epochs", "1", "--recalibrate_bn",
                                               "20"))
    assert code == 0 and "best.pt is left as it is" in out and not (tmp_path / "best.pt").exists()


# -- runs that go on ------------------------------------------------------------------------------
def test_a_damaged_last_pt_is_set_aside_and_the_run_goes_on(run, tmp_path, call):
    folder = copied(run, tmp_path / "run")
    damaged = (folder / "last.pt").read_bytes()[:-2000]
    (folder / "last.pt").write_bytes(damaged)
    code, out, err = call(train_jempp.main, tiny(folder, *SMALL, "--max_steps", "6"))
    assert code == 0 and "last.pt" in out and "last.damaged" in out, err
    assert (folder / "last.damaged").read_bytes() == damaged
    resumed = [r for r in read_jsonl(folder / "train.jsonl") if r["kind"] == "resume"]
    assert resumed[-1]["recovered_from"] == "candidate.pt" and "last.pt" in resumed[-1]["damaged"]
    assert call(train_jempp.main, tiny(tmp_path / "whole", *SMALL, "--max_steps", "6"))[0] == 0
    a, b = (checkpoint.load(d / "last.pt") for d in (folder, tmp_path / "whole"))
    assert a["step"] == 6 and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    for path in folder.glob("*.pt"):
        checkpoint.load(path)


@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
@pytest.mark.parametrize("what", ("an entry", "a weight"))
def test_an_optimiser_that_is_not_whole_is_refused_before_a_step(tmp_path, call, optimizer, what):
    words = tiny(tmp_path, "--optimizer", optimizer, "--p_x_weight", "0")
    assert call(train_jempp.main, [*words, "--max_steps", "1"])[0] == 0
    content = checkpoint.load(tmp_path / "last.pt")
    states = content["optimizer"]["state"]
    (states[0] if what == "an entry" else states).popitem()
    content["sha256"] = checkpoint.digest(content)
    torch.save(content, tmp_path / "last.pt")
    refused(call(train_jempp.main, words), "last.pt", "not whole")


def test_where_all_is_damaged_nothing_is_touched(run, tmp_path, call):
    folder = copied(run, tmp_path / "run")
    for name in ("last", "candidate", "good"):
        (folder / f"{name}.pt").write_bytes(b"")
    refused(call(train_jempp.main, tiny(folder, *SMALL)), "last.pt", "is empty")
    assert (folder / "last.pt").exists() and not list(folder.glob("*.damaged"))


def test_a_run_that_ends_within_its_first_epoch_leaves_a_best_pt(run, tmp_path, call):
    first = [*SMALL, "--max_steps", "2"]
    assert call(train_jempp.main, tiny(tmp_path, *first))[0] == 0
    assert checkpoint.open_any(tmp_path / "best.pt").step == 2
    assert checkpoint.load(tmp_path / "last.pt")["best"] == -1.0  # the next evaluation wins
    assert call(train_jempp.main, tiny(tmp_path, *SMALL, "--max_steps", "4"))[0] == 0
    a, b = (checkpoint.load(d / "last.pt") for d in (tmp_path, run))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_the_guards_bounds_can_be_switched_off_and_changed_in_a_run(run, tmp_path, call):
    off = cli.train_args(["--max_saturated", "1", "--min_accuracy_ratio", "0"])
    for args, faults in ((off, 0), (cli.train_args([]), 2)):
        guard, memory = Guard(args, 10), {}
        assert not any(guard.fault({"loss": 1.0, "accuracy": 0.9}, memory) for _ in range(300))
        fallen = [guard.fault({"loss": 1.0, "accuracy": 0.1}, memory) for _ in range(100)]
        found = [any(fallen), guard.fault({"loss": 1.0, "saturated": 1.0}, {}) is not None]
        assert sum(found) == faults
    folder = copied(run, tmp_path / "run")
    assert call(train_jempp.main, tiny(folder, *SMALL, "--max_steps", "5", "--max_saturated", "1",
                                       "--max_gap", "500"))[0] == 0
    resumed = [r for r in read_jsonl(folder / "train.jsonl") if r["kind"] == "resume"]
    assert resumed[-1]["args"]["max_saturated"] == 1 and resumed[-1]["args"]["max_gap"] == 500


# -- file systems that refuse ---------------------------------------------------------------------
@pytest.mark.parametrize("number, locked_by_another", [
    (errno.ENOSYS, False), (errno.EOPNOTSUPP, False), (errno.ENOLCK, False),
    (errno.EWOULDBLOCK, True), (errno.EACCES, True)])
def test_only_anothers_lock_keeps_a_run_out(tmp_path, monkeypatch, capsys, number,
                                            locked_by_another):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.fcntl, "flock", flock)
    try:
        with checkpoint.locked(tmp_path):
            assert not locked_by_another
        out = capsys.readouterr().out
        assert "cannot be locked" in out and out.count("\n") == 1
    except InputError as error:
        assert locked_by_another and "another process" in str(error)


@pytest.mark.parametrize("number", (errno.EINVAL, errno.ENOTSUP, errno.EIO))
def test_a_folder_that_cannot_be_synced_is_no_fault_but_a_broken_disk_is(tmp_path, monkeypatch,
                                                                         number):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        records.write_json(tmp_path / "a.json", {"a": 1})
        assert number != errno.EIO
    except OSError as error:
        assert number == error.errno == errno.EIO
    assert json.loads(Path(tmp_path / "a.json").read_text()) == {"a": 1}
