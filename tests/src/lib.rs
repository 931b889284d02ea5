//! The harness of the whole-cluster tests: real node processes, real FUSE mounts, real disks, real faults.
//!
//! A test opens a [`Sandbox`] (private folder, private ports, a share of the machine), starts a [`Cluster`] in it,
//! mounts it, does what a user would do, breaks what may break, and looks at what is left:
//!
//! ```no_run
//! use quorumfs_tests::{Cluster, Sandbox};
//! let sandbox = Sandbox::light("example");
//! let cluster = Cluster::start(&sandbox);
//! let mount = cluster.mount();
//! std::fs::create_dir(mount.path("directory")).unwrap();
//! cluster.kill(cluster.leader());
//! assert!(mount.path("directory").is_dir());
//! ```
//!
//! Nothing is left behind, whichever way a test ends: dropping ends processes by their ids, and a guard process
//! (see [`sandbox`]) does the same when the test process itself is killed. When a test fails, the logs of all its
//! processes are printed and kept in `target/test-logs/NAME`.
//!
//! What can be set from outside:
//!
//! | variable | meaning |
//! |---|---|
//! | `QUORUMFS_BIN_DIR` | where `quorumfs-node` and `quorumfs-mount` are; unset: they are built first |
//! | `QUORUMFS_TEST_DIR` | where sandboxes are made; default `/tmp` |
//! | `QUORUMFS_TEST_SCALE` | size of the heavy tests, 1 = as promised (4 GiB, 100,000 entries); default 0.25 |
//! | `QUORUMFS_TEST_SEED` | replays the random choices of a run (each run prints its seed) |
//! | `QUORUMFS_TEST_LOG` | log level of the processes; default `info,openraft=warn` |
//! | `QUORUMFS_TEST_TOOLS` | `required`: a missing pjdfstest or fsx fails the conformance tests |
//! | `QUORUMFS_TEST_PAUSE_MAX_MS` | longest pause that a failover may cause; default 3000 |

pub mod cluster;
pub mod damage;
pub mod environment;
pub mod healing;
pub mod http;
pub mod mount;
pub mod posix;
pub mod prober;
pub mod process;
pub mod proxy;
pub mod random;
pub mod sandbox;
pub mod shell;
pub mod trace;
pub mod tree;
pub mod wire_client;

pub use cluster::{Cluster, RecoveryStatus, Status};
pub use environment::{scaled, wait_until};
pub use mount::Mount;
pub use random::Random;
pub use sandbox::Sandbox;
pub use shell::shell;

#[doc = include_str!("../PROMISES.md")]
pub mod promises {}
