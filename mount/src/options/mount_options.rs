//! The options of `-o`: comma-separated, later ones override earlier ones, unknown ones are refused by name.
//!
//! There are three kinds: flags of mount(2), options for mount(8) or the init system, which are ignored here, and our
//! own.

use std::path::PathBuf;
use std::time::Duration;

use nix::mount::MsFlags;

/// When a call is durable (P1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DurabilityOption {
    /// When `close` returns.
    Close,
    /// When `fsync` returns, or a second later.
    Fsync,
}

/// Who may use the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// All users, subject to the permissions of files.
    Everyone,
    /// Only the user who mounts.
    Owner,
}

/// What to do if a QuorumFS mount exists at the mount point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stacking {
    /// It is an error.
    Refuse,
    /// The new one covers it.
    Cover,
}

/// What to do with an unknown option (`mount -s`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// It is an error.
    Refuse,
    /// It is ignored.
    Tolerate,
}

/// The contents of all `-o`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountWords {
    /// Flags for mount(2).
    pub flags: MsFlags,
    /// `durability=close|fsync`
    pub durability: DurabilityOption,
    /// `timeout=SECONDS`: longest time that a call waits for a quorum; `None` means without limit (P6).
    pub call_timeout: Option<Duration>,
    /// `allow_other`
    pub access: Option<Access>,
    /// `fsname=NAME`: the source that `df` shows.
    pub source: Option<String>,
    /// `tls-ca=FILE`
    pub tls_ca: Option<PathBuf>,
    /// `tls-cert=FILE`
    pub tls_cert: Option<PathBuf>,
    /// `tls-key=FILE`
    pub tls_key: Option<PathBuf>,
    /// `log-file=FILE`
    pub log_file: Option<PathBuf>,
    /// `cache_ms=N`: how long the kernel may keep names and attributes without asking. Changes of other mounts become
    /// visible that much later.
    pub kernel_cache: Duration,
    /// `stack`
    pub stacking: Stacking,
}

impl Default for MountWords {
    fn default() -> MountWords {
        MountWords {
            flags: MsFlags::empty(),
            durability: DurabilityOption::Close,
            call_timeout: None,
            access: None,
            source: None,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            log_file: None,
            kernel_cache: Duration::ZERO,
            stacking: Stacking::Refuse,
        }
    }
}

