#!/usr/bin/env bash
# Sets up and runs the tests: `bash launch/test.sh` all of them, `bash launch/test.sh quick` those of
# seconds; further arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup requirements-test.txt

selection=()
if [ "${1:-}" = quick ]; then
    shift
    selection=(-m "not slow and not realdata")
else
    .venv/bin/python -m ruff check .
    .venv/bin/python -m ruff format --check .
    .venv/bin/basedpyright --pythonpath .venv/bin/python
fi
# Slow files come first (tests/conftest.py), where pytest-xdist would begin with those of many tests.
exec .venv/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
