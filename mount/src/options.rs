//! The command line.
//!
//! Two forms, one result: `quorumfs-mount [OPTIONS] SPEC DIR` for people, and `mount.quorumfs SPEC DIR [-sfnv] [-o …]`,
//! as mount(8) calls its helpers (so that `mount -t quorumfs` and fstab work). Pure: reads no file, asks no kernel; an
//! accepted command line is consistent.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgAction, Parser};
use nix::mount::MsFlags;

mod mount_options;
mod spec;

pub use mount_options::{Access, DurabilityOption, MountWords, OptionError, Stacking, Unknown};
pub use spec::{Spec, SpecError};

/// The settings of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountRequest {
    /// The filesystem to mount.
    pub spec: Spec,
    /// The mount point.
    pub directory: PathBuf,
    /// The source that `df` shows.
    pub source: String,
    /// Flags for mount(2).
    pub flags: MsFlags,
    /// The users who may use it; `None` means all if root mounts, else only the owner.
    pub access: Option<Access>,
    /// When calls are durable.
    pub durability: DurabilityOption,
    /// Longest time that a call waits for a quorum; `None` means without limit.
    pub call_timeout: Option<Duration>,
    /// Files for TLS, if it is used.
    pub tls: Option<TlsFiles>,
    /// How long the kernel may keep names and attributes without asking.
    pub kernel_cache: Duration,
    /// What to do if a QuorumFS mount exists there.
    pub stacking: Stacking,
    /// Whether the process stays in the foreground.
    pub process_mode: ProcessMode,
    /// The log file.
    pub log_file: Option<PathBuf>,
    /// The amount of logging.
    pub verbosity: Verbosity,
    /// Whether anything is mounted.
    pub effect: Effect,
    /// The mount namespace, if it is not the present one.
    pub namespace: Option<PathBuf>,
}

/// The PEM files of a mutual TLS connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authority that signed the nodes' certificates.
    pub authority: PathBuf,
    /// This mount's certificate and key, if nodes require them.
    pub identity: Option<TlsIdentityFiles>,
}

/// A certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsIdentityFiles {
    /// Path of the certificate.
    pub certificate: PathBuf,
    /// Path of the private key.
    pub key: PathBuf,
}

/// Where the mount process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessMode {
    /// In the terminal, until it is unmounted.
    Foreground,
    /// In the background; the command returns when the mount is ready.
    Background,
}

/// The amount of logging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    /// Messages for administrators.
    Normal,
    /// Messages for developers.
    Verbose,
}

/// Whether anything is mounted (`mount -f`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The mount is made.
    Mount,
    /// Everything is checked, but nothing is mounted.
    Rehearse,
}

/// Why nothing is mounted: the user requested help, or the arguments are invalid.
#[derive(Debug, thiserror::Error)]
pub enum Usage {
    /// Help or version; the text is for standard output.
    #[error("{0}")]
    Information(String),
    /// Invalid arguments; the text is for standard error.
    #[error("{0}")]
    Invalid(String),
}

/// Mounts a QuorumFS cluster as a local directory.
#[derive(Debug, Parser)]
#[command(name = "quorumfs-mount", version)]
struct PlainArguments {
    /// What to mount: `HOST:PORT[,HOST:PORT…][:/subdir]`
    spec: String,
    /// The directory to mount it on
    directory: PathBuf,
    /// Mount options, comma-separated: those of any filesystem (ro, nodev, nosuid, noexec, noatime, …), timeout=SECONDS,
    /// durability=close|fsync, cache_ms=MILLISECONDS, allow_other, noallow_other, stack, fsname=NAME, tls-ca=FILE,
    /// tls-cert=FILE, tls-key=FILE, log-file=FILE
    #[arg(short = 'o', value_name = "OPTIONS", action = ArgAction::Append)]
    options: Vec<String>,
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    foreground: bool,
    /// Append the log to this file
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Mount read-only
    #[arg(long)]
    read_only: bool,
    /// Fail calls with EIO if no quorum answers for this long (default: wait)
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<String>,
    /// When written data is on disk on a quorum: `close`, when close(2) returns; `fsync`, within a second, in the order
    /// of the closes
    #[arg(long, value_name = "close|fsync")]
    durability: Option<String>,
    /// Certificate authority that signed the nodes' certificates (PEM); turns TLS on
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// This mount's own certificate (PEM)
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The private key of that certificate (PEM)
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Log more
    #[arg(short, long)]
    verbose: bool,
}

