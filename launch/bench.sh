#!/usr/bin/env bash
# Measures speed beside the peers: benchmarks.md and benchmarks.json. PEER_PYTHON names a Python that
# has torch and timm (pip install torch timm, in a venv of its own).
# Some twenty minutes on two cores, which should do nothing else. Arguments go to
# tests/bench/train_step.py: --rounds=20, --batches=16, --native, ...
set -euo pipefail
. "$(dirname "$0")/setup.sh"
if ! "${PEER_PYTHON:-false}" -c "import torch" 2>/dev/null; then
    echo "Set PEER_PYTHON to a Python that has torch and timm; there is nothing to compare with." >&2
    exit 2
fi
setup requirements-test.txt
exec .venv/bin/python tests/bench/train_step.py --peer_python="$PEER_PYTHON" "$@"
