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

BASE_IMAGE=${BASE_IMAGE:-docker.io/library/python:3.13-slim-trixie}
name=vit-pipeline-debian13

die() {
    echo "test-in-container: $*" >&2
    exit 1
}

if [ "$(id -u)" = 0 ] && [ -z "${CONTAINERS_CONF:-}" ] && command -v runc >/dev/null; then
    export CONTAINERS_CONF="$PWD/tools/containers.conf"
fi
engine=${ENGINE:-}
for candidate in podman docker; do
    [ -n "$engine" ] || ! "$candidate" info >/dev/null 2>&1 || engine=$candidate
done
[ -n "$engine" ] || die "neither podman nor docker works here. On Debian or Ubuntu: apt-get install podman runc"

make_base() { # make_base IMAGE: a minimal Debian 13 from Debian's packages
    command -v debootstrap >/dev/null || die "BASE_IMAGE=debootstrap needs debootstrap: apt-get install debootstrap"
    [ "$(id -u)" = 0 ] || die "BASE_IMAGE=debootstrap has to run as root"
    echo "test-in-container: making a Debian 13 base with debootstrap"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    debootstrap --variant=minbase trixie "$folder/root" >"$folder/log" 2>&1 || {
        tail -n 20 "$folder/log" >&2
        die "debootstrap failed; its last messages are above"
    }
    tar -C "$folder/root" -cf - . | "$engine" import - "$1" >/dev/null
    rm -rf "$folder"
    trap - EXIT
}

recipe=$( (echo "$BASE_IMAGE" && cat tools/debian13.Containerfile) | sha256sum | cut -c1-12)
image=localhost/$name:$recipe
if ! "$engine" image inspect "$image" >/dev/null 2>&1; then
    base=$BASE_IMAGE
    if [ "$base" = debootstrap ]; then
        base=localhost/$name-base:trixie
        "$engine" image inspect "$base" >/dev/null 2>&1 || make_base "$base"
    fi
    echo "test-in-container: building $image on $base"
    "$engine" build --network=host --quiet --build-arg "BASE_IMAGE=$base" --tag "$image" \
        --file tools/debian13.Containerfile tools >/dev/null ||
        die "the image could not be built on $base. Where no image registry is reachable: BASE_IMAGE=debootstrap"
fi

[ $# -gt 0 ] || set -- make test

# The host's pip and uv settings, and the certificate files they may name.
options() {
    for file in /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf" \
        /etc/uv/uv.toml "$HOME/.config/uv/uv.toml" "${SSL_CERT_FILE:-}" "${PIP_CERT:-}" "${REQUESTS_CA_BUNDLE:-}"; do
        case $file in "$HOME"/.*) inside=/root/${file#"$HOME"/} ;; *) inside=$file ;; esac
        [ ! -f "$file" ] || printf -- '--volume\n%s:%s:ro\n' "$file" "$inside"
    done | awk '/^--volume$/ { next } !seen[$0]++ { print "--volume"; print }'
    env | sed -nE 's/^((PIP|UV)_[A-Z_]+|[A-Za-z]+_(proxy|PROXY)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CI)=.*/\1/p' |
        grep -v _DIR | sed 's/^/--env\n/'
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
