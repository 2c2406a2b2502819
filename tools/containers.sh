# shellcheck shell=sh
# Shell functions for container builds, sourced by test-in-container.sh and build-image.sh, which define die and say.
#
# Environment: ENGINE (podman or docker; default: the first that works), BASE_IMAGE (an image, or "debootstrap": a base made
# from Debian's packages, for a machine that reaches no image registry; needs root).

DEFAULT_BASE_IMAGE=docker.io/library/python:3.13-slim-trixie

# find_engine: sets engine; call it in the checkout's root.
find_engine() {
    if [ "$(id -u)" = 0 ] && [ -z "${CONTAINERS_CONF:-}" ] && command -v runc >/dev/null; then
        export CONTAINERS_CONF="$PWD/tools/containers.conf"
    fi
    engine=${ENGINE:-}
    for candidate in podman docker; do
        [ -n "$engine" ] || ! "$candidate" info >/dev/null 2>&1 || engine=$candidate
    done
    [ -n "$engine" ] || die "neither podman nor docker works here. On Debian or Ubuntu: apt-get install podman runc"
}

# find_base: sets base to the image to build on, after making it where it is to be made.
find_base() {
    base=${BASE_IMAGE:-$DEFAULT_BASE_IMAGE}
    [ "$base" = debootstrap ] || return 0
    base=localhost/vit-pipeline-debian13-base:trixie
    "$engine" image inspect "$base" >/dev/null 2>&1 || make_base "$base"
}

make_base() { # make_base IMAGE: a minimal Debian 13 from Debian's packages
    command -v debootstrap >/dev/null || die "BASE_IMAGE=debootstrap needs debootstrap: apt-get install debootstrap"
    [ "$(id -u)" = 0 ] || die "BASE_IMAGE=debootstrap has to run as root"
    say "making a Debian 13 base with debootstrap"
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

# host_files: the host's settings of pip and uv, and the certificates they may name: "HOST<tab>INSIDE" for each that exists.
host_files() {
    for file in /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf" \
        /etc/uv/uv.toml "$HOME/.config/uv/uv.toml" "${SSL_CERT_FILE:-}" "${PIP_CERT:-}" "${REQUESTS_CA_BUNDLE:-}"; do
        case $file in "$HOME"/.*) inside=/root/${file#"$HOME"/} ;; *) inside=$file ;; esac
        [ ! -f "$file" ] || printf '%s\t%s\n' "$file" "$inside"
    done | awk '!seen[$0]++'
}

# host_variables: the names of the environment variables that tell pip and uv where packages are and how to reach them.
host_variables() {
    env | sed -nE 's/^((PIP|UV)_[A-Z_]+|[A-Za-z]+_(proxy|PROXY)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)=.*/\1/p' | grep -v _DIR || true
}
