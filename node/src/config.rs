//! The settings of a node. Flags override the environment, which overrides a TOML file.
//!
//! All settings are checked here, once, with an error that names the setting and its line in the file; a [`Config`] is
//! valid. `clap` reads flags and environment, `toml` reads the file; only [`Settings::or`] is written here: `figment`
//! forgets the lines of the file, and `confique` replaces that one function by a second version of `toml` and attributes
//! around the attributes of each flag.
//!
//! This module does not know the effects of the settings.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Parser;
use serde::Deserialize;

use crate::transport::{ClusterSecret, TlsFiles};

/// Highest slot number, and so the largest number of configured members.
const SLOT_MAX: u16 = 255;
/// Default NTP server.
const NTP_DEFAULT: &str = "pool.ntp.org";
const NTP_PORT: u16 = 123;
/// Most NTP servers.
const NTP_SERVERS_MAX: usize = 8;
/// Default log filter. It excludes the steps of elections, and the ten heartbeats a second that a dead node misses: the
/// health monitor reports that once.
const LOG_DEFAULT: &str = "info,openraft=warn,openraft::core::heartbeat=error";
const DAY_S: u64 = 86_400;
const YEAR_S: u64 = 365 * DAY_S;

/// A setting that is a number from `MIN` to `MAX`, which is checked where it is read.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "u64")]
struct Number<const DEFAULT: u64, const MIN: u64, const MAX: u64>(u64);

impl<const DEFAULT: u64, const MIN: u64, const MAX: u64> Number<DEFAULT, MIN, MAX> {
    /// The number, or the default where none was given.
    fn of(given: Option<Self>) -> u64 {
        given.map_or(DEFAULT, |Number(value)| value)
    }
}

impl<const DEFAULT: u64, const MIN: u64, const MAX: u64> TryFrom<u64> for Number<DEFAULT, MIN, MAX> {
    type Error = String;

    fn try_from(value: u64) -> Result<Self, String> {
        match (MIN..=MAX).contains(&value) {
            true => Ok(Number(value)),
            false => Err(format!("{value} is not from {MIN} to {MAX}")),
        }
    }
}

impl<const DEFAULT: u64, const MIN: u64, const MAX: u64> FromStr for Number<DEFAULT, MIN, MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let value = text.parse::<u64>();
        value
            .map_err(|_| format!("not a number from {MIN} to {MAX}"))?
            .try_into()
    }
}

