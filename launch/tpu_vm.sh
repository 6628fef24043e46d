#!/usr/bin/env bash
# Trains on a Cloud TPU with one host or many. Usage: `bash launch/tpu_vm.sh COMMAND`, with COMMAND one of
#   create                    create the TPU: on demand, spot or queued, as launch/pod.env says
#   setup                     install the checked-out commit, its pins and the TPU's JAX on all workers
#   train CONFIG [OVERRIDES]  start or resume training; it survives this connection and keeps a log
#   status                    print the state of the TPU and what each worker is doing
#   logs [WORKER [OPTIONS]]   print the end of a worker's log (0 by default, or all); OPTIONS are those of tail:
#                             `logs 0 -f` follows it
#   babysit CONFIG [OVERRIDES]  do all of the above until the run is done, and again after each preemption
#   stop                      save and stop training; `train` resumes it
#   delete                    delete the TPU
# CONFIG is a recipe of configs/ (demo, seer_regnety:256gf) or its path (configs/demo.py). --dry-run prints the
# gcloud commands instead of running them. Settings: launch/pod.env.example. Every command may be repeated.
# Exit codes are those of `train`: 0 when done, 75 if the same command resumes the run, 2 if something has to be
# fixed first.
#
# Facts from Google's documentation (cloud.google.com/tpu/docs and /sdk/gcloud/reference/compute/tpus):
# - Nodes are CREATING, READY, RESTARTING, REIMAGING, DELETING, REPAIRING, STOPPED, STOPPING, STARTING,
#   PREEMPTED, TERMINATED, HIDING, HIDDEN, UNHIDING or UNKNOWN ("after a failed repair").
# - Queued resources are CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, SUSPENDED
#   (its nodes are deleted, as after a preemption), DELETING or FAILED; `delete --force` also deletes the nodes.
# - The name of a preempted node stays taken until the node is deleted.
# - `ssh --worker=all` runs a command on all workers at once. Older versions exit with 0 when it failed on a worker,
#   and repeat a command that exits with 255. Workers therefore answer in words, and the script counts the answers.
set -euo pipefail

fail() {
    echo "$*" >&2
    exit 2
}

gcloud_tpus() { # runs a command that changes something; --dry-run prints it instead
    if [ "$dry" ]; then
        echo "gcloud compute tpus$(printf ' %q' "$@")" >&4
    else
        gcloud compute tpus "$@" </dev/null
    fi
}

describe() { # describe queued-resources|tpu-vm FIELD: prints its value, or ABSENT if nothing has that name
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

state() { # prints READY if the TPU can be used, else the state that Google reports
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
            echo "$NAME is READY already."
            return
            ;;
        *)
            echo "$NAME is $now already; \`status\` shows when it is READY."
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
        echo "$NAME does not exist."
    else
        remove
    fi
}

ready() { # fails unless the workers can be reached
    local now
    now=$(state) || return
    [ "$now" = READY ] || fail "$NAME is $now; run \`create\`, and wait until \`status\` says READY."
}

remote() { # remote WORKERS COMMAND: runs a shell command in the home folder of the workers
    gcloud_tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$1" --command="$2" "${SSH_FLAGS[@]}"
}

workers() { # workers COMMAND [ARGUMENTS]: runs launch/worker.sh on all workers; prints one line per worker
    ask "bash hashvision/worker.sh$(printf ' %q' "$@")"
}

ask() { # ask COMMAND: returns 75 if a worker does not answer, 2 if one refuses
    local output answers count
    output=$(remote all "$1") || true # the answers are more reliable than the exit code
    [ ! "$dry" ] || return 0
    answers=$(grep -E '^worker [0-9]+ of [0-9]+: ' <<<"$output" | sort -u -n -k 2,2) || true
    count=$(wc -l <<<"$answers")
    echo "${answers:-$output}"
    if [[ ! $answers =~ ^worker\ [0-9]+\ of\ $count: ]]; then
        echo "Not all workers of $NAME answered; see the output of gcloud above." >&2
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
    # A rename at the end, so that the folder of a commit is complete or absent.
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

# Every POLL seconds, looks at the TPU and does what is missing. Each start counts as a try; a checkpoint newer than
# all seen before is progress and resets the count.
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
                reason="gcloud could not describe it"
                try
                ;;
            STOPPED | HIDDEN) fail "$NAME is $now, which only a user can cause; start it, or \`delete\` it." ;;
            READY)
                if [ "$start" ]; then
                    [ "$counted" ] || try
                    counted=""
                    setup && train "$@" || code=$?
                    case $code in
                        0) start="" ;;
                        2) fail "A worker refused; see its answer above." ;;
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

