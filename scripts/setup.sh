#!/bin/sh
# Makes the virtual environment of `make`, with FFCV where it can be built. Usage: scripts/setup.sh PYTHON VENV
# PYTHON makes the environment; where VENV is there already, its own Python is the one that is used.
# FFCV is compiled against Debian packages. They are installed where that can be done (as root, or through sudo); where
# not, or with RSENGINE_NO_FFCV=1, one line says that the rest is set up without it.
set -eu
python=$1
venv=$2
again=
if [ -x "$venv/bin/python" ]; then
    python=$venv/bin/python
    again="make clean, then "
fi

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
suits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
if ! suits "$python"; then
    if ! command -v "$python" >/dev/null 2>&1; then
        problem="$python not found"
    elif version=$(version_of "$python"); then
        problem="$python is Python $version, too old"
    else
        problem="$python does not run"
    fi
    # A name on the PATH proves nothing: it may be a stub that fails when it is run.
    remedy="install one, then ${again}make PYTHON=/path/to/python3"
    for name in python3.11 python3.12 python3.13 python3.14 python3; do
        if suits "$name"; then
            remedy="${again}make PYTHON=$name"
            break
        fi
    done
    echo "error: $problem; rsengine needs Python 3.11 or later: $remedy" >&2
    exit 2
fi

# What is missing, by its Debian name: for the environment, and for FFCV.
for_venv=
for_ffcv=
[ -n "$again" ] || "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || for_venv=" python3-venv"
without=
if [ "${RSENGINE_NO_FFCV:-0}" != 0 ]; then
    without="as RSENGINE_NO_FFCV asks"
else
    command -v c++ >/dev/null 2>&1 || for_ffcv="$for_ffcv g++"
    if command -v pkg-config >/dev/null 2>&1; then
        pkg-config --exists opencv4 || for_ffcv="$for_ffcv libopencv-dev"
        pkg-config --exists libturbojpeg || for_ffcv="$for_ffcv libturbojpeg0-dev"
    else
        for_ffcv="$for_ffcv pkg-config libopencv-dev libturbojpeg0-dev"
    fi
    "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        for_ffcv="$for_ffcv python3-dev"
fi

if [ -n "$for_venv$for_ffcv" ]; then
    command="apt-get update && apt-get install -y --no-install-recommends$for_venv$for_ffcv"
    why=
    if ! command -v apt-get >/dev/null 2>&1; then
        why="install them with your system's package manager"
    elif [ "$(id -u)" = 0 ]; then
        run() { sh -c "$1"; }
    elif command -v sudo >/dev/null 2>&1 && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        run() { sudo sh -c "$1"; }
    else
        why="as root, run: $command"
    fi
    if [ -z "$why" ]; then
        echo "installing Debian packages:$for_venv$for_ffcv"
        DEBIAN_FRONTEND=noninteractive run "$command" || why="installing failed; as root, run: $command"
    fi
    if [ -n "$why" ] && [ -n "$for_venv" ]; then
        echo "error: these packages (Debian's names) are missing:$for_venv$for_ffcv; $why; then run make again" >&2
        exit 2
    fi
    [ -z "$why" ] || without="because these packages (Debian's names) are missing:$for_ffcv; $why; then run make -B setup"
fi

test -x "$venv/bin/python" || "$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --progress-bar off -c constraints.txt -e "$1"; }
install '.[test]'
if [ -z "$without" ]; then
    # An FFCV that cannot be built or loaded is of no use, and its compiler's pages of errors are for a file.
    log=$venv/ffcv.log
    if ! { install '.[ffcv]' && "$venv/bin/python" -c 'import ffcv'; } >"$log" 2>&1; then
        without="because it cannot be built and loaded here ($log says why)"
    fi
fi
[ -z "$without" ] || echo "going on without FFCV, $without. rsengine's own loader takes its place"
