#!/usr/bin/env bash
# A real cluster on one machine: a head and N workers, each its own `ray start` with its own resources and address.
#
#   cluster/local.sh up 2            head and two workers          cluster/local.sh kill-node 1   kill -9, as a lost machine
#   cluster/local.sh run -- CMD …    a command as a client of it   cluster/local.sh cut-link 1    no packet passes
#   cluster/local.sh status          nodes, processes, links       cluster/local.sh heal-link 1
#   cluster/local.sh add-node        one more worker               cluster/local.sh down          ends and removes all of it
#
# Needs root: each node lives in a network namespace of its own, joined by a bridge in one more. Nothing outside can reach
# them and nothing is changed outside. There is no mode without: told 127.0.0.1, Ray still listens on and uses the machine's
# own address (2.60.0).
# Token authentication is on; the token lies in $BED/token, readable by its owner only.
#
# Workers are as nice as all else (Ray's are 15): nodes on one machine would stand still beside anything that is busy there.
# Nodes share no folder of Ray's: one would delete what another still uses. They share the disk.
# BED (/tmp/mrbed, short: Unix sockets below it have at most 107 characters), PYTHON (.venv/bin/python), CPUS of a
# worker (1), OBJECT_STORE_MB of a node (160), NODE_WRAPPER (a program that `ray start` is started
# through), NODE_ARGUMENTS (one more argument of `ray start`), NODE_PYTHONPATH (before the package): for nodes with faults.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BED=${BED:-/tmp/mrbed}
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
CPUS=${CPUS:-1}
OBJECT_STORE_MB=${OBJECT_STORE_MB:-160}
NET=${BED_NET:-10.213.77}    # inside the namespaces only
NAME=$(basename "$BED")      # of the namespaces: NAME (the bridge and the clients), NAME-0 (the head), NAME-1 …
WAIT_S=${WAIT_S:-180}
# What nodes and clients have in common. The token is a file: a command line or environment can be read by others.
SETTINGS=(PATH="$(dirname "$PYTHON"):$PATH" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$BED/token" RAY_TMPDIR="$BED")

fail() { echo "local.sh: $*" >&2; exit 1; }
check_is_up() { [[ -f $BED/token ]] || fail "no test bed at $BED; start one with: cluster/local.sh up 2"; }
address_of() { echo "$NET.$((10 + $1))"; }
check_node() { [[ ${1:-} =~ ^[0-9]+$ && -d $BED/n$1 ]] || fail "no node '${1:-}'; there are: $(nodes | xargs)"; }
nodes() { find "$BED" -maxdepth 1 -name 'n[0-9]*' -printf '%f\n' | sed 's/n//' | sort -n; }

# Not by a mark in their environment: Ray's processes rename themselves and overwrite what /proc shows of it.
pids_of() { ip netns pids "$NAME-$1"; }

kill_node() {
    local pids _
    for _ in 1 2 3 4 5; do
        pids=$(pids_of "$1")
        [[ -n $pids ]] || return 0
        xargs kill -9 <<<"$pids" 2>/dev/null || true
        sleep 0.3
    done
}

make_network() {
    ip netns add "$NAME"
    ip -n "$NAME" link set lo up
    ip -n "$NAME" link add bridge type bridge
    ip -n "$NAME" address add "$NET.1/24" dev bridge
    ip -n "$NAME" link set bridge up
}

plug_in() {
    local node=$1
    ip netns add "$NAME-$node"
    ip -n "$NAME-$node" link set lo up
    ip -n "$NAME" link add "port$node" type veth peer name eth0 netns "$NAME-$node"
    ip -n "$NAME" link set "port$node" master bridge up
    ip -n "$NAME-$node" address add "$(address_of "$node")/24" dev eth0
    ip -n "$NAME-$node" link set eth0 up
}

start_node() { # start_node NODE ray-start-arguments…
    local node=$1 folder=$BED/n$1 log=$BED/n$1/log attempt
    shift
    plug_in "$node"
    mkdir -p "$folder"
    # Ray gives a node 30 s to appear and cannot be told to wait longer (2.60.0): a busy machine needs another try.
    for attempt in 1 2 3; do
        if try_to_start "$node" "$@"; then
            echo "node $node is up: $(address_of "$node")"
            return 0
        fi
        kill_node "$node"
        rm -rf "$folder/ray"
        grep -q 'timed out during startup' "$log" || break
    done
    tail -n 20 "$log" >&2
    fail "node $node did not start ($attempt tries); its last log: $log"
}

try_to_start() { # try_to_start NODE ray-start-arguments…
    local node=$1 folder=$BED/n$1 log=$BED/n$1/log waited=0
    shift
    cd "$folder"
    # shellcheck disable=SC2086 # the wrapper is a program and its arguments
    (exec ip netns exec "$NAME-$node" setsid env -u RAY_ADDRESS -u RAY_AUTH_TOKEN "${SETTINGS[@]}" \
        PYTHONPATH="${NODE_PYTHONPATH:+$NODE_PYTHONPATH:}$ROOT" RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 \
        RAY_idle_worker_killing_time_threshold_ms=60000 \
        RAY_RAYLET_START_WAIT_TIME_S="$WAIT_S" ${NODE_WRAPPER:-} "$PYTHON" -m ray.scripts.scripts start --block \
        --node-ip-address="$(address_of "$node")" --object-store-memory=$((OBJECT_STORE_MB * 1000000)) \
        --dashboard-agent-listen-port=$((52400 + node)) --temp-dir="$folder/ray" "$@" >"$log" 2>&1 </dev/null &)
    until grep -q 'Ray runtime started' "$log" 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
        if ((waited > WAIT_S)) || { ((waited > 2)) && [[ -z $(pids_of "$node") ]]; }; then return 1; fi
    done
}

start_worker() {
    start_node "$1" --address="$(address_of 0):6379" --num-cpus="$CPUS" ${NODE_ARGUMENTS:+"$NODE_ARGUMENTS"}
}

up() {
    local n=${1:-2} node
    [[ $n =~ ^[0-9]+$ ]] || fail "up '$n': give the number of workers"
    [[ ! -e $BED ]] || fail "$BED is there already; 'cluster/local.sh down' removes it"
    [[ -x $PYTHON ]] || fail "no Python at $PYTHON; run 'make setup' or set PYTHON"
    if [[ $(id -u) != 0 ]] || ! command -v ip >/dev/null; then fail "network namespaces need root and iproute2"; fi
    mkdir -m 700 "$BED"
    (umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$BED/token")
    make_network
    # The head does no work: a job's driver and the cluster's own books are enough to lose.
    start_node 0 --head --port=6379 --num-cpus=0 --dashboard-host="$(address_of 0)" --dashboard-port=8265
    for ((node = 1; node <= n; node++)); do start_worker "$node"; done
    echo "jobs and dashboard: http://$(address_of 0):8265; try: cluster/local.sh run -- malaria-ray doctor"
}

status() {
    local node link
    echo "$BED: http://$(address_of 0):8265"
    for node in $(nodes); do
        link=up
        if ip -n "$NAME" link show "port$node" | grep -q 'state DOWN'; then link="cut"; fi
        echo "node $node  $(address_of "$node")  $(pids_of "$node" | wc -l) processes  link $link"
    done
}

down() { # also what is left where `up` failed or $BED was deleted
    local namespace
    for namespace in $(ip netns list | awk '{print $1}' | grep -xE "$NAME(-[0-9]+)?"); do
        [[ $namespace == "$NAME" ]] || kill_node "${namespace#"$NAME-"}"
        ip netns delete "$namespace"
    done
    [[ ! -e $BED ]] || [[ -f $BED/token ]] || rmdir "$BED" || fail "$BED is no test bed; remove it by hand"
    rm -rf "$BED"
}

command=${1:-help}
shift || true
case $command in
up | down | help | -h | --help) ;;
*) check_is_up ;;
esac
case $command in
up) up "$@" ;;
status) status ;;
add-node) start_worker $(($(nodes | tail -n 1) + 1)) ;;
kill-node)
    check_node "$@"
    kill_node "$1"
    ;;
cut-link | heal-link)
    check_node "$@"
    ip -n "$NAME" link set "port$1" "$([[ $command == cut-link ]] && echo down || echo up)"
    ;;
run)
    [[ ${1:-} != -- ]] || shift
    exec ip netns exec "$NAME" env "${SETTINGS[@]}" PYTHONPATH="$ROOT" RAY_API_SERVER_ADDRESS="http://$(address_of 0):8265" "$@"
    ;;
down) down ;;
*) sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
esac
