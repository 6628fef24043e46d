#!/usr/bin/env bash
# Runs everything on this machine: draws posts, prepares a dataset, trains, evaluates and prints a table. The results
# are in runs/drawn. With arguments it installs the requirements and passes the arguments to hashvision:
#   bash launch/local.sh train --config=demo --workdir=runs/mine ...
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup requirements.txt

hashvision() { .venv/bin/python -m hashvision "$@"; }
if [ $# -gt 0 ]; then
    hashvision "$@"
    exit
fi

# On CPU this makes compilation a third faster and training hardly slower: most time is spent in ready-made kernels.
export XLA_FLAGS=${XLA_FLAGS:---xla_backend_optimization_level=1}
runs=runs/drawn
[ -d $runs/posts ] || hashvision draw --output=$runs/posts
hashvision prepare --posts=$runs/posts/posts.jsonl --output=$runs/dataset
rm -rf $runs/workdir
hashvision train --config=demo:drawn --config.dataset=$runs/dataset --workdir=$runs/workdir

posts=$runs/posts
for untrained in --untrained ""; do
    hashvision evaluate --workdir=$runs/workdir --dataset=$posts/transfer \
        --protocol=knn,linear $untrained >>$runs/evaluations.log
    hashvision evaluate --workdir=$runs/workdir --dataset=$posts/multilabel \
        --protocol=multilabel $untrained >>$runs/evaluations.log
done
.venv/bin/python - $runs/workdir/evaluations <<'PYTHON'
import json, pathlib, sys

print(f"\n{'':<34}{'untrained':>10}{'trained':>10}{'95% interval':>20}")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*[!d].json")):
    trained = json.loads(path.read_text())
    untrained = json.loads(path.with_name(f"{path.stem}-untrained.json").read_text())
    for name, metric in trained["metrics"].items():
        row = f"{trained['protocol']} {trained['dataset']} {name}"
        before = untrained["metrics"][name]["value"]
        interval = f"{metric['low']:.1%} to {metric['high']:.1%}"
        print(f"{row:<34}{before:>10.1%}{metric['value']:>10.1%}{interval:>20}")
PYTHON
cat <<END

posts        $runs/posts (see contact_sheet.png)
dataset      $runs/dataset (manifest.json, vocabulary.json)
run          $runs/workdir (checkpoints, metrics.jsonl, tensorboard)
evaluations  $runs/workdir/evaluations (tables: $runs/evaluations.log)
END