/// One node of a QuorumFS cluster: keeps a copy of every file, takes part in every decision.
///
/// Start one on each machine with the same --members, and with its own --slot and --data. The nodes create the cluster
/// once all of them are up and empty.
#[derive(Debug, Default, Parser, Deserialize)]
#[command(name = "quorumfs-node", version, max_term_width = 110)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// Slot of this node: its place in --members, counted from 1
    #[arg(long, env = "QUORUMFS_SLOT", value_name = "N")]
    slot: Option<u16>,
    /// The gRPC address of every member in the order of their slots (1, 3, 5 or 7 of them)
    #[arg(
        long,
        env = "QUORUMFS_MEMBERS",
        value_name = "HOST:PORT,…",
        value_delimiter = ','
    )]
    members: Option<Vec<String>>,
    /// Join the running cluster to which a node at any of these gRPC addresses belongs (instead of --members)
    #[arg(
        long,
        env = "QUORUMFS_JOIN",
        value_name = "HOST:PORT,…",
        value_delimiter = ','
    )]
    join: Option<Vec<String>>,
    /// gRPC address of this node, as other nodes reach it (with --join; else its entry in --members)
    #[arg(long, env = "QUORUMFS_GRPC", value_name = "HOST:PORT")]
    grpc: Option<String>,
    /// Folder for this node's log, metadata and content; created if it does not exist
    #[arg(long, env = "QUORUMFS_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// HTTP address of this node, as clients reach it
    #[arg(long, env = "QUORUMFS_HTTP", value_name = "HOST:PORT")]
    http: Option<String>,
    /// Address to listen on for gRPC, if it differs from this node's entry in --members
    #[arg(long, env = "QUORUMFS_LISTEN_GRPC", value_name = "HOST:PORT")]
    listen_grpc: Option<String>,
    /// Address to listen on for HTTP, if it differs from --http
    #[arg(long, env = "QUORUMFS_LISTEN_HTTP", value_name = "HOST:PORT")]
    listen_http: Option<String>,
    /// PEM file of the authority that signs all nodes' and clients' certificates
    #[arg(long, env = "QUORUMFS_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// PEM file of this node's certificate
    #[arg(long, env = "QUORUMFS_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(long, env = "QUORUMFS_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Serve other machines without TLS: anyone who reaches the ports can read and change every file
    #[arg(long, env = "QUORUMFS_INSECURE_PLAINTEXT", num_args = 0..=1, default_missing_value = "true")]
    insecure_plaintext: Option<bool>,
    /// Log level: error, warn, info, debug, trace, or a filter such as `info,quorumfs_node::consensus=debug` (default:
    /// info, and only problems of the consensus library)
    #[arg(long, env = "QUORUMFS_LOG", value_name = "LEVEL")]
    log: Option<String>,
    /// Longest time that a REST request waits for a quorum before it is answered with 503, in milliseconds
    #[arg(long, env = "QUORUMFS_REQUEST_TIMEOUT_MS", value_name = "MS")]
    request_timeout_ms: Option<Number<10_000, 100, 600_000>>,
    /// Most content that is read again and verified per second, in MiB
    #[arg(long, env = "QUORUMFS_SCRUB_MIB_PER_S", value_name = "MIB")]
    // The default reads a 1 TiB disk within a day, for a thirtieth of a core.
    scrub_mib_per_s: Option<Number<16, 1, 100_000>>,
    /// Time between the starts of two passes of verification, in seconds
    #[arg(long, env = "QUORUMFS_SCRUB_INTERVAL_S", value_name = "S")]
    scrub_interval_s: Option<Number<60, 1, DAY_S>>,
    /// Interval of the search for content that no file refers to any more, in seconds
    #[arg(long, env = "QUORUMFS_SWEEP_INTERVAL_S", value_name = "S")]
    sweep_interval_s: Option<Number<60, 1, DAY_S>>,
    /// Interval of the comparison of all nodes' metadata, in seconds
    #[arg(long, env = "QUORUMFS_AUDIT_INTERVAL_S", value_name = "S")]
    // An audit reads all metadata.
    audit_interval_s: Option<Number<21_600, 1, YEAR_S>>,
    /// Most missing content that is fetched from other nodes per second, in MiB
    #[arg(long, env = "QUORUMFS_RECOVERY_MIB_PER_S", value_name = "MIB")]
    // The default is what a gigabit carries.
    recovery_mib_per_s: Option<Number<100, 1, 100_000>>,
    /// NTP servers for the comparison of this node's clock, default port 123 (default: pool.ntp.org); `none` disables
    /// it
    #[arg(
        long,
        env = "QUORUMFS_NTP",
        value_name = "HOST[:PORT],…",
        value_delimiter = ','
    )]
    ntp: Option<Vec<String>>,
    /// Interval of the NTP queries, in milliseconds (default: 64000)
    #[arg(long, env = "QUORUMFS_NTP_INTERVAL_MS", value_name = "MS", hide = true)]
    ntp_interval_ms: Option<Number<64_000, 100, 600_000>>,
    /// Interval of the health probes of each other node, in milliseconds (default: 5000)
    #[arg(long, env = "QUORUMFS_PROBE_INTERVAL_MS", value_name = "MS")]
    probe_interval_ms: Option<Number<5_000, 100, 600_000>>,
    /// File with the cluster's secret, the same for every node; it is required for /replicate and /delete-content
    #[arg(long, env = "QUORUMFS_SECRET_FILE", value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Interval of the summary of operations in the log, in seconds; no line is logged if nothing happened
    #[arg(long, env = "QUORUMFS_METRICS_SUMMARY_S", value_name = "S")]
    metrics_summary_s: Option<Number<300, 1, DAY_S>>,
    /// TOML file with any of these settings (the same names, without the leading dashes)
    #[arg(long, env = "QUORUMFS_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
}