/// Why an option was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OptionError {
    /// The option is unknown.
    #[error("unknown mount option `{0}`")]
    Unknown(String),
    /// The option takes no value.
    #[error("mount option `{0}` takes no value")]
    UnexpectedValue(String),
    /// The option needs a value.
    #[error("mount option `{0}` needs a value, as in `{0}={1}`")]
    MissingValue(String, &'static str),
    /// The value is not valid.
    #[error("mount option `{option}={value}`: expected {expected}")]
    BadValue {
        /// Name of the option.
        option: String,
        /// The value given.
        value: String,
        /// The valid values.
        expected: &'static str,
    },
    /// The option asks for a feature that does not exist.
    #[error("mount option `{0}` is not supported: {1}")]
    NotSupported(String, &'static str),
}

impl MountWords {
    /// Adds the options of one comma-separated list.
    pub fn read(&mut self, list: &str, unknown: Unknown) -> Result<(), OptionError> {
        for word in list.split(',').filter(|word| !word.is_empty()) {
            match (self.read_word(word), unknown) {
                (Err(OptionError::Unknown(_)), Unknown::Tolerate) => {}
                (result, _) => result?,
            }
        }
        Ok(())
    }

    fn read_word(&mut self, word: &str) -> Result<(), OptionError> {
        let (key, value) = match word.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (word, None),
        };
        if is_for_others(key) {
            return Ok(());
        }
        if let Some((flags, switch)) = kernel_flag(key) {
            if value.is_some() && key != "user" {
                return Err(OptionError::UnexpectedValue(key.to_owned()));
            }
            self.flags.set(flags, switch == Switch::On);
            return Ok(());
        }
        self.read_own(key, value)
    }

    fn read_own(&mut self, key: &str, value: Option<&str>) -> Result<(), OptionError> {
        let needed = |example| value.ok_or_else(|| OptionError::MissingValue(key.to_owned(), example));
        let bad = |value: &str, expected| OptionError::BadValue {
            option: key.to_owned(),
            value: value.to_owned(),
            expected,
        };
        let path = || match needed("FILE")? {
            "" => Err(bad("", "a file")),
            path => Ok(Some(PathBuf::from(path))),
        };
        let plain = || match value {
            Some(_) => Err(OptionError::UnexpectedValue(key.to_owned())),
            None => Ok(()),
        };
        match key {
            "durability" => {
                self.durability = match needed("close")? {
                    "close" => DurabilityOption::Close,
                    "fsync" => DurabilityOption::Fsync,
                    other => return Err(bad(other, "`close` or `fsync`")),
                }
            }
            "timeout" => {
                let text = needed("SECONDS")?;
                let seconds = text.parse::<u32>().ok().filter(|&seconds| seconds > 0);
                let seconds = seconds.ok_or_else(|| bad(text, "a number of seconds, 1 or more"))?;
                self.call_timeout = Some(Duration::from_secs(u64::from(seconds)));
            }
            "cache_ms" => {
                let text = needed("MILLISECONDS")?;
                let ms = text
                    .parse::<u32>()
                    .map_err(|_| bad(text, "a number of milliseconds"))?;
                self.kernel_cache = Duration::from_millis(u64::from(ms));
            }
            "allow_other" => {
                plain()?;
                self.access = Some(Access::Everyone);
            }
            "noallow_other" => {
                plain()?;
                self.access = Some(Access::Owner);
            }
            "stack" => {
                plain()?;
                self.stacking = Stacking::Cover;
            }
            "fsname" => {
                self.source = match needed("NAME")? {
                    "" => return Err(bad("", "a name")),
                    name => Some(name.to_owned()),
                }
            }
            "tls-ca" | "tls_ca" => self.tls_ca = path()?,
            "tls-cert" | "tls_cert" => self.tls_cert = path()?,
            "tls-key" | "tls_key" => self.tls_key = path()?,
            "log-file" | "log_file" => self.log_file = path()?,
            // The kernel always checks permissions, and the type is always fuse.quorumfs.
            "default_permissions" => plain()?,
            "subtype" if value == Some("quorumfs") => {}
            "remount" => {
                return Err(OptionError::NotSupported(
                    key.to_owned(),
                    "unmount, then mount again",
                ));
            }
            "bind" | "rbind" | "move" => {
                return Err(OptionError::NotSupported(
                    key.to_owned(),
                    "mount(8) does this by itself",
                ));
            }
            _ => return Err(OptionError::Unknown(key.to_owned())),
        }
        Ok(())
    }
}

/// Whether the option is for mount(8), fstab or the init system.
fn is_for_others(key: &str) -> bool {
    matches!(
        key,
        "_netdev"
            | "nofail"
            | "auto"
            | "noauto"
            | "defaults"
            | "nouser"
            | "nousers"
            | "silent"
            | "loud"
            | "comment"
    ) || key.starts_with("x-")
        || key.starts_with("X-")
}

#[derive(PartialEq)]
enum Switch {
    On,
    Off,
}

