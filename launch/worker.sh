#!/usr/bin/env bash
# Runs on each worker of a pod, called by launch/tpu_vm.sh. On the worker it is ~/hashvision/worker.sh, beside
#   COMMIT/     the code           venv-HASH/  the environment that its requirements pin
#   command     what to run        log, code   its output, and its exit code when it has ended
#   lock        held while the run lasts; released when it ends or the machine restarts
# Each command answers in one line, `worker 1 of 4: ...`, since gcloud does not always report that a worker failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Google's metadata server lists the workers as HOST,HOST or as NAME:ID:HOST,NAME:ID:HOST. The first one is the
# coordinator, as in JAX (jax/_src/clusters/cloud_tpu_cluster.py).
attribute() {
    curl --silent --show-error --fail --retry 5 --header "Metadata-Flavor: Google" \
        "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}
number=$(attribute agent-worker-number)
endpoints=$(attribute worker-network-endpoints)
IFS=, read -ra hosts <<<"$endpoints"

answer() {
    echo "worker $number of ${#hosts[@]}: $*"
}

venv() { # venv COMMIT: names its environment; commits with the same pins share one, which never changes
    echo "venv-$(cat "$1"/requirements{,-tpu}.txt | sha256sum | cut -c -12)"
}

setup() { # setup COMMIT
    local venv
    venv=$(venv "$1")
    if [ ! -e "$venv/complete" ]; then
        # TPU images have Python 3.10, which is too old. uv fetches a newer one and installs in a minute.
        PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --require-hashes -r "$1/requirements-uv.txt"
        python3 -m uv venv --quiet --clear --python ">=3.11,<3.14" "$venv"
        python3 -m uv pip install --quiet --python "$venv/bin/python" --require-hashes \
            -r "$1/requirements.txt" -r "$1/requirements-tpu.txt"
        touch "$venv/complete"
    fi
    answer "ready with $1"
}

train() { # train COMMIT PORT WORKDIR CONFIG [OVERRIDES]
    if [ ! -e "$1" ] || [ ! -e "$(venv "$1")/complete" ]; then
        answer "refused: commit $1 is not installed; run \`setup\`"
        return
    fi
    exec 9>>lock
    if ! flock --wait 1 9; then
        if cmp -s command <(printf '%s\0' "$@"); then
            answer "already running"
        else
            answer "refused: another run is active; \`stop\` stops it"
        fi
        return
    fi
    printf '%s\0' "$@" >./command
    rm -f code pid stopped
    # Its own session outlives this one, and inherits the lock.
    setsid bash "${BASH_SOURCE[0]##*/}" run </dev/null >>log 2>&1 &
    answer "started"
}

run() {
    local arguments commit port workdir config python training code
    mapfile -d '' -t arguments <./command
    commit=${arguments[0]} port=${arguments[1]} workdir=${arguments[2]} config=${arguments[3]}
    echo "$(date --utc +%FT%TZ) $(hostname), worker $number of ${#hosts[@]}: commit $commit"
    if [ ${#hosts[@]} -gt 1 ]; then
        export JAX_COORDINATOR_ADDRESS=${hosts[0]##*:}:$port JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$number
    fi
    export PYTHONUNBUFFERED=1
    python=$PWD/$(venv "$commit")/bin/python
    (
        cd "$commit"
        exec "$python" -m hashvision train "--config=$config" "--workdir=$workdir" "${arguments[@]:4}"
    ) &
    training=$!
    echo $training >pid
    trap : TERM # at shutdown training saves; stay alive to record how it ended
    while :; do
        code=0
        wait $training || code=$?
        kill -0 $training 2>/dev/null || break
    done
    echo $code >code.partial
    mv code.partial code
    # The disk is deleted with the machine; the workdir is not.
    case $workdir in
        *://*) gcloud storage cp --quiet log "$workdir/logs/$(hostname)-$number.log" ;;
        *) mkdir -p "$workdir/logs" && cp log "$workdir/logs/$(hostname)-$number.log" ;;
    esac || echo "Could not copy the log to $workdir/logs."
    kill -KILL -- -$$ # processes left over from the run would keep the chips busy
}

status() { # status WORKDIR
    local reason="" checkpoint="" code
    if [ "$number" = 0 ]; then
        checkpoint=$(checkpoint "$1")
        checkpoint=", ${checkpoint:+checkpoint }${checkpoint:-no checkpoint}"
    fi
    if ! flock --nonblock lock true; then
        answer "running$checkpoint"
    elif [ -e stopped ]; then
        answer "stopped$checkpoint"
    elif [ -e code ]; then
        code=$(<code)
        if [ "$code" != 0 ]; then
            reason=$(tail -n 200 log | grep '^hashvision: ' | tail -n 1 || true)
            reason=": ${reason:-$(tail -n 1 log)}"
        fi
        answer "ended $code$checkpoint$reason"
    elif [ -e command ]; then
        answer "lost$checkpoint: the machine was restarted"
    else
        answer "idle$checkpoint"
    fi
}

checkpoint() { # checkpoint WORKDIR: prints the step of the newest checkpoint
    case $1 in
        *://*) gcloud storage ls "$1/checkpoints/" ;;
        *) ls "$1/checkpoints" ;;
    esac 2>/dev/null | sed 's,/*$,,; s,.*/,,' | grep -x '[0-9]*' | sort -n | tail -n 1 || true
}

stop() { # training saves on SIGTERM; it is killed if it takes longer than ten minutes
    if flock --nonblock lock true; then
        answer "nothing is running"
        return
    fi
    touch stopped
    kill -TERM "$(<pid)" || true
    flock --wait 600 lock true || kill -KILL "$(<pid)"
    flock --wait 60 lock true
    answer "stopped"
}

"$@"
