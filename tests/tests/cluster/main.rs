//! Whole clusters: real processes, mounts, sockets and faults. One binary, so that it is linked once.
//!
//! Each test has a sandbox of its own; tests of a promise begin with its number.

mod audit;
mod bad_disk;
mod bad_input;
mod conformance;
mod health;
mod metrics;
mod mount_program;
mod openapi;
mod p1_durability;
mod p2_p3_content;
mod p4_once;
mod p5_coherence;
mod p6_failover;
mod p6_interrupts;
mod p7_damage;
mod p7_healing;
mod p7_incarnations;
mod p7_membership;
mod p7_placement;
mod p8_bounds;
mod posix_shell;
mod recovery;
mod repair;
mod rest;
mod sessions;
mod sweep;
mod tls;
