//! The filesystem to mount: `HOST:PORT[,HOST:PORT…][:/subdir]`.
//!
//! This is the form of fstab's first field for network filesystems; `quorumfs://HOST:PORT[,…][/subdir]` means the same.
//! Names are not resolved here: a host that does not exist is found when connecting.

use quorumfs_proto::Name;

/// A parsed spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// `HOST:PORT` of nodes, at least one.
    pub addresses: Vec<String>,
    /// The directory in the filesystem that becomes the root of the mount, outermost name first; empty for the whole
    /// filesystem.
    pub subdirectory: Vec<Name>,
}

/// Why a spec is not valid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// It contains no address.
    #[error("`{0}` names no node; expected HOST:PORT[,HOST:PORT…][:/subdir]")]
    NoAddress(String),
    /// An address is not `HOST:PORT`.
    #[error("`{0}` is not HOST:PORT")]
    BadAddress(String),
    /// A port is not a number from 1 to 65535.
    #[error("`{address}`: port `{port}` is not a number from 1 to 65535")]
    BadPort {
        /// The whole address.
        address: String,
        /// The invalid port.
        port: String,
    },
    /// The path leads out of the filesystem, or has an invalid name.
    #[error("sub-directory `{0}` is not a path below the root")]
    BadSubdirectory(String),
}

impl std::str::FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Spec, SpecError> {
        let (rest, is_url) = match text.strip_prefix("quorumfs://") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        let (hosts, path) = match rest.find('/') {
            Some(slash) => {
                let (hosts, path) = rest.split_at(slash);
                match hosts.strip_suffix(':') {
                    Some(hosts) => (hosts, path),
                    None if is_url => (hosts, path),
                    None => return Err(SpecError::BadAddress(rest.to_owned())),
                }
            }
            None => (rest, ""),
        };
        let addresses = hosts
            .split(',')
            .filter(|address| !address.is_empty())
            .map(|address| check_address(address).map(|()| address.to_owned()))
            .collect::<Result<Vec<String>, SpecError>>()?;
        if addresses.is_empty() {
            return Err(SpecError::NoAddress(text.to_owned()));
        }
        let subdirectory = path
            .split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .map(|part| {
                Name::new(part.as_bytes().to_vec()).map_err(|_| SpecError::BadSubdirectory(path.to_owned()))
            })
            .collect::<Result<Vec<Name>, SpecError>>()?;
        Ok(Spec {
            addresses,
            subdirectory,
        })
    }
}

fn check_address(address: &str) -> Result<(), SpecError> {
    let bad = || SpecError::BadAddress(address.to_owned());
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    let bare = match host.strip_prefix('[') {
        // An IPv6 address is in brackets, so that its colons are not taken for the port's.
        Some(inner) => inner.strip_suffix(']').ok_or_else(bad)?,
        None if host.contains(':') => return Err(bad()),
        None => host,
    };
    if bare.is_empty() || bare.chars().any(|c| c.is_whitespace() || c == '@') {
        return Err(bad());
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(()),
        _ => Err(SpecError::BadPort {
            address: address.to_owned(),
            port: port.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Vec<String>, Vec<String>) {
        let spec: Spec = text.parse().unwrap();
        let names = spec.subdirectory.iter().map(|name| name.to_string()).collect();
        (spec.addresses, names)
    }

    fn strings(items: &[&str]) -> Vec<String> {
        items.iter().map(|item| (*item).to_owned()).collect()
    }

    #[test]
    fn addresses_and_the_subdirectory_are_separated() {
        assert_eq!(parsed("a:1"), (strings(&["a:1"]), vec![]));
        assert_eq!(parsed("a:1,b:2,c:3"), (strings(&["a:1", "b:2", "c:3"]), vec![]));
        assert_eq!(parsed("a:1,b:2:/"), (strings(&["a:1", "b:2"]), vec![]));
        assert_eq!(
            parsed("a:1,b:2:/home//x/./y"),
            (strings(&["a:1", "b:2"]), strings(&["home", "x", "y"]))
        );
        assert_eq!(
            parsed("[::1]:3030,127.0.0.1:3031:/s"),
            (strings(&["[::1]:3030", "127.0.0.1:3031"]), strings(&["s"]))
        );
        assert_eq!(parsed("quorumfs://a:1,b:2"), (strings(&["a:1", "b:2"]), vec![]));
        assert_eq!(parsed("quorumfs://a:1/s"), (strings(&["a:1"]), strings(&["s"])));
        assert_eq!(parsed("quorumfs://a:1:/s"), (strings(&["a:1"]), strings(&["s"])));
    }

    #[test]
    fn an_invalid_part_is_named_in_the_error() {
        for (text, expected) in [
            ("", "names no node"),
            (",", "names no node"),
            ("quorumfs://", "names no node"),
            (":/x", "names no node"),
            ("host", "`host` is not HOST:PORT"),
            ("a:1,host", "`host` is not HOST:PORT"),
            ("::1:3030", "`::1:3030` is not HOST:PORT"),
            (":3030", "`:3030` is not HOST:PORT"),
            ("a:1/x", "`a:1/x` is not HOST:PORT"),
            ("/dev/sda1", "is not HOST:PORT"),
            ("a:0", "port `0` is not"),
            ("a:65536", "port `65536` is not"),
            ("a:http", "port `http` is not"),
            ("a:1:/../x", "`/../x` is not a path below the root"),
        ] {
            let error = text.parse::<Spec>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
