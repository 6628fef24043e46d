#!/usr/bin/env bash
# Runs the checks of style and types and all tests; `bash launch/test.sh quick` runs only the fast tests. Further
# arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup requirements-test.txt

selection=()
workers=$(.venv/bin/python -c 'import os; print(os.cpu_count())')
if [ "${1:-}" = quick ]; then
    shift
    selection=(-m "not slow and not realdata")
else
    workers=$((workers + 1)) # because many slow tests wait for processes
    .venv/bin/python -m ruff check .
    .venv/bin/python -m ruff format --check .
    .venv/bin/basedpyright --pythonpath .venv/bin/python
fi
# tests/conftest.py puts slow files first; --no-loadscope-reorder keeps pytest-xdist from putting large ones first.
exec .venv/bin/python -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
