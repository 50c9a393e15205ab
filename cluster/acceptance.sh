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
# A part may be half written at this moment: that counts as none yet.
n_rows() { "$PYTHON" -c 'import sys; from pyarrow.dataset import dataset; print(dataset(sys.argv[1]).count_rows())' "$1" 2>/dev/null || echo 0; }

say "a head and two workers"
trap 'say "NOT ACCEPTED: the step above failed"; bed down' EXIT
bed up 2

say "doctor"
ours doctor --storage "$folder/check" --model "$run"

say "screen, submitted as a job"
ours submit --submission-id acceptance -- screen "$archive" "$results" --model "$run" --num-actors 2 &
job=$!
while :; do
    kill -0 "$job" 2>/dev/null || { echo "the job ended before a node could be killed"; exit 1; }
    n=$(n_rows "$results/listing.parquet") scored=$(n_rows "$results/_work/scored")
    ((n == 0 || scored * 2 < n)) || break
    sleep 0.2
done
say "$scored of $n images are scored: kill -9 of every process of worker node 1"
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
