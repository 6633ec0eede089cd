#!/bin/sh
# Installs the Debian packages that building FFCV and a virtual environment need, those that are missing and no others.
# Usage: scripts/system_packages.sh PYTHON
set -eu
python=$1

command -v "$python" >/dev/null 2>&1 || { echo "error: $python not found; install Python 3.10 or later, or run make PYTHON=/path/to/python3" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version 2>&1) is too old; rsengine needs Python 3.10 or later: make PYTHON=/path/to/python3" >&2; exit 2; }

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
