#!/usr/bin/env bash
# Install into .venv and run the demo: fine-tune SmolLM2-135M (or MiniLM) and write report/demo.html. Needs Python 3.11+ and nothing else.
#   ./demo.sh              arguments go to the demo (./demo.sh --help)
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh demo
case " $* " in *minilm*) other=wanted ;; esac
if [ -n "${other:-}" ] || [ ! -e .venv/.sparsify-model ]; then
  . ./setup.sh minilm
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m sparsify.demo "$@"
