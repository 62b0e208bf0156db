"""Fixtures and hooks of all tests. One thread: tiny networks only lose by more."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of a CPU, their subprocesses too
import torch  # noqa: E402

torch.set_num_threads(1)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def pytest_collection_modifyitems(items):
    """Slow tests first: none of them is then what the other process waits for at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def empty_torch_home(tmp_path_factory, monkeypatch):
    """No Inception weights, even where the user's own cache holds them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch_home"))


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """No picture of the curves at each evaluation of a tiny run, but where they are what is tested:
    drawing takes longer than such a run."""
    if "curves" not in request.node.nodeid:
        monkeypatch.setattr("utils.training.run_log.RunLog.curves", lambda self: None)


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a script's main with a list of words; returns (exit code, stdout, stderr)."""
    from utils import program

    def run(main, argv):
        before = {n: signal.getsignal(n) for n in SIGNALS}
        monkeypatch.setattr(sys, "argv", [Path(sys.modules[main.__module__].__file__).name])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            program.run(lambda: main([str(word) for word in argv]))
        for number, handler in before.items():
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run