try() { # counts a try, or gives up
    if [ "$tries" -ge "$TRIES" ]; then
        fail "Gave up on $NAME after $tries tries without a new checkpoint in $WORKDIR; the last time $reason."
    fi
    tries=$((tries + 1))
    echo "$(date +%T) Try $tries of $TRIES: $reason."
}

judge() { # acts on the answers of the workers
    newest=$(grep -oE ', checkpoint [0-9]+' <<<"$answers" | grep -oE '[0-9]+' || true)
    if [ "${newest:--1}" -gt "${best:--1}" ]; then
        [ -z "$best" ] || tries=0 # the first checkpoint seen may be from an earlier run of babysit
        best=$newest
        echo "$(date +%T) Checkpoint $best."
    fi
    if [ "$code" != 0 ]; then
        start=yes reason="not all workers answered"
        return
    fi
    best=${best:--1}
    if grep -qE '^[^:]*: ended 2\b' <<<"$answers"; then
        # When one host fails, all others end too and refer to its log. Print the reason of the one that failed.
        reason=$(grep -E '^[^:]*: ended 2\b' <<<"$answers" | sed 's/.*hashvision: //')
        fail "$(grep -vE "its own words say why|see that host's log" <<<"$reason" | head -n 1 || echo "$reason")"
    elif grep -qE '^[^:]*: stopped' <<<"$answers"; then
        echo "$NAME was stopped; \`train\` resumes the run."
        exit 75
    elif ! grep -qvE '^[^:]*: ended 0\b' <<<"$answers"; then
        echo "$answers"
        echo "The run in $WORKDIR is done; $NAME still exists, and \`delete\` deletes it."
        exit 0
    elif ! grep -qE '^[^:]*: running' <<<"$answers"; then
        start=yes reason=$(head -n 1 <<<"$answers")
    fi
}

committed() { # sets `commit` to the checked-out commit, which is what workers get
    commit=$(git rev-parse HEAD) || fail "$PWD has no git commit; workers get the code from a commit, so make one."
    [ -z "$(git status --porcelain --untracked-files=no)" ] ||
        fail "The code differs from commit ${commit:0:12}, which workers would get; commit or stash the changes."
}

main() {
    local command="" dry="" argument arguments=() settings=${POD_ENV:-launch/pod.env} commit name place
    local commands="create, setup, train, status, logs, babysit, stop, delete"
    for argument; do
        case $argument in
            --dry-run) dry=READY ;; # the state that a dry run assumes
            --workdir | --workdir=*) fail "$argument is not an option here; set WORKDIR in $settings." ;;
            *) arguments+=("$argument") ;;
        esac
    done
    [ ${#arguments[@]} -gt 0 ] || fail "Give a command: $commands; the first lines of launch/tpu_vm.sh describe them."
    command=${arguments[0]}
    case ", $commands, " in *", $command, "*) ;; *) fail "There is no command $command; give one of $commands." ;; esac
    case ${POD_ENV:-/} in /*) ;; *) settings=$PWD/$POD_ENV ;; esac
    cd "$(dirname "${BASH_SOURCE[0]}")/.."

    [ -f "$settings" ] || fail "The settings file $settings does not exist; copy launch/pod.env.example there and fill it in."
    unset PROJECT ZONE NAME TYPE VERSION BUCKET WORKDIR # only the file sets them, not the caller's shell
    SPOT=no QUEUED=no PORT=8482 TRIES=10 POLL=60 CREATE_FLAGS=() SSH_FLAGS=()
    # shellcheck source=launch/pod.env.example
    . "$settings"
    for name in PROJECT ZONE NAME TYPE VERSION BUCKET; do
        [ -n "${!name:-}" ] || fail "$settings does not set $name; launch/pod.env.example describes it."
    done
    WORKDIR=${WORKDIR:-$BUCKET/$NAME}
    case $WORKDIR in
        *://* | /*) ;;
        *) fail "WORKDIR=$WORKDIR in $settings is not shared by the workers; give a gs:// folder or an absolute path." ;;
    esac
    place=(--project="$PROJECT" --zone="$ZONE" --quiet)

    case $command in
        train | babysit)
            [ ${#arguments[@]} -gt 1 ] || fail "Give $command a config: \`$command NAME[:VARIANT] [--config.KEY=VALUE]\`."
            committed
            name=${arguments[1]%%:*}
            case $name in */* | *.py) ;; *) name=configs/$name.py ;; esac
            git cat-file -e "$commit:$name" 2>/dev/null ||
                fail "The config $name is not in commit ${commit:0:12}, which workers get; commit it."
            ;;
        setup) committed ;;
    esac
    [ "$dry" ] || command -v gcloud >/dev/null ||
        fail "gcloud is not on the PATH; install the Google Cloud SDK (cloud.google.com/sdk), or use --dry-run."
    exec 4>&1
    case $command in
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
