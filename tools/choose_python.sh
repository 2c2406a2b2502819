# shellcheck shell=sh
# Shell functions that choose the TFX line and the Python for this machine. Sourced by setup.sh.
#
#   line      TFX   TensorFlow  Python            C library
#   tfx-1.21  1.21  2.21        3.11, 3.12, 3.13  glibc 2.38 or newer (its wheels are tagged manylinux_2_39)
#   tfx-1.16  1.16  2.16        3.10              glibc 2.28 or newer
#
# Both need Linux on x86_64: TFX's compiled parts (ml-metadata, TFDV, tfx-bsl) have wheels for nothing else.

# Within the newer line 3.12 comes first (mid-range, and Ubuntu 24.04's own), then 3.13 (Debian 13's own).
NEW_LINE_PYTHONS='3.12 3.13 3.11'
OLD_LINE_PYTHONS='3.10'

# Prints the C library's version ("2.36"), or nothing where it is not glibc.
glibc_version() {
    getconf GNU_LIBC_VERSION 2>/dev/null | sed -n 's/^glibc //p'
}

# at_least VERSION MINIMUM: compares two "major.minor" versions.
at_least() {
    al_major=${1%%.*} al_rest=${1#*.}
    al_minor=${al_rest%%.*}
    [ "$al_major" -gt "${2%%.*}" ] ||
        { [ "$al_major" -eq "${2%%.*}" ] && [ "$al_minor" -ge "${2#*.}" ]; }
}

# pythons_for SYSTEM MACHINE GLIBC: prints the Python versions that can be used, best first.
# On a machine that no line supports, explains on stderr and returns 1.
pythons_for() {
    if [ "$1" != Linux ] || [ "$2" != x86_64 ] || [ -z "$3" ]; then
        echo "setup: TFX has no wheels for this machine ($1 on $2, ${3:+glibc }${3:-no glibc})." \
            "Supported: Linux on x86_64 with glibc 2.28 or newer (not musl). On another system use a" \
            "container or a virtual machine of Debian 12/13 or Ubuntu 22.04/24.04." >&2
        return 1
    elif at_least "$3" 2.38; then
        echo "$NEW_LINE_PYTHONS $OLD_LINE_PYTHONS"
    elif at_least "$3" 2.28; then
        echo "$OLD_LINE_PYTHONS"
    else
        echo "setup: this machine's glibc is $3; the oldest supported is 2.28 (Debian 10," \
            "Ubuntu 20.04). Use a newer system, or a container of one." >&2
        return 1
    fi
}

# line_of VERSION: the line that serves a Python version ("3.12"); returns 1 where none does.
line_of() {
    case " $NEW_LINE_PYTHONS " in *" $1 "*) echo tfx-1.21 && return ;; esac
    case " $OLD_LINE_PYTHONS " in *" $1 "*) echo tfx-1.16 && return ;; esac
    return 1
}

# probe PATH: runs the interpreter and prints "VERSION<tab>EXECUTABLE<tab>WANTING", where WANTING is "ok"
# or names what it lacks. Returns non-zero, with nothing printed, when it does not run (a pyenv shim
# without a version behind it, say).
probe() {
    "$1" -c '
import sys
wanting = []
for name in ("ctypes", "ensurepip", "ssl", "venv", "zlib"):
    try:
        __import__(name)
    except ImportError:
        wanting.append(name)
if sys.version_info >= (3,):
    import sysconfig
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        wanting.append("a standard CPython build")
if sys.maxsize < 2**32:
    wanting.append("a 64-bit build")
version = "%d.%d" % sys.version_info[:2]
print("\t".join([version, sys.executable, ", ".join(wanting) or "ok"]))
' 2>/dev/null
}

# candidates VERSION: prints the paths where such an interpreter may be, one a line, PATH first.
candidates() {
    (
        set -f
        IFS=:
        # shellcheck disable=SC2086  # split on colons
        set -- "$1" $PATH
        set +f
        version=$1
        shift
        for folder in "$@"; do
            echo "$folder/python$version"
            # pyenv's versions can be used without being selected; they are beside its shims on PATH.
            case $folder in
            */shims)
                for unselected in "${folder%/shims}/versions/$version"*/bin; do
                    echo "$unselected/python$version"
                done
                ;;
            esac
        done
        pyenv=${PYENV_ROOT:-$HOME/.pyenv}/versions
        uv=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}
        for folder in "$pyenv/$version"*/bin "$uv/cpython-$version"*/bin \
            /usr/local/bin /usr/bin /usr/local/python*/bin /opt/*/bin /opt/python/*/bin; do
            echo "$folder/python$version"
        done
    ) | awk '!seen[$0]++'
}

# find_python VERSION...: prints "VERSION<tab>EXECUTABLE" of the first usable interpreter, trying the
# versions in order. Returns 1 when there is none. Those that were passed over are named on stderr.
find_python() {
    for fp_version in "$@"; do
        fp_list=$(candidates "$fp_version")
        while IFS= read -r fp_path; do
            [ -x "$fp_path" ] || continue
            fp_answer=$(probe "$fp_path") || fp_answer=
            case $fp_answer in
            "$fp_version	"*"	ok") echo "${fp_answer%	ok}" && return ;;
            '') echo "setup: passed over $fp_path: it does not run" >&2 ;;
            "$fp_version	"*ensurepip* | "$fp_version	"*venv)
                echo "setup: passed over $fp_path: it lacks ${fp_answer##*	}" \
                    "(on Debian or Ubuntu: apt-get install python$fp_version-venv)" >&2
                ;;
            "$fp_version	"*) echo "setup: passed over $fp_path: it lacks ${fp_answer##*	}" >&2 ;;
            *) echo "setup: passed over $fp_path: it is Python ${fp_answer%%	*}" >&2 ;;
            esac
        done <<LIST
$fp_list
LIST
    done
    return 1
}

# how_to_install VERSION...: prints what brings an interpreter of one of these versions, the first being the best.
how_to_install() {
    echo "setup: no usable Python found; one of these is needed: $*." \
        "Do one of the following and repeat the command:"
    case " $* " in
    *" 3.12 "*)
        echo "  apt-get install python3.12 python3.12-venv python3.12-dev g++    (Ubuntu 24.04)"
        echo "  apt-get install python3.13 python3.13-venv python3.13-dev g++    (Debian 13)"
        ;;
    *)
        echo "  apt-get install python3.10 python3.10-venv python3.10-dev g++    (Ubuntu 22.04;" \
            "on other Ubuntus after: add-apt-repository ppa:deadsnakes/ppa)"
        ;;
    esac
    echo "  pyenv install $1        (found under ~/.pyenv even when not selected)"
    echo "  uv python install $1"
    echo "  add PYTHON=/path/to/python$1 to the make command, if there is one in an unusual place"
}
