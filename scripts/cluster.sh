#!/usr/bin/env bash
# A sample cluster on this machine: three nodes and a mounted directory.
#
#   scripts/cluster.sh up [--data DIR] [--mount DIR] [--nodes 1|3|5|7]   build, start, mount; again: start stopped nodes
#   scripts/cluster.sh status                                            role and state of each node
#   scripts/cluster.sh kill N | start N                                  kill -9 node N; start it again
#   scripts/cluster.sh down [--keep]                                     stop and remove everything (--keep: not the data)
#
# QUORUMFS_STATE (default /tmp/quorumfs) is the folder of data, logs and mount point unless options set others;
# QUORUMFS_GRPC_PORT (3030) and QUORUMFS_HTTP_PORT (8081) are the first node's ports.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-$PWD/target}/release
state=${QUORUMFS_STATE:-/tmp/quorumfs}
settings=$state/cluster.env

fail() { echo "cluster.sh: $*" >&2; exit 1; }
usage() { sed -n '2,11s/^# \{0,1\}//p' "scripts/cluster.sh" >&2; exit 2; }
grpc() { echo "127.0.0.1:$((grpc_port + $1 - 1))"; }
http() { echo "127.0.0.1:$((http_port + $1 - 1))"; }
slots() { seq 1 "$nodes"; }
members() { slots | while read -r n; do grpc "$n"; done | paste -sd, -; }
# The process id of node $1, if it runs: an id left by an earlier boot may belong to another program.
pid_of() {
  local pid; pid=$(cat "$data/node-$1.pid" 2>/dev/null) || return 1
  { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -qF -- "$data/node-$1 " && echo "$pid"
}
# The process ids of the mount.
mount_pids() { pgrep -f "^[^ ]*quorumfs-mount .* $mount( |\$)" || true; }
# Whether a QuorumFS is mounted at $mount. Reads the table, because an access to the mount would wait for a quorum.
mounted() { local at=${mount//\\/\\134}; at=${at// /\\040}; grep -qF -- " $at fuse.quorumfs " /proc/mounts; }
field() { curl -s -m 2 "http://$(http "$1")/status" | tr -d ' \n' | sed -n "s/.*\"$2\":\"\{0,1\}\([^\",}]*\).*/\1/p"; }
load() { [ -f "$settings" ] || fail "no sample cluster is running; start one with scripts/cluster.sh up"; . "$settings"; }
node_number() { [[ ${1:-} =~ ^[1-9]$ ]] && [ "$1" -le "$nodes" ] || fail "give the number of a node, 1 to $nodes"; }
# Installs the package $2 if the command $1 is missing.
need() {
  command -v "$1" >/dev/null && return
  command -v apt-get >/dev/null || fail "the command $1 is missing and apt-get too; install $1"
  echo "installing $2 …"; { apt-get update -qq && apt-get install -y -qq "$2"; } >/dev/null
}

start_node() {
  pid_of "$1" >/dev/null && { echo "node $1 is already running"; return; }
  setsid "$bin/quorumfs-node" --slot "$1" --members "$(members)" --http "$(http "$1")" --data "$data/node-$1" \
    </dev/null >>"$data/node-$1.log" 2>&1 &
  echo $! >"$data/node-$1.pid"
}
wait_writable() {
  for _ in $(seq 300); do
    for n in $(slots); do
      [ "$(field "$n" writable)" = true ] && return
      pid_of "$n" >/dev/null || { tail -n 5 "$data/node-$n.log" >&2; fail "node $n has ended; see its log $data/node-$n.log"; }
    done
    sleep 0.1
  done
  fail "no leader after 30 s; see the logs $data/node-*.log"
}

up() {
  local given_data='' given_mount='' given_nodes=''
  while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in --data) given_data=$2 ;; --mount) given_mount=$2 ;; --nodes) given_nodes=$2 ;; *) usage ;; esac
    shift 2
  done
  [ "$(id -u)" = 0 ] || fail "mounting needs root: sudo scripts/cluster.sh up"
  command -v cargo >/dev/null || fail "cargo is missing: https://rustup.rs"
  need curl curl; need cc gcc; need pgrep procps
  [ -e /dev/fuse ] || modprobe fuse || fail "/dev/fuse is missing and the kernel has no module for it"
  if [ ! -f "$settings" ]; then
    nodes=${given_nodes:-3}
    [[ $nodes =~ ^[1357]$ ]] || fail "--nodes takes 1, 3, 5 or 7, not $nodes"
    data=$(cd "$called_from" && realpath -m "${given_data:-$state/data}")
    mount=$(cd "$called_from" && realpath -m "${given_mount:-$state/mnt}") made=()
    for folder in "$state" "$data" "$mount"; do [ -d "$folder" ] || { mkdir -p "$folder"; made=("$folder" "${made[@]}"); }; done
    grpc_port=${QUORUMFS_GRPC_PORT:-3030} http_port=${QUORUMFS_HTTP_PORT:-8081}
    declare -p data mount made nodes grpc_port http_port | sed 's/^declare/declare -g/' >"$settings"
  elif [ -n "$given_data$given_mount$given_nodes" ]; then
    fail "a sample cluster is already running; options need scripts/cluster.sh down first"
  fi
  load
  # The whole workspace, as in test.sh: for less, cargo builds what the programs depend on with other features once more.
  quiet=--quiet; [ ! -t 2 ] || quiet=
  echo "building the two programs (the first time some five minutes) …"; cargo build --release $quiet --workspace --bins
  for n in $(slots); do pid_of "$n" >/dev/null || start_node "$n"; done
  wait_writable
  { mounted && [ -n "$(mount_pids)" ]; } || "$bin/quorumfs-mount" "$(members)" "$mount" --log-file "$data/mount.log"
  cat <<END
