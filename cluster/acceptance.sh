#!/usr/bin/env bash
# The acceptance run on the test bed: a head and two workers, `doctor` green, a screening submitted across them, one worker
# node killed (-9) at about half, the results proved by `verify`, the cluster taken down. Needs root, as local.sh does.
#
#   cluster/acceptance.sh ARCHIVE RUN FOLDER     RUN: of 'malaria-ray train', 'make demo' leaves one in demo/run
#
# FOLDER gets results/ and log; exit status 0 only if every step held. PYTHON and BED as for local.sh.
set -euo pipefail

export PYTHON=${PYTHON:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ $# == 3 ]] || { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ -e $1 && -e $2/_SUCCESS.json ]] || { echo "acceptance.sh: no archive $1, or no finished run $2" >&2; exit 1; }
archive=$(realpath "$1") run=$(realpath "$2")
mkdir -p "$3"
folder=$(realpath "$3")
results=$folder/results log=$folder/log
[[ ! -e $results ]] || { echo "acceptance.sh: $results is there already; give another FOLDER" >&2; exit 1; }
exec > >(tee "$log") 2>&1

say() { printf '\n%s  %s\n' "$(date -u +%H:%M:%S)" "$*"; }
bed() { "$HERE/local.sh" "$@"; }
ours() { bed run -- malaria-ray "$@"; }
# Prints "N of M images" when half are scored. A part that is half written counts as none yet.
wait_for_half() { # wait_for_half RESULTS PROCESS
    "$PYTHON" - "$@" <<'EOF'
import os, sys, time
from pathlib import Path
import pyarrow.parquet as pq

def rows(files):
    for file in files:
        try:
            known.setdefault(file, pq.read_metadata(file).num_rows)
        except (OSError, ValueError):
            continue
    return sum(known[file] for file in files if file in known)

results, process, known = Path(sys.argv[1]), int(sys.argv[2]), {}
while True:
    n, scored = rows(list(results.glob("listing.parquet"))), rows(list((results / "_work/scored").glob("*.parquet")))
    if n and 2 * scored >= n:
        sys.exit(print(f"{scored:,} of {n:,} images"))
    os.kill(process, 0)  # raises where the job has ended before
    time.sleep(0.5)
EOF
}

say "a head and two workers"
trap 'say "NOT ACCEPTED: the step above failed"; bed down' EXIT
bed up 2

say "doctor"
ours doctor --storage "$folder/check" --model "$run"

say "screen, submitted as a job"
ours submit --submission-id acceptance -- screen "$archive" "$results" --model "$run" --num-actors 2 &
job=$!
half=$(wait_for_half "$results" "$job")
say "$half are scored: kill -9 of every process of worker node 1"
bed kill-node 1
bed status
wait "$job"
say "the job ended with exit status 0"
ours jobs

say "verify"
ours verify "$results"

say "the cluster is taken down"
trap - EXIT
bed down
say "accepted: $results"