/// An invalid setting.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A required setting is missing.
    #[error("--{0} is not set; give it as a flag, as {1}, or in the file named by --config")]
    Missing(&'static str, &'static str),
    /// A setting has an invalid value.
    #[error("--{field}: {reason}")]
    Invalid {
        /// The flag's name.
        field: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The file cannot be read or parsed.
    #[error("--config {file}: {reason}")]
    File {
        /// Path of the file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The validated settings of a node.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node's slot, from 1.
    pub slot: u16,
    /// gRPC addresses of other nodes: all members in the order of their slots, or any members if [`Config::founds`] is
    /// false.
    pub members: Vec<String>,
    /// Whether this node is one of those that create the cluster; else it joins a running one.
    pub founds: bool,
    /// This node's gRPC address as others reach it.
    pub grpc: String,
    /// The data folder.
    pub data: PathBuf,
    /// This node's HTTP address as others reach it.
    pub http: String,
    /// Address to listen on for gRPC.
    pub listen_grpc: SocketAddr,
    /// Address to listen on for HTTP.
    pub listen_http: SocketAddr,
    /// Files for mutual TLS on gRPC.
    pub tls: Option<TlsFiles>,
    /// The log filter.
    pub log: String,
    /// Longest time that a REST request waits for a quorum, in milliseconds.
    pub request_timeout_ms: u64,
    /// Most bytes verified per second.
    pub scrub_bytes_per_s: u64,
    /// Time between the starts of two passes of verification, in seconds.
    pub scrub_interval_s: u64,
    /// Interval of the search for dead content, in seconds.
    pub sweep_interval_s: u64,
    /// Interval of the comparison of metadata, in seconds.
    pub audit_interval_s: u64,
    /// Most bytes of missing content fetched per second.
    pub recovery_bytes_per_s: u64,
    /// NTP servers, `HOST:PORT`; empty if none is to be asked.
    pub ntp: Vec<String>,
    /// Interval of the NTP queries, in milliseconds.
    pub ntp_interval_ms: u64,
    /// Interval of the health probes, in milliseconds.
    pub probe_interval_ms: u64,
    /// The secret of the internal endpoints; without it they are closed.
    pub secret: Option<ClusterSecret>,
    /// Interval of the summary in the log, in seconds.
    pub metrics_summary_s: u64,
}

/// Makes one node that is down continue alone, as a new cluster, when a majority is lost for good.
///
/// This is the last resort: changes that other nodes acknowledged and this one does not have are lost. Pass the flags
/// with which the node is started. Without --accept-loss nothing is changed: examine each remaining node this way, and
/// choose the one with the newest last entry. The command refuses if a majority is alive.
#[derive(Debug, Parser)]
#[command(name = "quorumfs-node recover", version, max_term_width = 110)]
pub struct RecoverSettings {
    /// Continue alone, and accept that changes may be missing
    #[arg(long)]
    pub accept_loss: bool,
    /// The settings with which the node is started
    #[command(flatten)]
    pub node: Settings,
}

impl Settings {
    /// Adds the file's settings where neither a flag nor the environment gave a value, and checks all settings.
    ///
    /// # Errors
    /// [`ConfigError`] for the first invalid setting.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let settings = match &self.config {
            None => self,
            Some(path) => {
                let fail = |reason: String| ConfigError::File {
                    file: path.clone(),
                    reason,
                };
                let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
                let file: Settings = toml::from_str(&text).map_err(|e| fail(e.to_string()))?;
                self.or(file)
            }
        };
        settings.validate()
    }

    /// What is set here, else what `file` sets.
    fn or(self, file: Settings) -> Settings {
        macro_rules! each {
            ($($field:ident)*) => {
                Settings { $($field: self.$field.or(file.$field),)* config: self.config }
            };
        }
        each!(
            slot members join grpc data http listen_grpc listen_http tls_ca tls_cert tls_key
            insecure_plaintext log request_timeout_ms scrub_mib_per_s scrub_interval_s sweep_interval_s
            audit_interval_s recovery_mib_per_s ntp ntp_interval_ms probe_interval_ms secret_file
            metrics_summary_s
        )
    }

    fn validate(self) -> Result<Config, ConfigError> {
        let invalid = |field, reason: String| ConfigError::Invalid { field, reason };
        let slot = self.slot.ok_or(ConfigError::Missing("slot", "QUORUMFS_SLOT"))?;
        let (members, grpc, founds) = match self.join {
            Some(join) => {
                let grpc = self.grpc.ok_or(ConfigError::Missing("grpc", "QUORUMFS_GRPC"))?;
                check_address("grpc", &grpc)?;
                (joined("join", join)?, grpc, false)
            }
            None => {
                let members = self
                    .members
                    .ok_or(ConfigError::Missing("members", "QUORUMFS_MEMBERS"))?;
                let (members, grpc) = founding(members, slot)?;
                (members, self.grpc.unwrap_or(grpc), true)
            }
        };
        if slot == 0 || slot > SLOT_MAX {
            return Err(invalid("slot", format!("{slot} is not from 1 to {SLOT_MAX}")));
        }
        let data = self.data.ok_or(ConfigError::Missing("data", "QUORUMFS_DATA"))?;
        let http = self.http.ok_or(ConfigError::Missing("http", "QUORUMFS_HTTP"))?;
        check_address("http", &http)?;
        let listen_grpc = match &self.listen_grpc {
            Some(address) => listen_address("listen-grpc", address)?,
            None => listen_address("grpc", &grpc)?,
        };
        let listen_http = match &self.listen_http {
            Some(address) => listen_address("listen-http", address)?,
            None => listen_address("http", &http)?,
        };
        let tls = match (self.tls_ca, self.tls_cert, self.tls_key) {
            (Some(authority), Some(certificate), Some(key)) => Some(TlsFiles {
                authority,
                certificate,
                key,
            }),
            (None, None, None) => None,
            _ => {
                return Err(invalid(
                    "tls-ca",
                    "--tls-ca, --tls-cert and --tls-key go together; give all three".into(),
                ));
            }
        };
        let plaintext_allowed = self.insecure_plaintext.unwrap_or(false);
        for (field, address, protected) in [
            ("listen-grpc", listen_grpc, tls.is_some()),
            ("listen-http", listen_http, false),
        ] {
            if !address.ip().is_loopback() && !protected && !plaintext_allowed {
                let reason = format!(
                    "{address} can be reached from other machines but is not protected by TLS; listen on 127.0.0.1, \
                     or say --insecure-plaintext to serve it unprotected"
                );
                return Err(invalid(field, reason));
            }
        }
        let ntp = ntp_servers(self.ntp.unwrap_or_else(|| vec![NTP_DEFAULT.to_string()]))?;
        let secret = self.secret_file.as_deref().map(read_secret).transpose()?;
        let log = self.log.unwrap_or_else(|| LOG_DEFAULT.to_string());
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&log) {
            return Err(invalid(
                "log",
                format!("{log:?} is not a level or filter: {error}"),
            ));
        }
        Ok(Config {
            slot,
            members,
            founds,
            grpc,
            data,
            http,
            listen_grpc,
            listen_http,
            tls,
            log,
            request_timeout_ms: Number::of(self.request_timeout_ms),
            scrub_bytes_per_s: Number::of(self.scrub_mib_per_s) << 20,
            scrub_interval_s: Number::of(self.scrub_interval_s),
            sweep_interval_s: Number::of(self.sweep_interval_s),
            audit_interval_s: Number::of(self.audit_interval_s),
            recovery_bytes_per_s: Number::of(self.recovery_mib_per_s) << 20,
            ntp,
            ntp_interval_ms: Number::of(self.ntp_interval_ms),
            probe_interval_ms: Number::of(self.probe_interval_ms),
            secret,
            metrics_summary_s: Number::of(self.metrics_summary_s),
        })
    }
}

