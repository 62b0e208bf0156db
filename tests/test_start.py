"""--load_path: a run begins with weights that somebody has, and then depends on its own files."""

import json

import pytest
import torch
from helpers import RELEASED, released_file, tiny

import train_jempp
from utils.files import checkpoint
from utils.files.records import read_jsonl

HEAD = ("trunk.head.weight", "trunk.head.bias")


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("softmax"), "--p_x_weight", "0")


@pytest.fixture(scope="module")
def jem(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("jem"))


def trained(run, *words):
    """RUN/last.pt after three steps."""
    assert train_jempp.main(tiny(run, "--n_epochs", "1", *words)) == 0
    return run / "last.pt"


def start_of(run):
    return checkpoint.load(run / "start.pt")


def same(a, b, without=()):
    return all(torch.equal(v, b[k]) for k, v in a.items() if k not in without)


def test_a_softmax_network_becomes_a_jem_and_needs_its_file_no_more(tmp_path, call, softmax):
    run, file = tmp_path / "run", tmp_path / "file.pt"
    file.write_bytes(softmax.read_bytes())
    words = tiny(run, "--load_path", file, "--n_epochs", "2")
    code, out, err = call(train_jempp.main, [*words, "--max_steps", "2"])
    sha256 = checkpoint.sha256_of(file)
    assert code == 0 and f"(SHA-256 {sha256[:8]})" in out, err
    start, last = start_of(run), checkpoint.load(run / "last.pt")
    assert same(start["model"], checkpoint.load(softmax)["model"])
    assert start["step"] == 0 and not start["optimizer"]["state"] and start["buffer"] is not None
    assert last["step"] == 2 and last["args"]["load_sha256"] == sha256
    assert read_jsonl(run / "train.jsonl")[0]["args"]["load_sha256"] == sha256
    file.write_bytes(b"something else")
    code, out, err = call(train_jempp.main, [*words, "--max_steps", "3"])
    assert code == 0 and "after step 2" in out, err
    file.unlink()
    code, out, err = call(train_jempp.main, words)
    assert code == 0 and "after step 3" in out, err
    code, _, err = call(train_jempp.main, tiny(run, "--n_epochs", "2"))
    assert code == 2 and "--load_path" in err


def test_a_run_killed_before_its_first_save_starts_from_what_it_loaded(tmp_path, call, softmax):
    run, file = tmp_path / "run", tmp_path / "file.pt"
    file.write_bytes(softmax.read_bytes())
    words = tiny(run, "--load_path", file, "--n_epochs", "1")
    assert call(train_jempp.main, [*words, "--max_steps", "1"])[0] == 0
    first = checkpoint.load(run / "last.pt")
    for path in (file, run / "last.pt"):
        path.unlink()
    code, out, err = call(train_jempp.main, [*words, "--max_steps", "1"])
    assert code == 0 and "after step 0" in out, err
    assert same(first["model"], checkpoint.load(run / "last.pt")["model"])


def test_a_rollback_to_the_beginning_goes_back_to_what_was_loaded(tmp_path, call, softmax):
    run = tmp_path / "run"
    code, out, _ = call(train_jempp.main, tiny(
        run, "--load_path", softmax, "--n_epochs", "1", "--max_gap", "1e-12",
        "--max_rollbacks", "1"))
    assert code == 3 and "back to step 0" in out
    last = checkpoint.load(run / "last.pt")
    assert last["step"] == 0 and last["rng"]["stream"] == 1
    assert same(last["model"], checkpoint.load(softmax)["model"])


def test_the_replay_buffer_comes_along_when_asked_for(tmp_path, call, jem):
    words = tiny(tmp_path / "run", "--load_path", jem, "--load_buffer", "--max_steps", "1")
    code, _, err = call(train_jempp.main, words)
    assert code == 0, err
    start, file = start_of(tmp_path / "run"), checkpoint.load(jem)
    assert torch.equal(start["buffer"], file["buffer"]) and same(start["model"], file["model"])


def test_other_classes_take_a_new_last_layer(tmp_path, call):
    released_file(tmp_path / "a.pt", **{"class_output.weight": torch.zeros(7, 64),
                                        "class_output.bias": torch.zeros(7)})
    words = tiny(tmp_path / "run", *RELEASED, "--load_path", tmp_path / "a.pt", "--max_steps", "1")
    code, _, err = call(train_jempp.main, words)
    assert code == 2 and "knows 7 classes, digits has 10: --no-load_head" in err
    code, _, err = call(train_jempp.main, [*words, "--no-load_head"])
    assert code == 0, err
    file = checkpoint.open_any(tmp_path / "a.pt").model.state_dict()
    start = start_of(tmp_path / "run")["model"]
    assert same(file, start, HEAD) and start[HEAD[0]].shape == (10, 64)


@pytest.mark.parametrize("words, told", [
    (["--width", "2"], "is a WRN-10-1, stride first, stem stride 2 with norm batch, this run's "
                       "network is a WRN-10-2, stride first, stem stride 2 with norm batch: type "
                       "--width 1"),
    (["--no-stride_first"], "type --stride_first"), (["--norm", "none"], "type --norm batch"),
    (["--load_buffer", "--buffer_size", "41"], "holds 40 images: type --buffer_size 40"),
    (["--load_buffer", "--p_x_weight", "0"], "has no replay buffer"),
    (["--load_buffer", "--image_size", "32"], "its images are 16x16, this run's 32x32"),
    (["--load_buffer", "--class_cond_p_x_sample"], "does not lie in blocks of these classes"),
    (["--load_path", "nowhere.pt"], "no checkpoint nowhere.pt"),
])
def test_what_does_not_fit_is_one_line(tmp_path, call, jem, words, told):
    code, _, err = call(train_jempp.main, tiny(tmp_path / "run", "--load_path", jem, *words))
    assert code == 2 and told in err and len(err.splitlines()) == 1, err
    assert not list((tmp_path / "run").glob("*.pt"))


def test_flags_that_wait_for_load_path(tmp_path, call, softmax):
    for word in ("--load_buffer", "--no-load_head"):
        code, _, err = call(train_jempp.main, tiny(tmp_path / "run", word, "--dry_run"))
        assert code == 2 and "--load_path FILE" in err
    code, _, err = call(train_jempp.main, tiny(tmp_path / "run", "--load_path", softmax,
                                               "--load_buffer"))
    assert code == 2 and "holds no replay buffer" in err


def test_runs_without_it_are_as_they_were(call):
    code, out, _ = call(train_jempp.main, ["--dry_run"])
    options = json.loads(out)
    assert code == 0 and options["load_path"] is options["load_sha256"] is None
