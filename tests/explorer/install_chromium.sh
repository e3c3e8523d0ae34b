#!/usr/bin/env bash
# Installs Debian's Chromium, for tests/explorer/test_browser.py.
# It never fails: where it cannot install, it says why, and the tests say what is missing.
set -uo pipefail
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && exit 0
if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "Chromium is not installed: that takes apt-get and root; its tests are skipped"
  exit 0
fi
echo "installing Chromium"
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
  echo "Chromium is not installed: apt-get could not; its tests are skipped"
exit 0