/// The mount(8) helper of QuorumFS.
#[derive(Debug, Parser)]
#[command(name = "mount.quorumfs", version)]
struct HelperArguments {
    /// What to mount: `HOST:PORT[,HOST:PORT…][:/subdir]`
    spec: String,
    /// The directory to mount it on
    directory: PathBuf,
    /// Tolerate unknown mount options
    #[arg(short = 's')]
    sloppy: bool,
    /// Do everything but mount
    #[arg(short = 'f')]
    fake: bool,
    /// Do not write /etc/mtab (never done)
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Log more
    #[arg(short = 'v')]
    verbose: bool,
    /// Mount options, comma-separated
    #[arg(short = 'o', value_name = "OPTIONS", action = ArgAction::Append)]
    options: Vec<String>,
    /// Mount in this mount namespace
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<PathBuf>,
    /// The filesystem type given to mount(8)
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
}

impl MountRequest {
    /// Parses a command line; its first word (the program's name) selects the form.
    pub fn from_arguments(arguments: impl IntoIterator<Item = OsString>) -> Result<MountRequest, Usage> {
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        let is_helper = arguments
            .first()
            .and_then(|name| Path::new(name).file_name())
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"mount."));
        if is_helper {
            HelperArguments::try_parse_from(arguments)?.into_request()
        } else {
            PlainArguments::try_parse_from(arguments)?.into_request()
        }
    }
}

impl PlainArguments {
    fn into_request(self) -> Result<MountRequest, Usage> {
        let mut words = MountWords::default();
        for list in &self.options {
            words.read(list, Unknown::Refuse)?;
        }
        // A flag means the same as its word in `-o`, and overrides it.
        if self.read_only {
            words.read("ro", Unknown::Refuse)?;
        }
        for (key, value) in [("timeout", &self.timeout), ("durability", &self.durability)] {
            if let Some(value) = value {
                words.read(&format!("{key}={value}"), Unknown::Refuse)?;
            }
        }
        words.tls_ca = self.tls_ca.or(words.tls_ca);
        words.tls_cert = self.tls_cert.or(words.tls_cert);
        words.tls_key = self.tls_key.or(words.tls_key);
        words.log_file = self.log_file.or(words.log_file);
        let mut request = request_of(&self.spec, self.directory, words)?;
        if self.foreground {
            request.process_mode = ProcessMode::Foreground;
        }
        if self.verbose {
            request.verbosity = Verbosity::Verbose;
        }
        Ok(request)
    }
}

impl HelperArguments {
    fn into_request(self) -> Result<MountRequest, Usage> {
        let unknown = if self.sloppy {
            Unknown::Tolerate
        } else {
            Unknown::Refuse
        };
        let mut words = MountWords::default();
        for list in &self.options {
            words.read(list, unknown)?;
        }
        let mut request = request_of(&self.spec, self.directory, words)?;
        if self.fake {
            request.effect = Effect::Rehearse;
        }
        if self.verbose {
            request.verbosity = Verbosity::Verbose;
        }
        request.namespace = self.namespace;
        Ok(request)
    }
}

fn request_of(spec: &str, directory: PathBuf, words: MountWords) -> Result<MountRequest, Usage> {
    let parsed: Spec = spec
        .parse()
        .map_err(|error: SpecError| Usage::Invalid(error.to_string()))?;
    let tls = tls_files(words.tls_ca, words.tls_cert, words.tls_key)?;
    Ok(MountRequest {
        source: words.source.unwrap_or_else(|| spec.to_owned()),
        spec: parsed,
        directory,
        flags: words.flags,
        access: words.access,
        durability: words.durability,
        call_timeout: words.call_timeout,
        tls,
        kernel_cache: words.kernel_cache,
        stacking: words.stacking,
        process_mode: ProcessMode::Background,
        log_file: words.log_file,
        verbosity: Verbosity::Normal,
        effect: Effect::Mount,
        namespace: None,
    })
}

fn tls_files(
    authority: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<TlsFiles>, Usage> {
    let identity = match (certificate, key) {
        (Some(certificate), Some(key)) => Some(TlsIdentityFiles { certificate, key }),
        (None, None) => None,
        (Some(_), None) => return Err(Usage::Invalid("tls-cert needs tls-key".to_owned())),
        (None, Some(_)) => return Err(Usage::Invalid("tls-key needs tls-cert".to_owned())),
    };
    match (authority, identity) {
        (Some(authority), identity) => Ok(Some(TlsFiles { authority, identity })),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Usage::Invalid(
            "tls-cert needs tls-ca, the authority that signed the nodes' certificates".to_owned(),
        )),
    }
}

impl From<OptionError> for Usage {
    fn from(error: OptionError) -> Usage {
        Usage::Invalid(error.to_string())
    }
}

