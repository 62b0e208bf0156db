# Sourced by quickstart.sh and test.sh. Makes .venv if it is missing, installs the requirements file
# $1 if it has changed, and puts .venv first on PATH. Prints nothing if there is nothing to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    for python in python3.11 python3.12 python3.13 python3 python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        python=
    done
    [ -n "$python" ] || { echo "Python 3.11 or later is needed: none found on PATH" >&2; exit 2; }
    "$python" -m venv .venv ||
        { echo "python could not make .venv; on Debian: apt install python3-venv" >&2; exit 2; }
fi

wanted=$(cat requirements.txt "$1" | cksum)
if [ "$(cat .venv/installed."$(basename "$1")" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $1 into .venv (PyTorch is large: a minute or two, about 5 GB)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" ||
        { echo "pip could not install $1: is there a network?" >&2; exit 2; }
    echo "$wanted" > .venv/installed."$(basename "$1")"
fi
export PATH="$PWD/.venv/bin:$PATH"
