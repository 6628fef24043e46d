#!/usr/bin/env bash
# Measures speed beside the peers: benchmarks.md and benchmarks.json. `bash launch/bench.sh` runs all,
# `bash launch/bench.sh NAME ARGUMENTS` one of
#   train_step   the training step beside PyTorch's (--rounds=20, --batches=16, --native, ...)
#   input        the host's input beside torchvision's (--photos=FOLDER, --plan=FILE, ...)
#   prepare      posts a second as posts and workers grow (--posts=1000,4000, --workers=1,2)
#   restart      how soon a host knows its photos within an epoch of a billion records (--hosts=64,16)
#   tpu          the TPU compiler's cycles beside XLA's own grouped form; needs requirements-tpu.txt
# The first two need PEER_PYTHON, a Python that has torch, torchvision, timm and lightly (in a venv of
# its own). All take some two hours on two cores, which should do nothing else.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
chosen=(train_step input prepare restart tpu)
if [ $# -gt 0 ]; then
    case " ${chosen[*]} " in *" $1 "*) ;; *)
        echo "There is no benchmark $1; give one of ${chosen[*]}." >&2
        exit 2
        ;;
    esac
    chosen=("$1")
    shift
fi
case " ${chosen[*]} " in *" train_step "* | *" input "*)
    if ! "${PEER_PYTHON:-false}" -c "import torch" 2>/dev/null; then
        echo "Set PEER_PYTHON to a Python that has torch, torchvision, timm and lightly; there is nothing to compare with." >&2
        exit 2
    fi
    ;;
esac
setup requirements-test.txt
for name in "${chosen[@]}"; do
    peer=()
    case $name in train_step | input) peer=("--peer_python=$PEER_PYTHON") ;; esac
    PYTHONPATH="tests:.${PYTHONPATH:+:$PYTHONPATH}" .venv/bin/python "tests/bench/$name.py" "${peer[@]}" "$@"
done
