#!/usr/bin/env bash
# Runs the test suite in .venv, which is made if missing. --full also runs the tests marked slow,
# --all also those marked long (the fault tests at full counts). Other flags go to pytest. Two
# processes share the tests. -n 0 runs them in one process, for a debugger.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
marks=(-m "not slow and not long")
case ${1:-} in
    --full) marks=(-m "not long"); shift ;;
    --all) marks=(); shift ;;
esac
exec python -m pytest -n 2 --dist worksteal "${marks[@]}" "$@"