/// Checks a list of addresses, each of which may occur once.
fn joined(field: &'static str, addresses: Vec<String>) -> Result<Vec<String>, ConfigError> {
    let addresses: Vec<String> = addresses.into_iter().map(|m| m.trim().to_string()).collect();
    for (at, address) in addresses.iter().enumerate() {
        check_address(field, address)?;
        if addresses[..at].contains(address) {
            let reason = format!("{address} is named twice; each member needs its own address");
            return Err(ConfigError::Invalid { field, reason });
        }
    }
    Ok(addresses)
}

/// Checks the members of a new cluster; returns them and this node's address.
fn founding(members: Vec<String>, slot: u16) -> Result<(Vec<String>, String), ConfigError> {
    let invalid = |field, reason: String| Err(ConfigError::Invalid { field, reason });
    let members = joined("members", members)?;
    let count = members.len();
    if count.is_multiple_of(2) || count > usize::from(SLOT_MAX) {
        let reason = format!("{count} addresses; a cluster begins with 1, 3, 5 or 7 members");
        return invalid("members", reason);
    }
    let own = usize::from(slot).checked_sub(1).and_then(|at| members.get(at));
    let Some(own) = own.cloned() else {
        let reason = format!("{slot} is not a place in --members; give a number from 1 to {count}");
        return invalid("slot", reason);
    };
    Ok((members, own))
}

