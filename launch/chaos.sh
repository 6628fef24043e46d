#!/usr/bin/env bash
# Harms a run of several processes twenty times (killed, stopped, disk full, damaged checkpoints and
# shards, other numbers of hosts) and asserts that it ends as one that nothing happened to. Some ten
# minutes on two cores. `bash launch/chaos.sh --kills=5 --seed=1` for fewer, or other ones.
# `bash launch/chaos.sh fuzz` tries 100,000 inputs at every door (tests/support/doors.py) and prints a table:
# some hours; `fuzz --cases=2000 --doors=labels,overrides --seed=1` for fewer, some, or other ones.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup requirements-test.txt
program=tests/support/chaos.py
if [ "${1:-}" = fuzz ]; then
    shift
    program=tests/support/doors.py
fi
PYTHONPATH="tests/support:.${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu exec .venv/bin/python "$program" "$@"
