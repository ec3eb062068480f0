#!/usr/bin/env bash
# install.sh PYTHON DIRECTORY: the standard clients, in a virtual environment of their own; nothing, if it has them.
set -euo pipefail
python=$1 environment=$2
here=$(cd "$(dirname "$0")" && pwd)
wanted=$(cat "$here/requirements.txt" "$here/constraints.txt" | sha256sum)
[ "$(cat "$environment/.installed" 2>/dev/null)" != "$wanted" ] || exit 0
rm -rf "$environment"
"$python" -m venv "$environment"
# First and alone, as the Makefile does it, so that a build of torch for CPUs is taken where there is one.
for what in torch "--requirement=$here/requirements.txt"; do
    "$environment/bin/python" -m pip install --quiet --constraint "$here/constraints.txt" "$what"
done
echo "$wanted" > "$environment/.installed"
