//! The settings of a node: flags, then environment, then a TOML file, in that order of strength.
//!
//! Everything is checked here, once, with an error that names the field; what comes out as [`Config`] is valid.
//! Knows nothing of what the settings do.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use clap::Parser;
use serde::Deserialize;

use crate::transport::TlsFiles;

/// Highest slot number, and so the most members ever configured.
const SLOT_MAX: u16 = 255;
/// How often the log sums up what was done, unless told otherwise.
const METRICS_SUMMARY_S: u64 = 300;

/// One node of a QuorumFS cluster: keeps a copy of every file, takes part in every decision.
///
/// Start one on each machine with the same --members and a --slot and --data of its own. The cluster makes itself
/// once all of them are up and empty.
#[derive(Debug, Default, Parser, Deserialize)]
#[command(name = "quorumfs-node", version, max_term_width = 110)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// Which member this node is: its place in --members, counted from 1
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
    /// The folder that holds this node's log, metadata and content; made if it does not exist
    #[arg(long, env = "QUORUMFS_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where this node serves HTTP, as others reach it
    #[arg(long, env = "QUORUMFS_HTTP", value_name = "HOST:PORT")]
    http: Option<String>,
    /// Where to listen for gRPC, if not at this node's entry in --members
    #[arg(long, env = "QUORUMFS_LISTEN_GRPC", value_name = "HOST:PORT")]
    listen_grpc: Option<String>,
    /// Where to listen for HTTP, if not at --http
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
    /// What to log: error, warn, info, debug, trace, or a filter such as `info,quorumfs_node::consensus=debug`
    #[arg(long, env = "QUORUMFS_LOG", value_name = "LEVEL")]
    log: Option<String>,
    /// How long a REST request waits for a quorum before it is answered 503, in milliseconds
    #[arg(long, env = "QUORUMFS_REQUEST_TIMEOUT_MS", value_name = "MS")]
    request_timeout_ms: Option<u64>,
    /// How often a line in the log sums up what was done, where something was, in seconds
    #[arg(long, env = "QUORUMFS_METRICS_SUMMARY_S", value_name = "S")]
    metrics_summary_s: Option<u64>,
    /// A TOML file with any of these settings (the names are the same, without the dashes in front)
    #[arg(long, env = "QUORUMFS_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
}

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Neither flag, environment nor file gave it.
    #[error("--{0} is not set; give it as a flag, as {1}, or in the file named by --config")]
    Missing(&'static str, &'static str),
    /// It was given, but not as it must be.
    #[error("--{field}: {reason}")]
    Invalid {
        /// The flag's name.
        field: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The file could not be read or understood.
    #[error("--config {file}: {reason}")]
    File {
        /// Its path.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Valid settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node's slot, from 1.
    pub slot: u16,
    /// All members' gRPC addresses; slot 1 first.
    pub members: Vec<String>,
    /// The data folder.
    pub data: PathBuf,
    /// This node's HTTP address as others reach it.
    pub http: String,
    /// Where to listen for gRPC.
    pub listen_grpc: SocketAddr,
    /// Where to listen for HTTP.
    pub listen_http: SocketAddr,
    /// Mutual TLS for gRPC.
    pub tls: Option<TlsFiles>,
    /// The log filter.
    pub log: String,
    /// How long a REST request waits for a quorum, in milliseconds.
    pub request_timeout_ms: u64,
    /// How often a line in the log sums up what was done, in seconds.
    pub metrics_summary_s: u64,
}

impl Config {
    /// This node's gRPC address as others reach it.
    pub fn grpc(&self) -> &str {
        &self.members[usize::from(self.slot) - 1]
    }
}

impl Settings {
    /// Adds the file's settings where neither flag nor environment spoke, and checks the whole.
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

    fn or(self, file: Settings) -> Settings {
        Settings {
            slot: self.slot.or(file.slot),
            members: self.members.or(file.members),
            data: self.data.or(file.data),
            http: self.http.or(file.http),
            listen_grpc: self.listen_grpc.or(file.listen_grpc),
            listen_http: self.listen_http.or(file.listen_http),
            tls_ca: self.tls_ca.or(file.tls_ca),
            tls_cert: self.tls_cert.or(file.tls_cert),
            tls_key: self.tls_key.or(file.tls_key),
            insecure_plaintext: self.insecure_plaintext.or(file.insecure_plaintext),
            log: self.log.or(file.log),
            request_timeout_ms: self.request_timeout_ms.or(file.request_timeout_ms),
            metrics_summary_s: self.metrics_summary_s.or(file.metrics_summary_s),
            config: self.config,
        }
    }

    fn validate(self) -> Result<Config, ConfigError> {
        let invalid = |field, reason: String| ConfigError::Invalid { field, reason };
        let members: Vec<String> = self
            .members
            .ok_or(ConfigError::Missing("members", "QUORUMFS_MEMBERS"))?;
        let members: Vec<String> = members.into_iter().map(|m| m.trim().to_string()).collect();
        if members.len().is_multiple_of(2) || members.len() > usize::from(SLOT_MAX) {
            let reason = format!(
                "{} addresses; a cluster begins with 1, 3, 5 or 7 members",
                members.len()
            );
            return Err(invalid("members", reason));
        }
        for (at, member) in members.iter().enumerate() {
            check_address("members", member)?;
            if members[..at].contains(member) {
                return Err(invalid(
                    "members",
                    format!("{member} is named twice; each member needs its own address"),
                ));
            }
        }
        let slot = self.slot.ok_or(ConfigError::Missing("slot", "QUORUMFS_SLOT"))?;
        if slot == 0 || usize::from(slot) > members.len() {
            let reason = format!(
                "{slot} is not a place in --members; give a number from 1 to {}",
                members.len()
            );
            return Err(invalid("slot", reason));
        }
        let data = self.data.ok_or(ConfigError::Missing("data", "QUORUMFS_DATA"))?;
        let http = self.http.ok_or(ConfigError::Missing("http", "QUORUMFS_HTTP"))?;
        check_address("http", &http)?;
        let grpc = members[usize::from(slot) - 1].clone();
        let listen_grpc = match &self.listen_grpc {
            Some(address) => listen_address("listen-grpc", address)?,
            None => listen_address("members", &grpc)?,
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
        let request_timeout_ms = self.request_timeout_ms.unwrap_or(10_000);
        if !(100..=600_000).contains(&request_timeout_ms) {
            return Err(invalid(
                "request-timeout-ms",
                format!("{request_timeout_ms} is not from 100 to 600000"),
            ));
        }
        let metrics_summary_s = self.metrics_summary_s.unwrap_or(METRICS_SUMMARY_S);
        if !(1..=86_400).contains(&metrics_summary_s) {
            return Err(invalid(
                "metrics-summary-s",
                format!("{metrics_summary_s} is not from 1 to 86400"),
            ));
        }
        let log = self.log.unwrap_or_else(|| "info".to_string());
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&log) {
            return Err(invalid(
                "log",
                format!("{log:?} is not a level or filter: {error}"),
            ));
        }
        Ok(Config {
            slot,
            members,
            data,
            http,
            listen_grpc,
            listen_http,
            tls,
            log,
            request_timeout_ms,
            metrics_summary_s,
        })
    }
}

fn check_address(field: &'static str, address: &str) -> Result<(), ConfigError> {
    let fine = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0) && !host.contains(['/', ' ', '@'])
    });
    if fine {
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
    // A name such as `localhost` may stand for ::1 and 127.0.0.1; members reach each other over IPv4 more surely.
    Ok(found
        .find(|a| matches!(a.ip(), IpAddr::V4(_)))
        .filter(|_| first.is_ipv6())
        .unwrap_or(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(args: &[&str]) -> Result<Config, String> {
        let settings =
            Settings::try_parse_from(["quorumfs-node"].iter().chain(args)).map_err(|e| e.to_string())?;
        settings.resolve().map_err(|e| e.to_string())
    }

    const GOOD: [&str; 8] = [
        "--slot",
        "2",
        "--members",
        "127.0.0.1:3030,127.0.0.1:3031,127.0.0.1:3032",
        "--http",
        "127.0.0.1:8082",
        "--data",
        "/d",
    ];

    #[test]
    fn a_whole_set_is_taken() {
        let config = resolve(&GOOD).unwrap();
        assert_eq!(config.grpc(), "127.0.0.1:3031");
        assert_eq!(config.listen_http, "127.0.0.1:8082".parse().unwrap());
    }

    #[test]
    fn errors_name_the_field_and_what_would_be_right() {
        let with = |at: usize, value: &'static str| {
            let mut args = GOOD;
            args[at] = value;
            resolve(&args).unwrap_err()
        };
        assert!(with(1, "4").contains("--slot: 4 is not a place"));
        assert!(with(1, "0").contains("from 1 to 3"));
        assert!(with(3, "127.0.0.1:3030,127.0.0.1:3031").contains("1, 3, 5 or 7"));
        assert!(with(3, "127.0.0.1:3030,127.0.0.1:3030,127.0.0.1:3032").contains("named twice"));
        assert!(with(3, "nonsense").contains("HOST:PORT"));
        assert!(with(5, "0.0.0.0:8082").contains("insecure-plaintext"));
        assert!(resolve(&GOOD[..6]).unwrap_err().contains("--data is not set"));
        assert!(resolve(&["--nonsense"]).unwrap_err().contains("--nonsense"));
    }

    #[test]
    fn flags_are_stronger_than_the_file_and_unknown_fields_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.toml");
        std::fs::write(
            &file,
            "slot = 1\nhttp = \"127.0.0.1:8081\"\ndata = \"/from-file\"\n",
        )
        .unwrap();
        let file_name = file.to_str().unwrap();
        let config = resolve(&[
            "--config",
            file_name,
            "--members",
            "127.0.0.1:3030",
            "--data",
            "/from-flag",
        ])
        .unwrap();
        assert_eq!((config.slot, config.data.to_str().unwrap()), (1, "/from-flag"));
        std::fs::write(&file, "slott = 1\n").unwrap();
        assert!(resolve(&["--config", file_name]).unwrap_err().contains("slott"));
    }
}
