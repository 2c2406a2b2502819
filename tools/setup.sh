#!/bin/sh
# Make .venv from the lock file that fits this machine, or do nothing when it is up to date: `make setup`.
#
#   tools/setup.sh [--quiet]      --quiet: say nothing when there is nothing to do
#
# Environment: PYTHON=/path/to/python (default: the best one found, see choose_python.sh), GPU=1 (adds
# the CUDA libraries; GPU=0 takes them away; unset: as they are). Mirrors, proxies and certificates
# configured for uv or pip are respected.
#
# .venv/.setup-stamp says what the environment was made from. It is removed before anything is changed
# and written last, so an environment without one is half-made (or not ours) and is made anew.
set -eu
cd "$(dirname "$0")/.."
root=$(pwd -P)
stamp=.venv/.setup-stamp
. tools/choose_python.sh

say() { echo "setup: $*"; }
die() {
    echo "setup: $*" >&2
    exit 1
}

case ${GPU:-} in '' | 0 | 1) ;; *) die "GPU=$GPU is not understood. Use GPU=1, GPU=0 or leave it out." ;; esac

# stamp_field NAME: a field of the stamp, empty without one.
stamp_field() { [ ! -f "$stamp" ] || sed -n "s/^$1 //p" "$stamp"; }

lock_files() { # lock_files LINE VERSION GPU
    lf=requirements/$1-py$(echo "$2" | tr -d .)
    if [ "$3" = 1 ]; then echo "$lf.txt $lf-gpu.txt"; else echo "$lf.txt"; fi
}

# describe LINE VERSION EXECUTABLE GPU: the stamp. It changes with the lock files, setup.py, the
# interpreter, the C library (a newer one may run a newer line) and the place of the checkout (scripts
# in .venv hold its path).
describe() {
    # shellcheck disable=SC2046  # one or two file names without spaces
    ds_inputs=$(cat $(lock_files "$1" "$2" "$4") setup.py | sha256sum | cut -d' ' -f1)
    printf 'line %s\nversion %s\npython %s\ngpu %s\nglibc %s\nfolder %s\ninputs %s\n' \
        "$1" "$2" "$3" "$4" "$(glibc_version)" "$root" "$ds_inputs"
}

up_to_date() {
    [ -f "$stamp" ] && [ -x .venv/bin/python ] && [ -x "$(stamp_field python)" ] || return 1
    [ -z "${GPU:-}" ] || [ "$GPU" = "$(stamp_field gpu)" ] || return 1
    if [ -n "${PYTHON:-}" ]; then
        ud_answer=$(probe "$PYTHON") || return 1
        [ "$ud_answer" = "$(stamp_field version)	$(stamp_field python)	ok" ] || return 1
    fi
    ud_now=$(describe "$(stamp_field line)" "$(stamp_field version)" "$(stamp_field python)" \
        "$(stamp_field gpu)" 2>/dev/null)
    [ "$ud_now" = "$(cat "$stamp")" ]
}

# check_given_python VERSIONS GLIBC: "VERSION<tab>EXECUTABLE" of $PYTHON, if it can be used.
check_given_python() {
    answer=$(probe "$PYTHON") || die "PYTHON=$PYTHON does not run. Give the path of one of: Python $1."
    cg_version=${answer%%	*}
    case " $1 " in
    *" $cg_version "*) ;;
    *) die "PYTHON=$PYTHON is Python $cg_version. With this machine's glibc $2 usable are: Python $1." ;;
    esac
    case $answer in
    *"	ok") echo "${answer%	ok}" ;;
    *) die "PYTHON=$PYTHON lacks ${answer##*	}." \
        "On Debian or Ubuntu: apt-get install python$cg_version-venv" ;;
    esac
}

# Sets line, version and python, and says why.
choose() {
    glibc=$(glibc_version)
    versions=$(pythons_for "$(uname -s)" "$(uname -m)" "$glibc") || exit 1
    if [ -n "${PYTHON:-}" ]; then
        found=$(check_given_python "$versions" "$glibc") || exit 1
    else
        notes=$(mktemp)
        # shellcheck disable=SC2086  # a list of versions
        found=$(find_python $versions 2>"$notes") || {
            { cat "$notes" && how_to_install $versions; } >&2
            rm -f "$notes"
            exit 1
        }
        rm -f "$notes"
    fi
    version=${found%%	*} python=${found#*	}
    line=$(line_of "$version")
    if [ -n "${PYTHON:-}" ]; then
        why="asked for by PYTHON"
    elif [ "$line" = tfx-1.21 ]; then
        why="glibc $glibc runs the newest line"
    elif at_least "$glibc" 2.38; then
        why="the newer TFX 1.21 needs one of Python $NEW_LINE_PYTHONS, and none was found"
    else
        why="the newer TFX 1.21 needs glibc 2.38, and this machine has $glibc"
    fi
    say "TFX ${line#tfx-} with Python $version: $why"
    say "interpreter: $python"
}

# pyfarmhash, which TensorFlow Data Validation needs, has no wheel: say what is missing before a
# gigabyte is downloaded.
check_compiler() {
    needed="the package pyfarmhash is built with. On Debian or Ubuntu: apt-get install"
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
        die "no C++ compiler, which $needed g++ python$version-dev"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] || die "no $headers/Python.h, which $needed python$version-dev"
}

