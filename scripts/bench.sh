#!/usr/bin/env bash
# Measures a fresh cluster of three nodes on this machine, release build, through its mount.
#
#   scripts/bench.sh [OUT.json] [ARGUMENTS OF tests/bench/fsbench, such as --rows create_per_s,untar_s]
#
# All three copies, the daemons, the mount and the benchmark share this machine: the figures compare builds and systems
# measured in the same way; three machines would give other figures. Run it on an idle machine, at least twice.
set -euo pipefail
cd "$(dirname "$0")/.."
out=/dev/stdout
if [ $# -gt 0 ] && [[ $1 != --* ]]; then out=$(realpath "$1"); shift; fi
[ "$(id -u)" = 0 ] || { echo "bench.sh: mounting and dropping caches need root: sudo scripts/bench.sh" >&2; exit 1; }
for entry in fio:fio git:git python3:python3; do
  command -v "${entry%%:*}" >/dev/null || { apt-get update -qq; apt-get install -y -qq "${entry##*:}"; } >/dev/null
done
# Ports and folder of its own, so that a running sample cluster is not affected.
QUORUMFS_STATE=$(mktemp -d /tmp/quorumfs-bench.XXXXXX); export QUORUMFS_STATE
export QUORUMFS_GRPC_PORT=4030 QUORUMFS_HTTP_PORT=9081
trap 'scripts/cluster.sh down >&2; rmdir "$QUORUMFS_STATE" 2>/dev/null || true' EXIT
scripts/cluster.sh up >&2
sync; echo 3 >/proc/sys/vm/drop_caches; sleep 2
python3 tests/bench/fsbench "$QUORUMFS_STATE/mnt" "$@" >"$out"
