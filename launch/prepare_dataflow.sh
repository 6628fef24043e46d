#!/usr/bin/env bash
# Runs `prepare` on Google Dataflow, from a bucket to a bucket. It takes the options of `prepare`:
#   bash launch/prepare_dataflow.sh --posts=gs://BUCKET/posts.jsonl --output=gs://BUCKET/dataset [OPTIONS]
# --dry-run prints the commands. Settings: launch/pod.env.example. Options of Beam override the settings, such as
#   --runner=DirectRunner        runs on this machine, to try a few posts
#   --prebuild_sdk_container_engine=cloud_build --docker_registry_push_url=REGISTRY  builds an image once at the
#                                start; otherwise each worker spends some minutes installing the requirements
# Workers get the checked-out commit as a wheel (--extra_package), which Beam installs last, over the one of an image.
# They import modules by name, so the main session need not be saved.
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
        *) fail "$name is not in a bucket, which all workers can reach; give $name=gs://BUCKET/PATH." ;;
    esac
done

[ -f "$settings" ] ||
    fail "The settings file $settings does not exist; copy launch/pod.env.example there and fill it in."
unset PROJECT ZONE BUCKET REGION # only the file sets them, not the caller's shell
WORKERS=100 MACHINE=n2-standard-8 IMAGE=""
# shellcheck source=launch/pod.env.example
. "$settings"
REGION=${REGION:-${ZONE:+${ZONE%-*}}}
for name in PROJECT REGION BUCKET; do
    [ -n "${!name:-}" ] || fail "$settings does not set $name; launch/pod.env.example describes it."
done
case $BUCKET in
    gs://*) ;;
    *) fail "BUCKET=$BUCKET in $settings is not a gs:// folder; Dataflow needs one for temporary files." ;;
esac
commit=$(git rev-parse HEAD) || fail "$PWD has no git commit; workers get the code from a commit, so make one."
[ -z "$(git status --porcelain --untracked-files=no)" ] ||
    fail "The code differs from commit ${commit:0:12}, which workers would get; commit or stash the changes."

[ "$dry" ] || setup requirements.txt
if [ ! "$local" ] && ! .venv/bin/python -c "import google.cloud.dataflow_v1beta3, google.cloud.storage" 2>/dev/null; then
    run .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check \
        --require-hashes -r requirements-gcp.txt
fi

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
git archive --prefix=code/ "$commit" | tar -x -C "$wheels"
# A wheel, so that workers need not build. The installed setuptools builds it, so that nothing is downloaded.
run .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir="$wheels" "$wheels/code"
wheel=$wheels/hashvision-$(sed -n 's/^__version__ = "\(.*\)"/\1/p' hashvision/__init__.py)-py3-none-any.whl

if [ "$IMAGE" ]; then
    workers=("--sdk_container_image=$IMAGE")
else
    # Without `skip` Beam would download all wheels, including TensorFlow's, and upload them to the bucket.
    workers=(--requirements_file=requirements.txt --requirements_cache=skip)
fi
run .venv/bin/python -m hashvision prepare --runner=DataflowRunner --project="$PROJECT" --region="$REGION" \
    --temp_location="$BUCKET/dataflow" --max_num_workers="$WORKERS" --worker_machine_type="$MACHINE" \
    --extra_package="$wheel" "${workers[@]}" "${arguments[@]}"