/// Returns the flags of mount(2) that an option sets or clears.
fn kernel_flag(key: &str) -> Option<(MsFlags, Switch)> {
    use Switch::{Off, On};
    // As in mount(8): programs must not gain privileges from mounts that users make.
    let harmless = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    // nix does not define MS_NOSYMFOLLOW.
    let no_links = MsFlags::from_bits_retain(256);
    Some(match key {
        "ro" => (MsFlags::MS_RDONLY, On),
        "rw" => (MsFlags::MS_RDONLY, Off),
        "nosuid" => (MsFlags::MS_NOSUID, On),
        "suid" => (MsFlags::MS_NOSUID, Off),
        "nodev" => (MsFlags::MS_NODEV, On),
        "dev" => (MsFlags::MS_NODEV, Off),
        "noexec" => (MsFlags::MS_NOEXEC, On),
        "exec" => (MsFlags::MS_NOEXEC, Off),
        "user" | "users" => (harmless | MsFlags::MS_NOEXEC, On),
        "owner" | "group" => (harmless, On),
        "sync" => (MsFlags::MS_SYNCHRONOUS, On),
        "async" => (MsFlags::MS_SYNCHRONOUS, Off),
        "dirsync" => (MsFlags::MS_DIRSYNC, On),
        "noatime" => (MsFlags::MS_NOATIME, On),
        "atime" => (MsFlags::MS_NOATIME, Off),
        "nodiratime" => (MsFlags::MS_NODIRATIME, On),
        "diratime" => (MsFlags::MS_NODIRATIME, Off),
        "relatime" => (MsFlags::MS_RELATIME, On),
        "norelatime" => (MsFlags::MS_RELATIME, Off),
        "strictatime" => (MsFlags::MS_STRICTATIME, On),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, Off),
        "lazytime" => (MsFlags::MS_LAZYTIME, On),
        "nolazytime" => (MsFlags::MS_LAZYTIME, Off),
        "nosymfollow" => (no_links, On),
        "symfollow" => (no_links, Off),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(list: &str) -> Result<MountWords, OptionError> {
        let mut words = MountWords::default();
        words.read(list, Unknown::Refuse).map(|()| words)
    }

    #[test]
    fn later_options_win() {
        assert_eq!(read("ro,rw,ro").unwrap().flags, MsFlags::MS_RDONLY);
        assert_eq!(read("ro,rw").unwrap().flags, MsFlags::empty());
        assert_eq!(read("user,exec,dev").unwrap().flags, MsFlags::MS_NOSUID);
        assert_eq!(read("nodev,nosuid,dev,suid").unwrap().flags, MsFlags::empty());
    }

    #[test]
    fn options_of_other_programs_are_ignored() {
        let words =
            "rw,_netdev,nofail,noauto,x-systemd.automount,x-systemd.idle-timeout=60,comment=us,defaults,,";
        assert_eq!(read(words).unwrap(), MountWords::default());
    }

    #[test]
    fn own_options_are_parsed() {
        let words = read(
            "timeout=5,durability=fsync,allow_other,fsname=x,tls-ca=/a,tls-cert=/b,tls_key=/c,cache_ms=250,stack,log-file=/l",
        )
        .unwrap();
        assert_eq!(words.call_timeout, Some(Duration::from_secs(5)));
        assert_eq!(words.durability, DurabilityOption::Fsync);
        assert_eq!(words.access, Some(Access::Everyone));
        assert_eq!(words.source.as_deref(), Some("x"));
        assert_eq!(words.tls_ca, Some("/a".into()));
        assert_eq!(words.tls_cert, Some("/b".into()));
        assert_eq!(words.tls_key, Some("/c".into()));
        assert_eq!(words.log_file, Some("/l".into()));
        assert_eq!(words.kernel_cache, Duration::from_millis(250));
        assert_eq!(words.stacking, Stacking::Cover);
    }

    #[test]
    fn an_unknown_option_is_named_in_the_error() {
        for (list, expected) in [
            ("ro,speed=11", "unknown mount option `speed`"),
            ("ro=1", "`ro` takes no value"),
            ("allow_other=1", "`allow_other` takes no value"),
            ("timeout", "`timeout` needs a value"),
            ("timeout=0", "`timeout=0`: expected"),
            ("timeout=soon", "`timeout=soon`: expected"),
            ("timeout=-1", "`timeout=-1`: expected"),
            ("durability=never", "expected `close` or `fsync`"),
            ("tls-ca=", "`tls-ca=`: expected a file"),
            ("cache_ms=1s", "`cache_ms=1s`: expected"),
            ("remount,ro", "`remount` is not supported"),
            ("subtype=other", "unknown mount option `subtype`"),
        ] {
            let error = read(list).unwrap_err().to_string();
            assert!(error.contains(expected), "{list}: {error}");
        }
    }

    #[test]
    fn sloppy_passes_over_the_unknown_but_not_the_wrong() {
        let mut words = MountWords::default();
        assert_eq!(words.read("speed=11,ro", Unknown::Tolerate), Ok(()));
        assert_eq!(words.flags, MsFlags::MS_RDONLY);
        assert!(words.read("timeout=soon", Unknown::Tolerate).is_err());
    }
}
