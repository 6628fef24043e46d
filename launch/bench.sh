#!/usr/bin/env bash
# Measures speed beside the peers. `bash launch/bench.sh` runs all of it and makes benchmarks.json and
# benchmarks.md anew; `bash launch/bench.sh NAME ARGUMENTS` runs one and prints its figures:
#   train_step   the training step beside PyTorch's (--rounds=20, --batches=16, --native, ...)
#   input        the host's input beside torchvision's (--photos=FOLDER, --plan=FILE, ...)
#   prepare      posts a second as posts and workers grow (--posts=1000,4000, --workers=1,2)
#   restart      how soon a host knows its photos within an epoch of a billion records (--hosts=64,16)
#   tpu          the TPU compiler's cycles beside XLA's own grouped form (--topologies=v5p:2x2x1, --depth=8, ...)
# The first two need PEER_PYTHON, a Python that has torch, torchvision, timm and lightly (in a venv of its
# own); the last needs `.venv/bin/python -m pip install --require-hashes -r requirements-tpu.txt`. All of it
# takes some three hours on two cores, which should do nothing else. HASHVISION_BENCHMARK=DAY, the day in
# benchmarks.md, lets one add its figures to that run.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
names=(train_step input prepare restart tpu)
if [ $# -gt 0 ]; then
    case " ${names[*]} " in *" $1 "*) ;; *)
        echo "There is no benchmark $1; give one of ${names[*]}." >&2
        exit 2
        ;;
    esac
    names=("$1")
fi
case " ${names[*]} " in *" train_step "* | *" input "*)
    if ! "${PEER_PYTHON:-false}" -c "import torch" 2>/dev/null; then
        echo "Set PEER_PYTHON to a Python that has torch, torchvision, timm and lightly; there is nothing to compare with." >&2
        exit 2
    fi
    ;;
esac
setup requirements-test.txt
case " ${names[*]} " in *" tpu "*)
    if ! .venv/bin/python -c "import libtpu" 2>/dev/null; then
        echo "Install the TPU's compiler first: .venv/bin/python -m pip install --require-hashes -r requirements-tpu.txt" >&2
        exit 2
    fi
    ;;
esac

measure() { # measure NAME ARGUMENTS
    local name=$1 peer=()
    shift
    case $name in train_step | input) peer=("--peer_python=$PEER_PYTHON") ;; esac
    PYTHONPATH="tests/support:.${PYTHONPATH:+:$PYTHONPATH}" .venv/bin/python "tests/bench/$name.py" "${peer[@]}" "$@"
}

if [ $# -gt 0 ]; then
    measure "$@"
    exit
fi
rm -f benchmarks.json benchmarks.md
HASHVISION_BENCHMARK=$(date +%F) # one run, though midnight may pass
export HASHVISION_BENCHMARK
measure train_step --steps=supervised --batches=16 --native
measure train_step --steps=supervised --batches=64
measure train_step --steps=swav --batches=16
measure input
measure prepare
measure restart
measure tpu
measure tpu --topologies=v5p:2x2x1 --models=resnext50_32x4d,resnext101_32x8d,resnext101_32x32d
measure tpu --depth=8 --models=resnext101_32x8d,regnety_16gf,regnety_128gf
