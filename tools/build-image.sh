#!/bin/sh
# Build the container image of the pipeline's tasks: `make image`.
#
# Environment:
#   IMAGE        name and tag; default vit-pipeline:latest (vit-pipeline:latest-gpu with GPU=1)
#   GPU          1: with the CUDA libraries
#   BASE_IMAGE   image to build on; default docker.io/library/python:3.13-slim-trixie. BASE_IMAGE=debootstrap makes the
#                base from Debian's packages instead, for a machine that reaches no image registry (needs root).
#   ENGINE       podman or docker; default: the first that works
#
# The build sees the host's settings of pip and uv (index, proxy, certificates) as secrets: nothing of them stays.
set -eu
cd "$(dirname "$0")/.."
. tools/containers.sh

say() { echo "build-image: $*"; }
die() {
    say "$@" >&2
    exit 1
}

case ${GPU:-} in '' | 0) gpu=0 suffix= ;; 1) gpu=1 suffix=-gpu ;; *) die "GPU=$GPU is not understood. Use GPU=1 or leave it out." ;; esac
image=${IMAGE:-vit-pipeline:latest$suffix}
find_engine
find_base

secrets=$(mktemp -d)
trap 'rm -rf "$secrets"' EXIT
# Assignments that a shell can read: the variables, then what pip's files say and no variable does.
quoted() { printf "%s='%s'\n" "$1" "$(printf %s "$2" | sed "s/'/'\\\\''/g")"; }
for variable in $(host_variables); do
    case $variable in *CERT* | *CA_BUNDLE* | *FIND_LINKS* | *CONSTRAINT*) continue ;; esac
    quoted "$variable" "$(printenv "$variable")"
done >"$secrets/environment"
pip=.venv/bin/python
[ -x "$pip" ] || pip=python3
settings=$("$pip" -m pip config list 2>/dev/null) || settings=
setting() { printf '%s\n' "$settings" | sed -n "s/^[^:]*\.$1='\(.*\)'\$/\1/p" | tail -n 1; }
for key in index-url extra-index-url trusted-host proxy; do
    variable=PIP_$(echo "$key" | tr a-z- A-Z_)
    value=$(setting "$key")
    # Folders of this machine are not there during the build.
    case $value in '' | *file:*) continue ;; esac
    grep -q "^$variable=" "$secrets/environment" || quoted "$variable" "$value"
done >>"$secrets/environment"
certificates=${SSL_CERT_FILE:-${PIP_CERT:-$(setting cert)}}
[ -f "$certificates" ] || certificates=/dev/null
cat "$certificates" >"$secrets/certificates"
set --
[ ! -s "$secrets/certificates" ] || set -- --secret "id=certificates,src=$secrets/certificates"

# Files get the time when the dependencies last changed: the same commit gives the same image, and another one the same
# layer of dependencies. The label says which commit it is, and "dirty" where files differ from it.
revision=$(git rev-parse HEAD 2>/dev/null) || revision=unknown
time=$(git log -1 --format=%ct -- requirements kubeflow/Dockerfile 2>/dev/null) || time=0
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision=$revision-dirty
case $("$engine" --version) in
podman*) set -- "$@" --timestamp "${time:-0}" ;;
*) set -- "$@" --build-arg "SOURCE_DATE_EPOCH=${time:-0}" ;;
esac

say "building $image on $base"
"$engine" build --network=host --file kubeflow/Dockerfile --tag "$image" --build-arg "BASE_IMAGE=$base" \
    --build-arg "GPU=$gpu" --build-arg "REVISION=$revision" --secret "id=environment,src=$secrets/environment" "$@" . ||
    die "the image could not be built on $base. Where no image registry is reachable: BASE_IMAGE=debootstrap"
say "built $image: $("$engine" image inspect --format '{{.Size}}' "$image" | awk '{ printf "%.2f GB", $1 / 1e9 }')"
