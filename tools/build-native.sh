#!/bin/sh
# Build the native fabric in place for the development tree: src/isthmus/fabric/_{plain,ucx}*.so (ignored by git).
# Usage: tools/build-native.sh [more cmake -D options]. Needs the virtual environment's cmake, ninja, nanobind, libucx.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
tools=${VIRTUAL_ENV:-$root/.venv}/bin
PATH=$tools:$PATH
cmake -S "$root" -B "$root/build/native" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$tools/python" "$@" >/dev/null
cmake --build "$root/build/native"
for module in "$root"/build/native/_plain*.so "$root"/build/native/_ucx*.so; do
    [ -e "$module" ] || { echo "no module was built: UCX headers or nanobind are missing" >&2; exit 1; }
    cp "$module" "$root/src/isthmus/fabric/.$(basename "$module")" # a running process keeps the old file
    mv "$root/src/isthmus/fabric/.$(basename "$module")" "$root/src/isthmus/fabric/$(basename "$module")"
done
