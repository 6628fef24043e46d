# Makes .venv with the pinned dependencies; sourced by the other scripts, from any folder.
# With bash, git and Python 3.11 or newer this is all the set-up there is.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Images of containers often set this. Every process would then compile TensorFlow anew: 13 s of CPU.
unset PYTHONDONTWRITEBYTECODE

find_python() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "hashvision needs Python 3.11, 3.12 or 3.13 on the PATH; none was found." >&2
    return 2
}

setup() { # setup FILE: .venv holds what the requirements file pins
    local python
    if cmp -s "$1" ".venv/$1"; then
        return
    fi
    python=$(find_python)
    echo "Installing $1 into .venv with $("$python" --version); this takes a minute or two."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # Python compiles what it imports; pip would compile all of TensorFlow, of which little is used.
    .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check \
        --require-hashes -r "$1"
    cp "$1" ".venv/$1"
}
