#!/usr/bin/env bash
# Trains on a Cloud TPU, of one host or a pod of many. `bash launch/tpu_vm.sh VERB`, one of
#   create                    make it: on demand, spot or queued, as launch/pod.env says
#   setup                     the commit that is checked out, what it pins and the TPU's JAX, on all workers
#   train CONFIG [OVERRIDES]  start training, or go on; it runs by itself and keeps its log
#   status                    what Google says of it, and what each worker is doing
#   logs [WORKER [OPTIONS]]   the end of a worker's log (0, or all), by tail: `logs 0 -f` follows it
#   babysit CONFIG [OVERRIDES]  all of the above until the run is done, again after each preemption
#   stop                      training saves and ends; `train` goes on
#   delete                    give it back
# --dry-run prints the gcloud commands instead. Settings: launch/pod.env.example. All verbs may be repeated.
# It exits as `train` does: 0, 75 where the same command goes on, 2 where something must be mended first.
#
# What it takes from Google's documentation (cloud.google.com/tpu/docs and /sdk/gcloud/reference/compute/tpus):
# - Nodes are CREATING, READY, RESTARTING, REIMAGING, DELETING, REPAIRING, STOPPED, STOPPING, STARTING,
#   PREEMPTED, TERMINATED, HIDING, HIDDEN, UNHIDING or UNKNOWN ("after a failed repair").
# - Queued resources are CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, SUSPENDED
#   (its nodes are deleted, as after a preemption), DELETING or FAILED; `delete --force` takes the nodes with it.
# - A preempted node stays as a name until it is deleted, and only then can be made again.
# - `ssh --worker=all` runs the command everywhere at once. In older versions it ends with 0 when a worker's
#   failed, and it repeats what ends with 255; so workers answer in words, and the answers are counted.
set -euo pipefail

fail() {
    echo "$*" >&2
    exit 2
}

gcloud_tpus() { # a command that changes something
    if [ "$dry" ]; then
        echo "gcloud compute tpus$(printf ' %q' "$@")" >&4
    else
        gcloud compute tpus "$@" </dev/null
    fi
}

describe() { # describe queued-resources|tpu-vm FIELD: its value, ABSENT where there is none of that name
    local errors question=(compute tpus "$1" describe "$NAME" "${place[@]}" "--format=value($2)")
    if [ "$dry" ]; then
        echo "gcloud$(printf ' %q' "${question[@]}")" >&4
        echo "$dry"
        return
    fi
    {
        if ! errors=$(gcloud "${question[@]}" 2>&1 >&3 </dev/null); then
            case $errors in
                *NOT_FOUND*) echo ABSENT >&3 ;;
                *)
                    echo "$errors" >&2
                    return 1
                    ;;
            esac
        fi
    } 3>&1
}

state() { # READY where it can be used, else what Google calls it
    local request=ACTIVE node
    if [ "$QUEUED" = yes ]; then
        request=$(describe queued-resources state.state) || return
    fi
    if [ "$request" = ACTIVE ]; then
        node=$(describe tpu-vm state) || return
        [ "$QUEUED$node" != yesABSENT ] || node=SUSPENDED
    fi
    echo "${node:-$request}"
}

create() {
    local now spot=()
    now=$(state) || return
    case $now in
        ABSENT) ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED | UNKNOWN) remove || return ;;
        READY)
            echo "$NAME is there."
            return
            ;;
        *)
            echo "$NAME is $now already; \`status\` tells when it is READY."
            return
            ;;
    esac
    [ "$SPOT" = no ] || spot=(--spot)
    if [ "$QUEUED" = yes ]; then
        gcloud_tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" --accelerator-type="$TYPE" \
            --runtime-version="$VERSION" "${spot[@]}" --async "${CREATE_FLAGS[@]}"
    else
        gcloud_tpus tpu-vm create "$NAME" "${place[@]}" --accelerator-type="$TYPE" \
            --version="$VERSION" "${spot[@]}" "${CREATE_FLAGS[@]}"
    fi
}

remove() {
    if [ "$QUEUED" = yes ]; then
        gcloud_tpus queued-resources delete "$NAME" "${place[@]}" --force
    else
        gcloud_tpus tpu-vm delete "$NAME" "${place[@]}"
    fi
}

delete() {
    local now
    now=$(state) || return
    if [ "$now" = ABSENT ]; then
        echo "There is no $NAME."
    else
        remove
    fi
}

ready() { # refuses where no worker can be reached
    local now
    now=$(state) || return
    [ "$now" = READY ] || fail "$NAME is $now; \`create\` makes it, \`status\` tells when it is READY."
}