impl From<clap::Error> for Usage {
    fn from(error: clap::Error) -> Usage {
        let text = error.render().to_string();
        if error.use_stderr() {
            // clap's own first words; the program's name is added where the message is printed.
            Usage::Invalid(
                text.strip_prefix("error: ")
                    .unwrap_or(&text)
                    .trim_end()
                    .to_owned(),
            )
        } else {
            Usage::Information(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<MountRequest, Usage> {
        MountRequest::from_arguments(line.split_whitespace().map(OsString::from))
    }

    fn mistake(line: &str) -> String {
        match parse(line) {
            Err(Usage::Invalid(text)) => text,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_plain_form() {
        let request = parse(
            "/usr/bin/quorumfs-mount --foreground -o ro,timeout=5 -o nodev a:1,b:2:/x /mnt --log-file /var/log/q -v",
        )
        .unwrap();
        assert_eq!(request.spec.addresses, ["a:1", "b:2"]);
        assert_eq!(request.spec.subdirectory.len(), 1);
        assert_eq!(request.directory, Path::new("/mnt"));
        assert_eq!(request.source, "a:1,b:2:/x");
        assert_eq!(request.flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(request.call_timeout, Some(Duration::from_secs(5)));
        assert_eq!(request.process_mode, ProcessMode::Foreground);
        assert_eq!(request.log_file.as_deref(), Some(Path::new("/var/log/q")));
        assert_eq!(request.verbosity, Verbosity::Verbose);
        assert_eq!(request.effect, Effect::Mount);
    }

    #[test]
    fn missing_options_have_defaults() {
        let request = parse("quorumfs-mount a:1 /mnt").unwrap();
        assert_eq!(request.process_mode, ProcessMode::Background);
        assert_eq!(request.call_timeout, None, "calls wait (P6)");
        assert_eq!(request.durability, DurabilityOption::Close);
        assert_eq!(request.kernel_cache, Duration::ZERO);
        assert_eq!(request.flags, MsFlags::empty());
        assert_eq!(request.tls, None);
    }

    #[test]
    fn flags_and_options_are_equivalent() {
        let flags =
            parse("quorumfs-mount a:1 /m --read-only --timeout 7 --durability fsync --tls-ca /ca").unwrap();
        let words = parse("quorumfs-mount a:1 /m -o ro,timeout=7,durability=fsync,tls-ca=/ca").unwrap();
        assert_eq!(flags, words);
    }

    #[test]
    fn the_helper_form() {
        let request =
            parse("/sbin/mount.quorumfs a:1 /mnt -n -v -o rw,_netdev,nofail,nosuid -t quorumfs").unwrap();
        assert_eq!(request.flags, MsFlags::MS_NOSUID);
        assert_eq!(request.process_mode, ProcessMode::Background);
        assert_eq!(request.verbosity, Verbosity::Verbose);
        assert_eq!(
            parse("mount.quorumfs a:1 /mnt -f").unwrap().effect,
            Effect::Rehearse
        );
        assert!(parse("mount.quorumfs a:1 /mnt -s -o hitherto").is_ok());
        assert!(mistake("mount.quorumfs a:1 /mnt -o hitherto").contains("unknown mount option `hitherto`"));
        let packed = parse("mount.quorumfs a:1 /mnt -sfnv -o ro").unwrap();
        assert_eq!(packed.effect, Effect::Rehearse);
        assert_eq!(packed.flags, MsFlags::MS_RDONLY);
    }

    #[test]
    fn errors_name_the_wrong_option() {
        for (line, told) in [
            ("quorumfs-mount", "SPEC"),
            ("quorumfs-mount a:1", "DIRECTORY"),
            ("quorumfs-mount a:1 /m --speed 11", "--speed"),
            ("quorumfs-mount a /m", "`a` is not HOST:PORT"),
            ("quorumfs-mount a:1 /m --timeout 0", "timeout=0"),
            ("quorumfs-mount a:1 /m --durability never", "`close` or `fsync`"),
            ("quorumfs-mount a:1 /m -o tls-cert=/c", "tls-cert needs tls-key"),
            ("quorumfs-mount a:1 /m -o tls-key=/c", "tls-key needs tls-cert"),
            ("quorumfs-mount a:1 /m -o tls-cert=/c,tls-key=/k", "needs tls-ca"),
        ] {
            let text = mistake(line);
            assert!(text.contains(told), "{line}: {text}");
        }
        assert!(matches!(
            parse("quorumfs-mount --help"),
            Err(Usage::Information(_))
        ));
        assert!(matches!(
            parse("quorumfs-mount --version"),
            Err(Usage::Information(_))
        ));
    }
}
