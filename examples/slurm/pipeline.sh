#!/bin/bash
# From a corpus to a measured student: six jobs that wait for each other. It submits them and returns.
#
#   TEACHER=Qwen/Qwen2.5-7B CORPUS=/data/chats.jsonl STUDENT=/data/student/config.json \
#     bash examples/slurm/pipeline.sh --seq-len 1024
#
# CACHE and OUT say where the cache and the student go, TASKS how many tasks share the dump. Options are given to
# dump-teacher, the words of TRAIN to sbatch, those of TRAIN_OPTIONS to train-student:
#
#   TASKS=64 TRAIN="--nodes=4 --gpus-per-node=8" TRAIN_OPTIONS="--fsdp --lr 3e-4" bash examples/slurm/pipeline.sh
#
# A job that fails cancels those that wait for it. Give the same command again: what is finished is kept.
set -euo pipefail

export TEACHER="${TEACHER:-Qwen/Qwen2.5-0.5B}"
export CORPUS="${CORPUS:-hf:Salesforce/wikitext:wikitext-103-raw-v1}"
export CACHE="${CACHE:-$PWD/cache}"
export STUDENT="${STUDENT:-$PWD/student/config.json}"
export OUT="${OUT:-$PWD/student-trained}"
TASKS="${TASKS:-16}"
read -ra TRAIN <<<"${TRAIN:-}"
read -ra TRAIN_OPTIONS <<<"${TRAIN_OPTIONS:-}"

EXAMPLES="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
SUBMIT=(sbatch --parsable --kill-on-invalid-dep=yes)

check="$("${SUBMIT[@]}" --job-name=kdcache-check --output=%x-%j.out \
  --wrap='exec kdcache check-data --teacher "$TEACHER" --corpus "$CORPUS"')"

# One task creates the cache, so that not every task reads the whole corpus.
create="$("${SUBMIT[@]}" --job-name=kdcache-create --output=%x-%j.out --dependency="afterok:$check" \
  "$EXAMPLES/dump.sbatch" --create-only "$@")"

dump="$("${SUBMIT[@]}" --array="0-$((TASKS - 1))" --dependency="afterok:$create" "$EXAMPLES/dump.sbatch" "$@")"

# Once more, for what tasks that failed or were cancelled have left; those that find nothing to do end in seconds.
rest="$("${SUBMIT[@]}" --array="0-$((TASKS - 1))" --dependency="afterok:$create,afterany:$dump" \
  "$EXAMPLES/dump.sbatch" "$@")"

train="$("${SUBMIT[@]}" --dependency="afterok:$rest" "${TRAIN[@]}" "$EXAMPLES/train.sbatch" "${TRAIN_OPTIONS[@]}")"

evaluate="$("${SUBMIT[@]}" --job-name=kdcache-evaluate --output=%x-%j.out --gpus-per-node=1 \
  --dependency="afterok:$train" \
  --wrap='exec kdcache evaluate --student "$OUT" --cache "$CACHE" --heldout 0.02 --json')"

echo "check $check, create $create, dump $dump, rest $rest, train $train, evaluate $evaluate"