remote() { # remote WORKERS COMMAND: of a shell, in the workers' home folder
    gcloud_tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$1" --command="$2" "${SSH_FLAGS[@]}"
}

workers() { # workers VERB [ARGUMENTS]: launch/worker.sh on all of them; the answers, a line each
    ask "bash hashvision/worker.sh$(printf ' %q' "$@")"
}

ask() { # ask COMMAND: 75 where a worker does not answer, 2 where one refuses
    local said answers count
    said=$(remote all "$1") || true # the answers tell more than the exit code
    [ ! "$dry" ] || return 0
    answers=$(grep -E '^worker [0-9]+ of [0-9]+: ' <<<"$said" | sort -u -n -k 2,2) || true
    count=$(wc -l <<<"$answers")
    echo "${answers:-$said}"
    if [[ ! $answers =~ ^worker\ [0-9]+\ of\ $count: ]]; then
        echo "Not all workers of $NAME answered; what gcloud said stands above." >&2
        return 75
    elif [[ $answers == *": refused: "* ]]; then
        return 2
    fi
}

setup() {
    local archive=hashvision-$commit.tar.gz folder
    folder=$(mktemp -d)
    git archive --format=tar.gz --prefix="$commit/" --output="$folder/$archive" "$commit" || return
    gcloud_tpus tpu-vm scp "$folder/$archive" "$NAME:$archive" "${place[@]}" --worker=all "${SSH_FLAGS[@]}" || return
    rm -r "$folder"
    # The folder of a commit appears whole, or not at all.
    ask "set -e; mkdir -p hashvision; [ -d hashvision/$commit ] || { rm -rf hashvision/partial;\
 mkdir hashvision/partial; tar -xzf $archive -C hashvision/partial; mv hashvision/partial/$commit hashvision/; };\
 ln -sfn $commit/launch/worker.sh hashvision/worker.sh; exec bash hashvision/worker.sh setup $commit"
}

train() { # train CONFIG [OVERRIDES]
    workers train "$commit" "$PORT" "$WORKDIR" "$@"
}

status() {
    local now
    now=$(state) || return
    echo "$NAME is $now."
    if [ "$now" = READY ]; then
        workers status "$WORKDIR"
    fi
}

logs() { # logs [WORKER [OPTIONS]]
    local worker=${1:-0}
    [ $# -eq 0 ] || shift
    remote "$worker" "tail$(printf ' %q' "${@:--n50}") hashvision/log"
}

# Looks every POLL seconds and does what is missing. A try is a new start; a checkpoint newer than all that were
# seen is progress, and the tries are counted anew.
babysit() { # babysit CONFIG [OVERRIDES]
    local now last="" answers newest best="" tries=0 start=yes counted="" code reason="it was not running"
    if [ "$dry" ]; then
        dry=ABSENT create
        setup
        train "$@"
        status
        return
    fi
    while :; do
        code=0
        now=$(state) || now=UNREACHABLE
        [ "$now" = "$last" ] || echo "$(date +%T) $NAME is $now."
        last=$now
        case $now in
            ABSENT | PREEMPTED | TERMINATED | SUSPENDED | FAILED | UNKNOWN)
                [ "$now" = ABSENT ] || reason="it was $now"
                try
                counted=yes start=yes
                if create; then
                    continue
                fi
                reason="it could not be created"
                ;;
            UNREACHABLE)
                reason="gcloud could not say how it is"
                try
                ;;
            STOPPED | HIDDEN) fail "$NAME is $now, which somebody has done by hand; start it, or \`delete\` it." ;;
            READY)
                if [ "$start" ]; then
                    [ "$counted" ] || try
                    counted=""
                    setup && train "$@" || code=$?
                    case $code in
                        0) start="" ;;
                        2) fail "The workers refused, as stands above." ;;
                        *) reason="it could not be set up" ;;
                    esac
                else
                    answers=$(workers status "$WORKDIR") || code=$?
                    judge
                fi
                ;;
        esac
        sleep "$POLL"
    done
}

try() { # counts a try of babysit, or gives up
    if [ "$tries" -ge "$TRIES" ]; then
        fail "Gave up on $NAME after $tries tries without a new checkpoint in $WORKDIR; the last time $reason."
    fi
    tries=$((tries + 1))
    echo "$(date +%T) Try $tries of $TRIES: $reason."
}

