# The common commands; `just` lists them (https://just.systems).

_default:
    @just --list

# Start a cluster on this machine and mount it
up:
    scripts/cluster.sh up

# Stop it
down:
    scripts/cluster.sh down

# Format, lints, documentation, unit tests
quick:
    scripts/test.sh quick

# Licences, sources, versions and known faults of the dependencies (needs the network)
deny:
    cargo deny check

# Every test, or the whole-cluster tests whose names contain FILTER
test FILTER="":
    scripts/test.sh {{ if FILTER == "" { "all" } else { "cluster " + FILTER } }}

# Measure a fresh cluster
bench OUT="bench.json":
    scripts/bench.sh {{OUT}}