# Settings that send packages elsewhere, or that contradict the lock file, stay out of the set-up.
neutral_environment() {
    unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT PIP_REQUIREMENT PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER \
        PIP_REQUIRE_VIRTUALENV PIP_PRE UV_CONSTRAINT UV_BUILD_CONSTRAINT UV_OVERRIDE UV_EXCLUDE_NEWER \
        UV_PYTHON UV_SYSTEM_PYTHON UV_PROJECT_ENVIRONMENT UV_PRERELEASE VIRTUAL_ENV PYTHONPATH PYTHONHOME
    export PIP_DISABLE_PIP_VERSION_CHECK=1 UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-120}"
}

# uv does not read pip's configuration: hand it pip's index and certificates where it has none of its own.
share_pip_settings() {
    settings=$(.venv/bin/python -m pip config list 2>/dev/null) || settings=
    setting() { printf '%s\n' "$settings" | sed -n "s/^.*\.$1='\(.*\)'\$/\1/p" | tail -n 1; }
    index=$(setting index-url) cert=$(setting cert)
    [ -z "$index" ] || [ -n "${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-}}" ] || export UV_DEFAULT_INDEX="$index"
    [ -z "$cert" ] || [ -n "${SSL_CERT_FILE:-}" ] || export SSL_CERT_FILE="$cert"
}

# filtered PATTERN COMMAND...: runs the command without the lines of its output that match; returns its exit status.
filtered() {
    pattern=$1
    shift
    { "$@" 2>&1 && echo 0 >.venv/status || echo $? >.venv/status; } | grep --line-buffered -vE "$pattern" || true
    status=$(cat .venv/status)
    rm .venv/status
    return "$status"
}

# Installs exactly what the lock files list. What is shown leaves out the line for each of 250 packages.
install_locked() { # install_locked FILE...
    # The packages that install and build the others, with their hashes, cut out of the lock file. With
    # them in place no build needs an environment of its own, whose contents no lock file would pin.
    awk '/^[a-z]/ { keep = /^(pip|setuptools|uv|wheel)==/ } keep' "$1" >.venv/bootstrap.txt
    .venv/bin/python -m pip install --quiet --require-hashes --no-deps -r .venv/bootstrap.txt ||
        die "pip could not install itself, setuptools, uv and wheel; the messages above say why"
    share_pip_settings
    # Of the downloads, those of 100 MiB and more are shown.
    ! filtered "^ [+~-] |^ *(Building|Built|Downloaded) |^Downloading .*\\([0-9.]{1,4}[KM]iB\\)" \
        .venv/bin/uv pip sync --python .venv/bin/python --require-hashes --no-build-isolation "$@" || return 0
    say "uv could not install the lock file; trying pip, which takes longer"
    requirements=$(printf -- '-r %s ' "$@")
    noise='^( |Collecting |Looking in |Requirement already |Installing collected |Successfully )'
    # shellcheck disable=SC2086  # a list of options
    filtered "$noise" .venv/bin/python -m pip install --progress-bar off --require-hashes --no-deps \
        --no-build-isolation $requirements ||
        die "neither uv nor pip could install $*; the messages above say why." \
            "Correct that and repeat the command."
}

make_environment() {
    check_compiler
    neutral_environment
    gpu=${GPU:-$(stamp_field gpu)}
    gpu=${gpu:-0}
    # A finished environment on the same interpreter is brought up to date; any other is made anew.
    if [ "$(stamp_field python)" = "$python" ] && [ "$(stamp_field folder)" = "$root" ]; then
        rm "$stamp"
    elif [ -e .venv ]; then
        [ -f .venv/pyvenv.cfg ] || [ -z "$(ls -A .venv)" ] ||
            die "$root/.venv is in the way: it is not a virtual environment. Move it elsewhere."
        say "replacing .venv, which is unfinished or was made for another interpreter or folder"
        rm -rf .venv
    fi
    [ -d .venv ] || "$python" -m venv .venv || die "$python could not make $root/.venv"
    files=$(lock_files "$line" "$version" "$gpu")
    # shellcheck disable=SC2086  # one or two file names without spaces
    say "installing $(cat $files | grep -c '^[a-z].*==') packages from $files"
    # shellcheck disable=SC2086
    install_locked $files
    .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable . ||
        die "the project itself could not be installed; the messages above say why"
    describe "$line" "$version" "$python" "$gpu" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

# One set-up at a time in one checkout; the lock goes with the process (with flock) or at its end (without).
take_lock() {
    if command -v flock >/dev/null; then
        exec 9>.setup.lock
        flock -n 9 || {
            say "waiting for another set-up of this checkout to finish"
            flock 9
        }
    else
        until mkdir .setup.lock.d 2>/dev/null; do
            say "waiting for another set-up (if none is running: rmdir $root/.setup.lock.d)"
            sleep 5
        done
        trap 'rmdir .setup.lock.d' EXIT
        trap 'exit 130' INT TERM
    fi
}

report_up_to_date() {
    [ "${1:-}" = --quiet ] || say "up to date: .venv (TFX $(stamp_field line | cut -c5-), Python $(stamp_field version))"
}

if up_to_date; then
    report_up_to_date "$@"
    exit
fi
take_lock
if up_to_date; then # another set-up has just made it
    report_up_to_date "$@"
    exit
fi
started=$(date +%s)
choose
make_environment
say "done in $(($(date +%s) - started)) s"
