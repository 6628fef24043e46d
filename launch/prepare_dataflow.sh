#!/usr/bin/env bash
# `prepare` on Google's Dataflow, from a bucket into a bucket: the verb and its options are the same.
#   bash launch/prepare_dataflow.sh --posts=gs://BUCKET/posts.jsonl --output=gs://BUCKET/dataset [OPTIONS]
# --dry-run prints the commands. Settings: launch/pod.env.example. Beam's options may follow and win, such as
#   --runner=DirectRunner        here, which is how to try it on a few posts
#   --prebuild_sdk_container_engine=cloud_build --docker_registry_push_url=REGISTRY  an image made once, at the
#                                start, in place of requirements that each worker installs for some minutes
# Workers get the commit that is checked out as a wheel (--extra_package; Beam installs it last, over what an
# image holds). Modules are imported there by name, so that the main session need not be saved.
set -euo pipefail
settings=${POD_ENV:-launch/pod.env}
case ${POD_ENV:-/} in /*) ;; *) settings=$PWD/$POD_ENV ;; esac
. "$(dirname "$0")/setup.sh"

fail() {
    echo "$*" >&2
    exit 2
}

run() {
    if [ "$dry" ]; then
        printf '%q' "$1"
        printf ' %q' "${@:2}"
        echo
    else
        "$@"
    fi
}

dry="" local="" arguments=() given=" "
for argument; do
    case $argument in
        --dry-run)
            dry=yes
            continue
            ;;
        --runner=*) local=yes ;;
        --posts=gs://* | --output=gs://*) given+="${argument%%=*} " ;;
    esac
    arguments+=("$argument")
done
for name in --posts --output; do
    case $local$given in
        yes* | *" $name "*) ;;
        *) fail "Give $name=gs://..., which all workers can reach." ;;
    esac
done

[ -f "$settings" ] ||
    fail "There are no settings in $settings; copy launch/pod.env.example there and fill it in."
unset PROJECT ZONE BUCKET REGION # those of the file, not of the caller's shell
WORKERS=100 MACHINE=n2-standard-8 IMAGE=""
# shellcheck source=launch/pod.env.example
. "$settings"
REGION=${REGION:-${ZONE:+${ZONE%-*}}}
for name in PROJECT REGION BUCKET; do
    [ -n "${!name:-}" ] || fail "$settings does not set $name; launch/pod.env.example tells what it is."
done
case $BUCKET in
    gs://*) ;;
    *) fail "BUCKET=$BUCKET of $settings is no gs:// folder; Dataflow needs one for its own files." ;;
esac
commit=$(git rev-parse HEAD) || fail "There is no commit in $PWD; workers get the code from git."
[ -z "$(git status --porcelain --untracked-files=no)" ] ||
    fail "The code differs from commit ${commit:0:12}, which is what workers would get; commit or stash the changes."

[ "$dry" ] || setup requirements.txt
if [ ! "$local" ] && ! .venv/bin/python -c "import google.cloud.dataflow_v1beta3, google.cloud.storage" 2>/dev/null; then
    run .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check \
        --require-hashes -r requirements-gcp.txt
fi

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
git archive --prefix=code/ "$commit" | tar -x -C "$wheels"
# A wheel, so that no worker has to build; by the setuptools that is pinned, so that nothing is downloaded.
run .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir="$wheels" "$wheels/code"
wheel=$wheels/hashvision-$(sed -n 's/^__version__ = "\(.*\)"/\1/p' hashvision/__init__.py)-py3-none-any.whl

if [ "$IMAGE" ]; then
    workers=("--sdk_container_image=$IMAGE")
else
    # Without `skip` all wheels, TensorFlow's too, would be downloaded here and uploaded to the bucket.
    workers=(--requirements_file=requirements.txt --requirements_cache=skip)
fi
run .venv/bin/python -m hashvision prepare --runner=DataflowRunner --project="$PROJECT" --region="$REGION" \
    --temp_location="$BUCKET/dataflow" --max_num_workers="$WORKERS" --worker_machine_type="$MACHINE" \
    --extra_package="$wheel" "${workers[@]}" "${arguments[@]}"
