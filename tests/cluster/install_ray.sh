#!/usr/bin/env bash
# Installs Ray, for tests/cluster/test_ray.py, beside the project in the environment of the `python` that is found first.
# It never fails: where it cannot install, it says why, and the tests say what is missing.
set -uo pipefail
cd "$(dirname "$0")/../.."
python -c "import ray.train" >/dev/null 2>&1 && exit 0
echo "installing Ray"
words="$(python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]' 2>&1)" ||
  echo "Ray is not installed: $(tail -n 1 <<<"$words"); its tests are skipped"
exit 0