The cluster of $nodes nodes is mounted at $mount

  echo hello >$mount/file          # an ordinary file
  curl http://$(http 1)/upload/file  # the same file over HTTP, from any node
  scripts/cluster.sh status          # shows the leader
  scripts/cluster.sh kill N          # kill -9 of node N, for example the leader; work in $mount continues
  scripts/cluster.sh start N         # starts it again; it catches up automatically
  scripts/cluster.sh down            # stops and removes everything

Data and logs: $data/node-*   gRPC: $(members)   HTTP: $(http 1) to $(http "$nodes")
END
}

status() {
  load
  for n in $(slots); do
    if ! pid_of "$n" >/dev/null; then echo "node $n  down"; continue; fi
    echo "node $n  $(field "$n" role)  writable: $(field "$n" writable)  applied: $(field "$n" applied_index)  http://$(http "$n")/status"
  done
  if ! mounted; then echo "not mounted at $mount"
  elif [ -n "$(mount_pids)" ]; then echo "mounted at $mount"
  else echo "mounted at $mount, but the mount process has ended: run scripts/cluster.sh up"; fi
}

down() {
  local keep=${1:-}; [ -z "$keep" ] || [ "$keep" = --keep ] || usage
  if [ ! -f "$settings" ]; then echo "no sample cluster is running"; return; fi
  load
  if mounted; then
    # Without a quorum umount waits for one; while the mount's process is stopped, umount cannot even be killed.
    umount "$mount" & local umount_pid=$!
    for _ in $(seq 200); do mounted && kill -0 "$umount_pid" 2>/dev/null || break; sleep 0.1; done
    if mounted; then
      kill -9 "$umount_pid" 2>/dev/null || true
      echo "$mount is in use or cannot be flushed; it is detached" >&2; umount -l "$mount"
    fi
  fi
  for _ in $(seq 50); do [ -z "$(mount_pids)" ] && break; sleep 0.1; done
  for pid in $(mount_pids); do kill -9 "$pid" || true; done
  for n in $(slots); do if pid=$(pid_of "$n"); then kill "$pid" || true; fi; done
  for n in $(slots); do
    for _ in $(seq 100); do pid_of "$n" >/dev/null || break; sleep 0.1; done
    if pid=$(pid_of "$n"); then kill -9 "$pid" || true; fi
    rm -f "$data/node-$n.pid"
    [ -n "$keep" ] || rm -rf "${data:?}/node-$n" "$data/node-$n.log"
  done
  rm -f "$settings" "$data/mount.log"
  rmdir "${made[@]}" 2>/dev/null || true # Folders that are not empty have files of others.
  [ -n "$keep" ] && echo "stopped; the data is still in $data" || echo "stopped and removed"
}

case ${1:-} in
  up) shift; up "$@" ;;
  status) status ;;
  kill) load; node_number "${2:-}"; pid=$(pid_of "$2") || fail "node $2 is not running"; kill -9 "$pid"; echo "node $2 killed" ;;
  start) load; node_number "${2:-}"; start_node "$2"; echo "node $2 started" ;;
  down) shift; down "$@" ;;
  *) usage ;;
esac
