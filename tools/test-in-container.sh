#!/bin/sh
# Run a command on a copy of this checkout inside a Debian 13 container, where the newer TFX line runs whatever the
# host's C library is. `make test-debian13` calls it.
#
#   tools/test-in-container.sh                      make test
#   tools/test-in-container.sh CMD [ARG...]         any other command, in the copy's folder
#   tools/test-in-container.sh sh -c 'make setup && .venv/bin/python -c "import tfx.v1"'
#
# Environment:
#   BASE_IMAGE      image to build on; default docker.io/library/python:3.13-slim-trixie. BASE_IMAGE=debootstrap makes
#                   the base from Debian's packages instead, for a machine that reaches no image registry (needs root).
#   ENGINE          podman or docker; default: the first that works
#   CIFAR100_DATA   the data archive or folder: mounted read-only, and set to its place inside
#
# The image is built once per base. A volume keeps the copy's .venv and the download cache, so that only the first run
# installs anything; remove it with `podman volume rm vit-pipeline-debian13`. Files tracked or not ignored by git
# are copied afresh each time; nothing is written to the checkout. The container uses the host's network, and the
# host's settings of pip and uv (files, environment, certificates), so that it reaches packages the way the host does.
set -eu
cd "$(dirname "$0")/.."

. tools/containers.sh
name=vit-pipeline-debian13

say() { echo "test-in-container: $*"; }

die() {
    echo "test-in-container: $*" >&2
    exit 1
}

find_engine
recipe=$( (echo "${BASE_IMAGE:-$DEFAULT_BASE_IMAGE}" && cat tools/debian13.Containerfile) | sha256sum | cut -c1-12)
image=localhost/$name:$recipe
if ! "$engine" image inspect "$image" >/dev/null 2>&1; then
    find_base
    say "building $image on $base"
    "$engine" build --network=host --quiet --build-arg "BASE_IMAGE=$base" --tag "$image" \
        --file tools/debian13.Containerfile tools >/dev/null ||
        die "the image could not be built on $base. Where no image registry is reachable: BASE_IMAGE=debootstrap"
fi

[ $# -gt 0 ] || set -- make test

# The host's pip and uv settings, and the certificate files they may name.
options() {
    host_files | while IFS='	' read -r file inside; do
        printf -- '--volume\n%s:%s:ro\n' "$file" "$inside"
    done
    { host_variables && { [ -z "${CI:-}" ] || echo CI; }; } | sed 's/^/--env\n/'
    if [ -n "${CIFAR100_DATA:-}" ]; then
        [ -e "$CIFAR100_DATA" ] || die "CIFAR100_DATA=$CIFAR100_DATA does not exist"
        data=$(realpath "$CIFAR100_DATA")
        inside=/data/${data##*/}
        printf -- '--volume\n%s:%s:ro\n--env\nCIFAR100_DATA=%s\n' "$data" "$inside" "$inside"
    fi
}

# Runs in the container: the copy comes in as a tar archive on standard input.
inside='
    exec 9>/work/lock
    flock -n 9 || { echo "test-in-container: waiting for another run to finish"; flock 9; }
    mkdir -p /work/project
    cd /work/project
    find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
    tar -xf -
    exec "$@" </dev/null
'
set -- "$image" sh -euc "$inside" sh "$@"
chosen=$(options)
# In front of the command go the options, one a line in $chosen (a path may hold spaces).
while IFS= read -r option; do
    [ -z "$option" ] || set -- "$option" "$@"
done <<LIST
$(printf '%s\n' "$chosen" | tac)
LIST
# A tracked file that was deleted but not yet committed is no error.
git ls-files -z --cached --others --exclude-standard |
    tar --create --file=- --null --files-from=- --ignore-failed-read --warning=no-failed-read |
    "$engine" run --rm --interactive --network=host --volume "$name:/work" --env XDG_CACHE_HOME=/work/cache "$@"
