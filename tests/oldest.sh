#!/usr/bin/env bash
# Runs the tests on the oldest torch that pyproject.toml allows, in an environment of its own. Several GB, some minutes.
#   tests/oldest.sh              all tests
#   tests/oldest.sh -m "not slow" tests/methods
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-oldest
oldest=$(sed -n 's/^ *"torch>=\([0-9.]*\),.*/\1/p' pyproject.toml)
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check "setuptools<81" wheel "torch==$oldest.*"
"$venv/bin/python" -m pip install -q --disable-pip-version-check -e ".[mmseg,dev]" "torch==$oldest.*"
"$venv/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E "^(torch|torchvision|timm|numpy) "
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg "$venv/bin/python" -m pytest "$@"
