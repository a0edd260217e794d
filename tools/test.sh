#!/usr/bin/env bash
# Environment, lint, types, tests. Arguments go to pytest: bash tools/test.sh tests/test_metrics.py -x
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

phase() {
  echo "== $*"
}

phase "environment"
bash "$root/tools/setup.sh"
# pytest's arguments may name files relative to where the user is.
tests=("$@")
[[ $# -gt 0 ]] || cd "$root"
bin="$root/.venv/bin"
phase "ruff check"
"$bin/ruff" check "$root"
phase "ruff format"
"$bin/ruff" format --check "$root"
phase "mypy"
(cd "$root" && "$bin/mypy")
phase "pytest"
# Two processes: compiling, most of the work, hardly uses a second core.
"$bin/python" -m pytest -n 2 --dist loadfile -c "$root/pyproject.toml" --rootdir="$root" ${tests[@]+"${tests[@]}"}
