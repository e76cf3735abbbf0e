#!/usr/bin/env bash
# make env: a .venv with everything, and pyvidx built in place. A torch that $PYTHON already has (a GPU machine) is used;
# otherwise the CPU build is installed. Safe to run again: what is there is kept, and the build is incremental.
# WHEEL=FILE.whl: pyvidx from that file instead, and nothing compiled; without WHEEL, the next run builds it in place again.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
venv=.venv/bin/python
extras=${EXTRAS:-video,hosts,cli,train,test,docs}

if [ -n "${WHEEL:-}" ] && [ ! -f "$WHEEL" ]; then
  echo "pyvidx: WHEEL must be a file, got $WHEEL" >&2
  exit 1
fi
[ -x $venv ] || "$PYTHON" -m venv .venv
constraints=()
if ! $venv -c 'import torch' 2>/dev/null; then
  if "$PYTHON" -c 'import torch' 2>/dev/null; then
    # Not --system-site-packages: $PYTHON may itself be a virtual environment.
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
      > "$($venv -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/outer-torch.pth"
  else
    $venv -m pip install -q -c cmake/constraints-cpu.txt torch numpy
  fi
fi
$venv -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' && constraints=(-c cmake/constraints-cpu.txt)
if [ -n "${WHEEL:-}" ]; then
  echo "pyvidx: from $WHEEL, not from this source tree; nothing is compiled"
  $venv -m pip install -q --no-deps --force-reinstall "$WHEEL"
  $venv -m pip install -q ${constraints[@]+"${constraints[@]}"} "$WHEEL[$extras]"
  # Not `python -m pyvidx`, which would find the source tree's.
  exec env -u PYTHONPATH .venv/bin/pyvidx info
fi
$venv -m pip install -q ${constraints[@]+"${constraints[@]}"} 'setuptools>=77' wheel ninja pybind11
if ! $venv -m pip install -q ${constraints[@]+"${constraints[@]}"} --no-build-isolation -e ".[$extras]"; then
  echo "pyvidx: could not install the extras [$extras] (no network?); building without them" >&2
  $venv -m pip install -q --no-build-isolation --no-deps -e .
fi
$venv -m pyvidx info
