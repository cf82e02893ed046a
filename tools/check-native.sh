#!/usr/bin/env bash
# Native style: clang-format over all of it, clang-tidy over what the extension is made of. Warnings are errors.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in clang-format clang-tidy; do
  command -v "$tool" >/dev/null || { echo "check-native: $tool is missing (sudo apt-get install $tool)" >&2; exit 1; }
done
mapfile -t sources < <(git ls-files 'native/*.cpp' 'native/*.hpp' 'tests/native/*.cpp' 'tests/native/*.hpp' 'benchmarks/floors/*.cpp' 'benchmarks/floors/*.hpp')
clang-format --dry-run --Werror "${sources[@]}"
PATH=$PWD/.venv/bin:$PATH
cmake -S . -B build/tidy -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
  -DPython_EXECUTABLE="$PWD/.venv/bin/python" >/dev/null
mapfile -t units < <(git ls-files 'native/*.cpp')
clang-tidy --quiet -p build/tidy --warnings-as-errors='*' "${units[@]}" 2> >(grep -v 'warnings generated' >&2)
echo "native style: ${#sources[@]} files, no findings"