/// Returns the servers as `HOST:PORT`; none for `none`.
fn ntp_servers(given: Vec<String>) -> Result<Vec<String>, ConfigError> {
    let invalid = |reason: String| ConfigError::Invalid { field: "ntp", reason };
    let given: Vec<&str> = given.iter().map(|server| server.trim()).collect();
    if given == ["none"] {
        return Ok(Vec::new());
    }
    if given.is_empty() || given.len() > NTP_SERVERS_MAX {
        let reason = format!("{} servers; give 1 to {NTP_SERVERS_MAX}, or `none`", given.len());
        return Err(invalid(reason));
    }
    let with_port = |server: &str| {
        // An IPv6 address contains colons: it has a port only after brackets.
        let bare_ipv6 = server.parse::<std::net::Ipv6Addr>().is_ok();
        let whole = if bare_ipv6 {
            format!("[{server}]:{NTP_PORT}")
        } else if server.contains(':') && !server.ends_with(']') {
            server.to_string()
        } else {
            format!("{server}:{NTP_PORT}")
        };
        let reason = || {
            invalid(format!(
                "{server:?} is not HOST or HOST:PORT, as in pool.ntp.org:123"
            ))
        };
        check_address("ntp", &whole).map_err(|_| reason())?;
        Ok(whole)
    };
    given.into_iter().map(with_port).collect()
}

/// Reads the cluster's secret from a file.
fn read_secret(path: &Path) -> Result<ClusterSecret, ConfigError> {
    let fail = |reason: String| ConfigError::Invalid {
        field: "secret-file",
        reason,
    };
    let content = std::fs::read(path).map_err(|e| fail(format!("{}: {e}", path.display())))?;
    ClusterSecret::new(&content).ok_or_else(|| {
        fail(format!(
            "{} has less than {} bytes; `openssl rand -hex 32` makes a good secret",
            path.display(),
            ClusterSecret::BYTES_MIN
        ))
    })
}

/// Whether `address` has the form `HOST:PORT`.
pub fn is_host_and_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0) && !host.contains(['/', ' ', '@'])
    })
}

fn check_address(field: &'static str, address: &str) -> Result<(), ConfigError> {
    if is_host_and_port(address) {
        return Ok(());
    }
    let reason = format!("{address:?} is not HOST:PORT, as in 127.0.0.1:3030");
    Err(ConfigError::Invalid { field, reason })
}

fn listen_address(field: &'static str, address: &str) -> Result<SocketAddr, ConfigError> {
    check_address(field, address)?;
    let fail = |reason: String| ConfigError::Invalid { field, reason };
    let mut found = address
        .to_socket_addrs()
        .map_err(|e| fail(format!("{address}: {e}")))?;
    let first = found
        .next()
        .ok_or_else(|| fail(format!("{address} names no address")))?;
    // A name such as `localhost` may stand for ::1 and 127.0.0.1; IPv4 is more certain to work between members.
    Ok(found
        .find(|a| matches!(a.ip(), IpAddr::V4(_)))
        .filter(|_| first.is_ipv6())
        .unwrap_or(first))
}

#[cfg(test)]
mod tests;
