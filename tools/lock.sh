#!/bin/sh
# Regenerate the lock files under requirements/ from its .in files: `make lock`.
#
# Needs uv (the project's own .venv has one) and a package index; which Pythons are installed does not matter, because
# uv resolves for the version and platform named here. Versions already locked are kept where the .in files still
# allow them; `make lock UPGRADE=1` takes the newest allowed ones, `make lock UPGRADE=NAME` those of one package.
# The -gpu files hold only what the lines' -gpu.in files add to the file beside them; the -tools files name the packages
# in it that are there for tests and lint alone, and that the container image leaves out.
set -eu
cd "$(dirname "$0")/../requirements"

uv=../.venv/bin/uv
[ -x "$uv" ] || uv=$(command -v uv) || {
    echo "lock: no uv in .venv or on PATH. Run 'make setup' first, or install uv." >&2
    exit 1
}

case ${UPGRADE:-} in
'') upgrade= ;;
1) upgrade=--upgrade ;;
*) upgrade="--upgrade-package $UPGRADE" ;;
esac

compile() { # compile PYTHON PLATFORM OUTPUT ARGUMENT...
    python=$1 platform=$2 output=$3
    shift 3
    # shellcheck disable=SC2086  # $upgrade is one or two words, or none
    "$uv" pip compile --quiet "$@" --python-version "$python" --python-platform "$platform" \
        --generate-hashes --no-emit-index-url --custom-compile-command "make lock" $upgrade -o "$output"
}

names() { # names FILE: the packages in a lock file, one a line
    sed -n 's/^\([A-Za-z0-9._-]*\).*==.*/\1/p' "$1"
}

lock() { # lock LINE PYTHON PLATFORM
    base=$1-py$(echo "$2" | tr -d .).txt
    gpu=${base%.txt}-gpu.txt tools=${base%.txt}-tools.txt
    compile "$2" "$3" "$base" "$1.in" common.in tools.in
    # shellcheck disable=SC2046  # one option for each name in the base file
    compile "$2" "$3" "$gpu" "$1-gpu.in" -c "$base" \
        $(names "$base" | sed 's/^/--no-emit-package /')
    sed -i '/^# The following packages were excluded/,$d' "$gpu"
    compile "$2" "$3" run.tmp "$1.in" common.in -c "$base"
    {
        echo "# Not in the container image, though in $base: made by \`make lock\`."
        names "$base" | sort >all.tmp
        names run.tmp | sort | comm -23 all.tmp -
    } >"$tools"
    rm run.tmp all.tmp
    echo "requirements/$base: $(grep -c '==' "$base") packages; with GPU=1 $(grep -c '==' "$gpu") more"
}

lock tfx-1.16 3.10 x86_64-manylinux_2_28
for python in 3.11 3.12 3.13; do
    lock tfx-1.21 "$python" x86_64-manylinux_2_39
done
