#!/usr/bin/env bash
# Measures speed and compares it with other libraries. `bash launch/bench.sh` runs all benchmarks and replaces
# benchmarks.json and benchmarks.md. `bash launch/bench.sh NAME ARGUMENTS` runs one and prints its figures:
#   train_step   the training step, against PyTorch (--rounds=20, --batches=16, --native, ...)
#   input        the host's input pipeline, against torchvision (--photos=FOLDER, --plan=FILE, ...)
#   prepare      posts per second for several numbers of posts and workers (--posts=1000,4000, --workers=1,2)
#   restart      how soon a host finds its position in an epoch of a billion records (--hosts=64,16)
#   tpu          the TPU compiler's cycles, against XLA's grouped convolutions (--topologies=v5p:2x2x1, --depth=8, ...)
# The first two need PEER_PYTHON, a Python with torch, torchvision, timm and lightly (in its own venv). The last needs
# `.venv/bin/python -m pip install --require-hashes -r requirements-tpu.txt`. All of them take about three hours on two
# cores, which should be otherwise idle. To add the figures of one benchmark to an existing run, set
# HASHVISION_BENCHMARK=DAY to the day in benchmarks.md.
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
        echo "PEER_PYTHON does not run torch; set it to a Python with torch, torchvision, timm and lightly." >&2
        exit 2
    fi
    ;;
esac
setup requirements-test.txt
case " ${names[*]} " in *" tpu "*)
    if ! .venv/bin/python -c "import libtpu" 2>/dev/null; then
        echo "The TPU compiler is missing; run .venv/bin/python -m pip install --require-hashes -r requirements-tpu.txt." >&2
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
HASHVISION_BENCHMARK=$(date +%F) # the same day for all, even past midnight
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
