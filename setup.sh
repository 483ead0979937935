# Sourced by demo.sh and test.sh: a virtual environment in .venv with the given extra, torch pinned by constraints.txt.
extra=$1
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
[ -x .venv/bin/python ] || "$python" -m venv .venv
. .venv/bin/activate
stamp=.venv/.sparsify-$extra
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  torch=$(grep '^torch==' constraints.txt)
  python -m pip install --quiet "$torch"
  python -m pip install --quiet -c constraints.txt -e ".[$extra]"
  touch "$stamp"
fi
