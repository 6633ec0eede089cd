#!/bin/sh
# Installs the Debian packages that building FFCV and a virtual environment need, those that are missing and no others.
# Usage: scripts/system_packages.sh PYTHON [VENV_PYTHON]
# PYTHON makes the virtual environment; where VENV_PYTHON is there already, it is the one that will be used.
set -eu
python=$1
again=
if [ -x "${2-}" ]; then
    python=$2
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

missing=
need() { missing="$missing $*"; }
command -v c++ >/dev/null 2>&1 || need g++
if command -v pkg-config >/dev/null 2>&1; then
    pkg-config --exists opencv4 || need libopencv-dev
    pkg-config --exists libturbojpeg || need libturbojpeg0-dev
else
    need pkg-config libopencv-dev libturbojpeg0-dev
fi
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || need python3-venv
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    need python3-dev
[ -n "$missing" ] || exit 0

command="apt-get update && apt-get install -y --no-install-recommends$missing"
if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: these packages (Debian's names) are missing:$missing; install them with your system's package manager, then run make again" >&2
    exit 2
fi
if [ "$(id -u)" = 0 ]; then
    run() { sh -c "$1"; }
elif command -v sudo >/dev/null 2>&1 && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
    run() { sudo sh -c "$1"; }
else
    echo "error: missing Debian packages; as root, run: $command" >&2
    exit 2
fi
echo "installing Debian packages:$missing"
DEBIAN_FRONTEND=noninteractive run "$command" || { echo "error: installing failed; as root, run: $command" >&2; exit 2; }