judge() { # what babysit makes of the workers' answers
    newest=$(grep -oE ', checkpoint [0-9]+' <<<"$answers" | grep -oE '[0-9]+' || true)
    if [ "${newest:--1}" -gt "${best:--1}" ]; then
        [ -z "$best" ] || tries=0 # the first one seen may be old
        best=$newest
        echo "$(date +%T) Checkpoint $best."
    fi
    if [ "$code" != 0 ]; then
        start=yes reason="not all workers answered"
        return
    fi
    best=${best:--1}
    if grep -qE '^[^:]*: ended 2\b' <<<"$answers"; then
        # All end when one cannot go on; that one says why.
        reason=$(grep -E '^[^:]*: ended 2\b' <<<"$answers" | sed 's/.*hashvision: //')
        fail "$(grep -v 'its own words say why' <<<"$reason" | head -n 1 || echo "$reason")"
    elif grep -qE '^[^:]*: stopped' <<<"$answers"; then
        echo "$NAME was stopped; \`train\` goes on."
        exit 75
    elif ! grep -qvE '^[^:]*: ended 0\b' <<<"$answers"; then
        echo "$answers"
        echo "The run is done and lies in $WORKDIR; $NAME is still there, and \`delete\` gives it back."
        exit 0
    elif ! grep -qE '^[^:]*: running' <<<"$answers"; then
        start=yes reason=$(head -n 1 <<<"$answers")
    fi
}

committed() { # sets `commit`: what workers get is a commit, the one that is checked out
    commit=$(git rev-parse HEAD) || fail "There is no commit in $PWD to train; workers get the code from git."
    [ -z "$(git status --porcelain --untracked-files=no)" ] ||
        fail "The code differs from commit ${commit:0:12}, which is what workers would get; commit or stash the changes."
}

main() {
    local verb="" dry="" argument arguments=() settings=${POD_ENV:-launch/pod.env} commit name place
    local verbs="create, setup, train, status, logs, babysit, stop, delete"
    for argument; do
        case $argument in
            --dry-run) dry=READY ;; # how it is then taken to be
            --workdir | --workdir=*) fail "The workdir is the setting WORKDIR, which launch/pod.env.example tells of." ;;
            *) arguments+=("$argument") ;;
        esac
    done
    [ ${#arguments[@]} -gt 0 ] || fail "Give a verb, one of $verbs; this file's first lines tell what they do."
    verb=${arguments[0]}
    case ", $verbs, " in *", $verb, "*) ;; *) fail "There is no verb $verb; give one of $verbs." ;; esac
    case ${POD_ENV:-/} in /*) ;; *) settings=$PWD/$POD_ENV ;; esac
    cd "$(dirname "${BASH_SOURCE[0]}")/.."

    [ -f "$settings" ] || fail "There are no settings in $settings; copy launch/pod.env.example there and fill it in."
    unset PROJECT ZONE NAME TYPE VERSION BUCKET WORKDIR # those of the file, not of the caller's shell
    SPOT=no QUEUED=no PORT=8482 TRIES=10 POLL=60 CREATE_FLAGS=() SSH_FLAGS=()
    # shellcheck source=launch/pod.env.example
    . "$settings"
    for name in PROJECT ZONE NAME TYPE VERSION BUCKET; do
        [ -n "${!name:-}" ] || fail "$settings does not set $name; launch/pod.env.example tells what it is."
    done
    WORKDIR=${WORKDIR:-$BUCKET/$NAME}
    case $WORKDIR in
        *://* | /*) ;;
        *) fail "WORKDIR=$WORKDIR of $settings is no gs:// folder and no absolute path; workers could not share it." ;;
    esac
    place=(--project="$PROJECT" --zone="$ZONE" --quiet)

    case $verb in
        train | babysit)
            [ ${#arguments[@]} -gt 1 ] || fail "Give $verb a config: \`$verb configs/NAME.py [--config.KEY=VALUE]\`."
            committed
            name=${arguments[1]%%:*}
            git cat-file -e "$commit:$name" 2>/dev/null ||
                fail "The config $name is not in commit ${commit:0:12}, which is what workers have; commit it."
            ;;
        setup) committed ;;
    esac
    [ "$dry" ] || command -v gcloud >/dev/null ||
        fail "gcloud is not on the PATH; install Google Cloud's SDK (cloud.google.com/sdk), or try --dry-run."
    exec 4>&1
    case $verb in
        create) dry=${dry:+ABSENT} create ;;
        setup) ready && setup ;;
        train) ready && train "${arguments[@]:1}" ;;
        status) status ;;
        logs) ready && logs "${arguments[@]:1}" ;;
        babysit) babysit "${arguments[@]:1}" ;;
        stop) ready && workers stop ;;
        delete) delete ;;
    esac
    exit
}

main "$@"
