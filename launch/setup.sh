# Creates .venv with the pinned requirements. The other scripts source this file; it works from any folder.
# It needs bash, git and Python 3.11 to 3.13, and there is no other set-up.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Container images often set this. Every process would then compile TensorFlow's Python files again: 13 s of CPU.
unset PYTHONDONTWRITEBYTECODE

find_python() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "hashvision needs Python 3.11, 3.12 or 3.13; put one on the PATH." >&2
    return 2
}

setup() { # setup FILE: installs the pins of a requirements file into .venv, unless they are there
    local python
    if cmp -s "$1" ".venv/$1"; then
        return
    fi
    python=$(find_python)
    echo "Installing $1 into .venv with $("$python" --version); this takes a minute or two."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # --no-compile: Python compiles what it imports, while pip would compile all of TensorFlow.
    .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check \
        --require-hashes -r "$1"
    cp "$1" ".venv/$1"
}
