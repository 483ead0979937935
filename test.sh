#!/usr/bin/env bash
# Install everything into .venv and run the checks and tests. Needs Python 3.11+ and nothing else.
#   ./test.sh              formatting, types, tests
#   ./test.sh -m slow      arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh dev
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m compileall -q -j 2 sparsify # once, not in each of the processes that tests start, where writing bytecode is forbidden
ruff format --check .
ruff check .
pyright
if [ $# -eq 0 ]; then
  set -- --dist worksteal -n "$(python -c 'import os; print(min(8, os.cpu_count() or 1))')" -m "not slow and not gpu"
fi
python -m pytest "$@"
