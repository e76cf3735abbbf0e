#!/usr/bin/env bash
# A newcomer's three commands in a fresh environment, outside of the source tree: install a wheel, encode a folder of
# videos, ask about one of them.
#
#   bash cmake/newcomer.sh [WHEEL [ENVIRONMENT]]    default: the wheel of dist/, a new environment with what pip takes
#
# The videos are drawn and the language model is tiny and random, made by $PYTHON (.venv): what a newcomer has. So the
# answer is words without sense; what is shown is that nothing else is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$(realpath "${1:-$(ls dist/pyvidx-*-abi3-*.whl)}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-.venv/bin/python}" -m tests.tiny_hosts "$work/model" "$work/videos" 2> "$work/log" || { cat "$work/log"; exit 1; }

environment=${2:-$work/environment}
[ -x "$environment/bin/python" ] || python3 -m venv "$environment"
environment=$(realpath "$environment")
cd "$work"
unset PYTHONPATH
export PATH="$environment/bin:$PATH" HF_HUB_OFFLINE=1
set -x
[ -x "$environment/bin/pyvidx" ] || pip install -q "$wheel[video,hosts,cli]"
pyvidx encode videos/ --out corpus
pyvidx ask videos/left.mp4 "what is the person doing ?" --model model/ --new-tokens 5
