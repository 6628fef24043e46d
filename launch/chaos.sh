#!/usr/bin/env bash
# Disturbs a training run of several processes twenty times (kills, stops, a full disk, damaged checkpoints and shards,
# other numbers of hosts), and asserts that it ends like an undisturbed run. Takes about ten minutes on two cores;
# `bash launch/chaos.sh --kills=5 --seed=1` sets the number of disturbances and their seed.
# `bash launch/chaos.sh fuzz` tries 100,000 hostile inputs on each kind of input (tests/support/doors.py) and prints a
# table. It takes hours; `fuzz --cases=2000 --doors=labels,overrides --seed=1` sets the number, the kinds and the seed.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup requirements-test.txt
program=tests/support/chaos.py
if [ "${1:-}" = fuzz ]; then
    shift
    program=tests/support/doors.py
fi
PYTHONPATH="tests/support:.${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu exec .venv/bin/python "$program" "$@"
