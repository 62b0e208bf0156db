#!/usr/bin/env bash
# The test suite, in .venv (made if need be). --full also runs the tests marked slow; other words
# go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
marks=(-m "not slow")
if [ "${1:-}" = --full ]; then
    marks=()
    shift
fi
exec python -m pytest "${marks[@]}" "$@"
