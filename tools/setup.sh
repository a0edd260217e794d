#!/usr/bin/env bash
# Makes or updates the environment .venv in the repository root, with the versions of tools/constraints.txt.
# Does nothing when pyproject.toml and constraints.txt are those of the last time. PYTHON=... chooses the Python.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 2
}

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; then
      command -v "$name"
      return
    fi
  done
}

if [[ ! -x "$venv/bin/python" ]]; then
  python="$(find_python)"
  [[ -n "$python" ]] || fail "no Python 3.11, 3.12 or 3.13 found (python3 here is $(python3 --version 2>&1 || true))." \
    "Install one, or name it: PYTHON=/path/to/python3.12 bash tools/setup.sh"
  echo "setup: making $venv with $("$python" --version)"
  if ! message="$("$python" -m venv "$venv" 2>&1)"; then
    rm -rf "$venv"
    fail "$python cannot make a virtual environment with pip (on Debian and Ubuntu: apt install python3-venv)." \
      "It said: $message"
  fi
fi

stamp="$venv/mmjax.stamp"
state="$("$venv/bin/python" - "$root" << 'PYTHON'
import hashlib, pathlib, sys

names = "pyproject.toml", "tools/constraints.txt"
data = b"".join((pathlib.Path(sys.argv[1]) / name).read_bytes() for name in names)
print(sys.version_info[:2], hashlib.sha256(data + sys.argv[1].encode()).hexdigest())
PYTHON
)"
if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$state" ]]; then
  "$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip > /dev/null 2>&1 ||
    fail "$venv has no pip, and its Python has no ensurepip. Delete the folder, and use a Python that has both."
  echo "setup: installing the pinned packages (2.8 GB on disk, a minute or two)"
  (cd "$root" && "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    -c tools/constraints.txt -e '.[test]') ||
    fail "pip could not install the packages (see above). Is the package index reachable?"
  echo "$state" > "$stamp"
fi
