#!/usr/bin/env bash
# Installs what test_slurm.py needs (slurmctld, slurmd, sbatch, munged) with apt where it may: as root, or where sudo asks
# for no password. Elsewhere it says why the tests of SLURM will be skipped. It never fails: the tests say what is missing.
set -uo pipefail
PATH="$PATH:/usr/sbin:/sbin"

missing() {
  for name in munged slurmctld slurmd sbatch; do
    command -v "$name" >/dev/null || return 0
  done
  return 1
}

skipped() {
  echo "SLURM is not installed and $1: its tests are skipped"
  exit 0
}

missing || exit 0
command -v apt-get >/dev/null || skipped "there is no apt-get here"
root=()
if [[ "$(id -u)" != 0 ]]; then
  sudo -n true 2>/dev/null || skipped "apt-get needs root or a sudo without a password"
  root=(sudo -n)
fi
echo "installing slurm-wlm and munge"
"${root[@]}" apt-get update -qq >/dev/null 2>&1 # lists may be stale, or not there yet
"${root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null 2>&1 || skipped "apt-get could not install it"
missing && skipped "apt-get installed other programs than are needed"
exit 0
