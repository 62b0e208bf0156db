"""The shape of the code: no import runs upward, no function is longer than a screen."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

# Each kind of file, and which kinds it may import. The programs are the files beside README.
MAY_IMPORT = {
    "models": {"models"},
    "samplers": {"models", "samplers"},
    "utils": {"models", "samplers", "utils"},
    "program": {"models", "samplers", "utils"},
    "scripts": {"models", "samplers", "utils", "program", "scripts"},
}
PROGRAMS = {path.stem for path in ROOT.glob("*.py")}
PRODUCT = sorted(path.relative_to(ROOT).as_posix() for path in (
    *ROOT.glob("*.py"), *(file for folder in MAY_IMPORT for file in (ROOT / folder).rglob("*.py"))))
TESTS = {path.stem for path in (ROOT / "tests").glob("*.py")}
MOST_LINES = 50


def imported(source):
    """The modules that Python ``source`` imports anywhere, also within functions."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:  # a relative one stays inside
            names.append(node.module)
    return names


def kind_of(top):
    """Which kind of file a module of ours is, by its first name; None for a library."""
    if top in PROGRAMS:
        return "program"
    return top if top in MAY_IMPORT else None


def upward(path, source):
    """What ``source``, of the file ``path`` (relative to ROOT), imports from above itself."""
    may = MAY_IMPORT[kind_of(path.split("/")[0].removesuffix(".py"))]
    return [name for name in imported(source)
            if (kind := kind_of(name.split(".")[0])) and kind not in may]


@pytest.mark.parametrize("path", PRODUCT)
def test_no_import_runs_upward(path):
    assert upward(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_the_programs_start_without_torchvision():
    """Its import doubles the time until a program says anything."""
    program = "import sys, train_jempp, eval_jempp; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path, source, found", [
    ("models/a.py", "from utils.data import load", ["utils.data"]),
    ("models/a.py", "def f():\n    import samplers.sgld", ["samplers.sgld"]),
    ("samplers/a.py", "from models import JEM\nfrom utils import cli", ["utils"]),
    ("utils/files/a.py", "from train_jempp import train", ["train_jempp"]),
    ("utils/a.py", "import torch, scripts.publish as p", ["scripts.publish"]),
    ("eval_jempp.py", "import train_jempp\nfrom utils import cli", ["train_jempp"]),
    ("scripts/a.py", "import train_jempp\nfrom scripts import publish", []),
])
def test_an_upward_import_is_found(path, source, found):
    assert upward(path, source) == found


@pytest.mark.parametrize("name", sorted(TESTS))
def test_a_test_file_imports_no_other(name):
    source = (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")
    assert set(imported(source)) & TESTS <= {"helpers"}


def long_functions(source):
    """(name, lines) of the functions in Python ``source`` that have too many lines."""
    functions = [node for node in ast.walk(ast.parse(source))
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    return [(name, lines) for name, lines in lengths if lines > MOST_LINES]


@pytest.mark.parametrize("path", [path for path in PRODUCT if path != "utils/flags.py"])
def test_no_function_is_longer_than_50_lines(path):
    found = long_functions((ROOT / path).read_text(encoding="utf-8"))
    assert found == []


def test_a_long_function_is_found():
    body = "\n".join("    pass" for _ in range(MOST_LINES))
    assert long_functions(f"def f():\n{body}") == [("f", MOST_LINES + 1)]
    assert long_functions(f"def f():\n{body[9:]}") == []
