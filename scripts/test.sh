#!/usr/bin/env bash
# Every check of the project: formatting, lints, documentation, unit tests, then whole clusters with real processes,
# mounts and faults.
#
#   scripts/test.sh             all checks
#   scripts/test.sh quick       without whole clusters
#   scripts/test.sh cluster [FILTER]   only whole clusters, or only the tests whose names contain FILTER
#
# QUORUMFS_TEST_SCALE=1 runs the heavy tests at the promised sizes (4 GiB, 100,000 entries); the default is a quarter.
# The logs of a failed test are kept in target/test-logs.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-all}
case $part in all | quick | cluster) ;; *) sed -n '2,11s/^# \{0,1\}//p' scripts/test.sh >&2; exit 2 ;; esac
target=${CARGO_TARGET_DIR:-$PWD/target}
step() { printf '\n=== %s (%s)\n' "$*" "$(date +%T)"; }

# Installs missing commands that the tests use; each is listed with its Debian package.
install_missing() {
  local missing=() entry
  for entry in cc:gcc rsync:rsync strace:strace setfattr:attr curl:curl tar:tar cmp:diffutils setpriv:util-linux python3:python3 chronyd:chrony faketime:faketime; do
    command -v "${entry%%:*}" >/dev/null || missing+=("${entry##*:}")
  done
  [ ${#missing[@]} = 0 ] && return
  command -v apt-get >/dev/null || { echo "test.sh: apt-get is missing; install these packages first: ${missing[*]}" >&2; exit 1; }
  step "installing ${missing[*]}"
  { apt-get update -qq && apt-get install -y -qq "${missing[@]}"; } >/dev/null
}
# Installs the conformance suites from crates.io and PyPI, once.
install_tools() {
  local tool
  if ! PATH=$PATH:$target/tools/bin command -v promtool >/dev/null; then
    step "installing promtool"
    # Only the program of Debian's package, so that no service is started.
    (mkdir -p "$target/tools/bin" && cd "$target/tools" &&
      { apt-get download -qq prometheus >/dev/null 2>&1 || { apt-get update -qq && apt-get download -qq prometheus; } >/dev/null; } &&
      dpkg-deb --fsys-tarfile prometheus_*.deb | tar x --strip-components=3 -C bin ./usr/bin/promtool && rm prometheus_*.deb)
  fi
  if ! PATH=$PATH:$target/tools/bin command -v schemathesis >/dev/null; then
    step "installing schemathesis"
    python3 -c 'import ensurepip' 2>/dev/null || apt-get install -y -qq python3-venv >/dev/null
    python3 -m venv "$target/tools/python"
    "$target/tools/python/bin/pip" install --quiet --disable-pip-version-check schemathesis==4.32.5
    mkdir -p "$target/tools/bin"
    ln -sf ../python/bin/schemathesis "$target/tools/bin/schemathesis"
  fi
  for tool in pjdfstest fsx; do
    PATH=$PATH:$target/tools/bin:/tmp/peers/cargo/bin command -v "$tool" >/dev/null && continue
    step "installing $tool"
    cargo install --quiet --locked --root "$target/tools" "$tool"
  done
}

if ! cargo nextest --version >/dev/null 2>&1; then
  step "installing cargo-nextest"
  # Without optimization, because it only starts the tests.
  [ -x "$target/tools/bin/cargo-nextest" ] || cargo install --quiet --locked --debug --root "$target/tools" cargo-nextest
  export PATH=$PATH:$target/tools/bin
fi
if [ "$part" != cluster ]; then
  step "cargo fmt"; cargo fmt --all --check
  step "cargo clippy"; cargo clippy --quiet --workspace --all-targets -- -D warnings
  step "cargo deny"
  if cargo deny --version >/dev/null 2>&1; then
    # Advisories are not asked for: they need the network, and a new one says nothing about this change.
    cargo deny --log-level error check --hide-inclusion-graph bans licenses sources
  else
    echo "skipped; \`cargo install --locked cargo-deny\` brings the command"
  fi
  step "cargo doc"; RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --document-private-items
  step "building"; cargo nextest run --cargo-quiet --workspace --no-run
  step "unit tests"; cargo nextest run --cargo-quiet --workspace -E 'not binary(cluster)'
fi
if [ "$part" != quick ]; then
  [ "$(id -u)" = 0 ] || { echo "test.sh: tests of whole clusters need root to mount: sudo scripts/test.sh" >&2; exit 1; }
  install_missing
  install_tools
  step "building the programs"; cargo build --quiet --workspace --bins
  export QUORUMFS_BIN_DIR=$target/debug QUORUMFS_TEST_TOOLS=required
  step "whole clusters"
  # Always the whole workspace: for fewer packages cargo would build the dependencies again with other features.
  # The tests limit their own concurrency (tests/src/sandbox.rs): more threads would only wait.
  filter='binary(cluster)'
  [ -z "${2:-}" ] || filter="$filter and test($2)"
  cargo nextest run --cargo-quiet --workspace -E "$filter" --test-threads 6
fi
step "all passed"
