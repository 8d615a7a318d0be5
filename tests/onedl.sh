#!/usr/bin/env bash
# Runs the segmentation tests on the maintained forks of OpenMMLab's packages (onedl-*), in an environment of their own:
# the forks have the same import names, so they cannot be installed beside the originals. Several GB, some minutes.
#   tests/onedl.sh              all segmentation tests
#   tests/onedl.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-onedl
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check "setuptools<81" wheel
"$venv/bin/python" -m pip install -q --disable-pip-version-check -e ".[onedl,dev]"
"$venv/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E "^(onedl-|torch |timm |numpy )"
MPLBACKEND=Agg "$venv/bin/python" -m pytest tests/segmentation "$@"
