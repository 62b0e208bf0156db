#!/usr/bin/env bash
# The test suite, in .venv (made if need be). --full also runs the tests marked slow, --all those
# marked long as well (the fault tests at full counts); other words go to pytest. Two processes share
# the tests; -n 0 runs them in one, as a debugger needs it.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
marks=(-m "not slow and not long")
case ${1:-} in
    --full) marks=(-m "not long"); shift ;;
    --all) marks=(); shift ;;
esac
exec python -m pytest -n 2 --dist worksteal "${marks[@]}" "$@"
