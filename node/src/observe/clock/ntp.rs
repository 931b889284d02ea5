//! Queries NTP servers: resolves names to addresses and takes a few samples of each, all bounded in number and time.
//!
//! The protocol is implemented by `sntpc`, which refuses answers to questions that were not asked, answers of servers
//! that are not synchronized (leap indicator 3, stratum 16, a root too far away), and refusals (stratum 0). It has no
//! time-outs and asks a clock; both are supplied here. That clock is anchored once and then follows the monotonic
//! clock, so that a jump between question and answer is not taken for an offset.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sntpc::{NtpContext, NtpResult, NtpTimestampGenerator, get_time};
use sntpc_net_tokio::UdpSocketWrapper;
use tokio::net::UdpSocket;

use super::filter::{Estimate, Sample, best_estimate, best_sample};

/// Samples of one server in one round.
const SAMPLES: u32 = 4;
/// A server that leaves this many questions of a round unanswered is not asked again in it.
const UNANSWERED_MAX: u32 = 2;
/// Most time for an answer.
const SAMPLE_TIMEOUT_MS: u64 = 1_500;
/// Most time for the system to resolve a name.
const RESOLVE_TIMEOUT_MS: u64 = 5_000;
/// Most addresses used of a name with many (a pool).
const ADDRESSES_PER_NAME_MAX: usize = 4;
/// Rounds for which a server that refused service (kiss of death) is not asked.
const LEFT_ALONE_ROUNDS: u64 = 16;
/// Most such servers that are remembered; others are forgotten.
const LEFT_ALONE_MAX: usize = 64;

/// The servers, and the state kept from round to round.
#[derive(Debug)]
pub struct NtpServers {
    names: Vec<String>,
    /// Least time between two samples of a server.
    spacing: Duration,
    round: u64,
    left_alone: HashMap<SocketAddr, u64>,
}

/// Why a server gave no sample.
#[derive(Clone, Debug, PartialEq, Eq)]
enum NoSample {
    /// A failure, with its description.
    Failed(String),
    /// The server refused service.
    GoAway(String),
}

impl NtpServers {
    /// Makes the list of servers; `names` are `HOST:PORT`.
    pub fn new(names: Vec<String>, spacing: Duration) -> NtpServers {
        NtpServers {
            names,
            spacing,
            round: 0,
            left_alone: HashMap::new(),
        }
    }

    /// Asks all servers; returns their common estimate, or why there is none.
    pub async fn ask(&mut self) -> Result<Estimate, String> {
        self.round += 1;
        let mut reasons = Vec::new();
        let mut addresses = Vec::new();
        let found = futures::future::join_all(self.names.iter().map(|name| resolve(name))).await;
        for (name, found) in self.names.iter().zip(found) {
            match found {
                Ok(found) => addresses.extend(found.into_iter().map(|address| (name.clone(), address))),
                Err(reason) => reasons.push(format!("{name}: {reason}")),
            }
        }
        let round = self.round;
        self.left_alone.retain(|_, until| *until > round);
        addresses.retain(|(name, address)| {
            let alone = self.left_alone.contains_key(address);
            if alone {
                reasons.push(format!("{}: it has refused service", label(name, *address)));
            }
            !alone
        });
        let asked = addresses
            .iter()
            .map(|(_, address)| sample_server(*address, self.spacing));
        let mut estimates = Vec::new();
        for ((name, address), answer) in addresses.iter().zip(futures::future::join_all(asked).await) {
            let server = label(name, *address);
            match answer {
                Ok(sample) => estimates.push(Estimate { server, sample }),
                Err(NoSample::Failed(reason)) => reasons.push(format!("{server}: {reason}")),
                Err(NoSample::GoAway(reason)) => {
                    reasons.push(format!("{server}: {reason}"));
                    if self.left_alone.len() < LEFT_ALONE_MAX {
                        self.left_alone.insert(*address, round + LEFT_ALONE_ROUNDS);
                    }
                }
            }
        }
        best_estimate(estimates).ok_or_else(|| format!("no NTP server answers: {}", reasons.join("; ")))
    }
}

/// Returns `HOST:PORT`, and the address if it differs.
fn label(name: &str, address: SocketAddr) -> String {
    let address = address.to_string();
    match name == address {
        true => address,
        false => format!("{name} ({address})"),
    }
}

async fn resolve(name: &str) -> Result<Vec<SocketAddr>, String> {
    let timeout = Duration::from_millis(RESOLVE_TIMEOUT_MS);
    match tokio::time::timeout(timeout, tokio::net::lookup_host(name)).await {
        Err(_) => Err(format!("its name was not resolved in {RESOLVE_TIMEOUT_MS} ms")),
        Ok(Err(error)) => Err(format!("its name cannot be resolved: {error}")),
        Ok(Ok(found)) => {
            let mut found: Vec<SocketAddr> = found.collect();
            found.dedup();
            found.truncate(ADDRESSES_PER_NAME_MAX);
            match found.is_empty() {
                true => Err("its name has no address".to_string()),
                false => Ok(found),
            }
        }
    }
}

async fn sample_server(address: SocketAddr, spacing: Duration) -> Result<Sample, NoSample> {
    let mut samples = Vec::new();
    let mut unanswered = 0;
    let mut last = NoSample::Failed(String::new());
    for number in 0..SAMPLES {
        if number > 0 {
            tokio::time::sleep(spacing).await;
        }
        match sample(address).await {
            Ok(sample) => samples.push(sample),
            Err(failure) => {
                unanswered += 1;
                last = failure;
                if unanswered == UNANSWERED_MAX || matches!(last, NoSample::GoAway(_)) {
                    break;
                }
            }
        }
    }
    best_sample(samples).ok_or(last)
}

async fn sample(address: SocketAddr) -> Result<Sample, NoSample> {
    let failed = |what: &str, error: std::io::Error| NoSample::Failed(format!("{what}: {error}"));
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // One socket for each question, so that a late answer to another one is never read. It is connected, so that
    // answers of other hosts are ignored and a closed port is reported at once.
    let socket = UdpSocket::bind(any)
        .await
        .map_err(|e| failed("cannot open a socket", e))?;
    socket
        .connect(address)
        .await
        .map_err(|e| failed("it cannot be reached", e))?;
    let socket = UdpSocketWrapper::new(socket);
    let question = get_time(address, &socket, NtpContext::new(SteadyClock::anchored()));
    match tokio::time::timeout(Duration::from_millis(SAMPLE_TIMEOUT_MS), question).await {
        Err(_) => Err(NoSample::Failed(format!("no answer in {SAMPLE_TIMEOUT_MS} ms"))),
        Ok(Err(refused)) => Err(no_sample(refused)),
        Ok(Ok(answer)) => Ok(evaluated(&answer, Instant::now())),
    }
}

fn evaluated(answer: &NtpResult, at: Instant) -> Sample {
    // Seconds with 16 bits of fraction (RFC 5905, short format).
    let short_us = |value: u32| (u64::from(value) * 1_000_000) >> 16;
    Sample {
        offset_us: answer.offset(),
        delay_us: answer.roundtrip(),
        root_us: short_us(answer.root_delay()) / 2 + short_us(answer.root_dispersion()),
        stratum: answer.stratum(),
        at,
    }
}

fn no_sample(refused: sntpc::Error) -> NoSample {
    let words = match refused {
        sntpc::Error::KissOfDeath(code) => {
            return NoSample::GoAway(format!("it refuses service ({})", code.as_str().escape_debug()));
        }
        sntpc::Error::UnsynchronizedClock => "it is not synchronized itself (leap indicator 3)".to_string(),
        sntpc::Error::IncorrectStratumHeaders => "it is not synchronized itself (stratum 16)".to_string(),
        sntpc::Error::ExcessiveRootDistance => "it is too far from a reference clock".to_string(),
        sntpc::Error::Network => "it cannot be reached, or its port is closed".to_string(),
        other => format!("its answer is not valid ({other:?})"),
    };
    NoSample::Failed(words)
}

/// The wall clock at the anchor, continued by the monotonic clock.
#[derive(Clone, Copy, Debug)]
struct SteadyClock {
    wall: Duration,
    anchor: Instant,
    now: Duration,
}

impl SteadyClock {
    fn anchored() -> SteadyClock {
        // A clock before 1970 is wrong anyway; the offset from 1970 shows it too.
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        SteadyClock {
            wall,
            anchor: Instant::now(),
            now: wall,
        }
    }
}

impl NtpTimestampGenerator for SteadyClock {
    fn init(&mut self) {
        self.now = self.wall + self.anchor.elapsed();
    }
    fn timestamp_sec(&self) -> u64 {
        self.now.as_secs()
    }
    fn timestamp_subsec_micros(&self) -> u32 {
        self.now.subsec_micros()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Starts a server on loopback that answers every question with `answer`.
    async fn server(answer: impl Fn([u8; 48]) -> Vec<u8> + Send + 'static) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut question = [0; 48];
            while let Ok((48, from)) = socket.recv_from(&mut question).await {
                socket.send_to(&answer(question), from).await.unwrap();
            }
        });
        address
    }

    /// Returns a valid answer of a server whose clock is `ahead` of ours.
    fn right(question: [u8; 48], ahead: Duration) -> Vec<u8> {
        let since_1900 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
            + Duration::from_secs(2_208_988_800)
            + ahead;
        let fraction = (u64::from(since_1900.subsec_nanos()) << 32) / 1_000_000_000;
        let stamp = ((since_1900.as_secs() << 32) | fraction).to_be_bytes();
        let mut answer = vec![0; 48];
        answer[0] = 0x24; // No leap, version 4, server.
        answer[1] = 2;
        answer[4..8].copy_from_slice(&(1u32 << 16).to_be_bytes()); // Root delay: a second.
        answer[8..12].copy_from_slice(&(1u32 << 14).to_be_bytes()); // Root dispersion: a quarter.
        answer[24..32].copy_from_slice(&question[40..48]);
        answer[32..40].copy_from_slice(&stamp);
        answer[40..48].copy_from_slice(&stamp);
        answer
    }

    async fn ask(names: Vec<String>) -> Result<Estimate, String> {
        NtpServers::new(names, Duration::from_millis(1)).ask().await
    }

    #[tokio::test]
    async fn a_right_answer_is_an_offset_and_an_uncertainty() {
        let address = server(|question| right(question, Duration::from_secs(5))).await;
        let estimate = ask(vec![address.to_string()]).await.unwrap();
        let sample = &estimate.sample;
        assert!(sample.offset_us.abs_diff(5_000_000) < 100_000, "{sample:?}");
        assert!(sample.delay_us < 1_000_000, "{sample:?}");
        assert_eq!((sample.root_us, sample.stratum), (750_000, 2));
        assert_eq!(estimate.server, address.to_string());
    }

    #[tokio::test]
    async fn servers_that_are_not_synchronized_are_refused_with_the_reason() {
        let spoilt = |at: usize, value: u8| {
            move |question| {
                let mut answer = right(question, Duration::ZERO);
                answer[at] = value;
                answer
            }
        };
        let leap = server(spoilt(0, 0xe4)).await;
        let stratum = server(spoilt(1, 16)).await;
        let other_question = server(spoilt(24, 0x55)).await;
        let short = server(|question| right(question, Duration::ZERO)[..40].to_vec()).await;
        // Version 4, with a precision that no clock has (and by which sntpc must not shift).
        let hostile = server(spoilt(3, 0x7f)).await;
        for (address, why) in [
            (leap, "leap indicator 3"),
            (stratum, "stratum 16"),
            (other_question, "IncorrectOriginTimestamp"),
            (short, "IncorrectPayload"),
        ] {
            let reason = ask(vec![address.to_string()]).await.unwrap_err();
            assert!(reason.contains(why), "{reason}");
        }
        assert!(ask(vec![hostile.to_string()]).await.is_ok());
    }

    #[tokio::test]
    async fn who_tells_us_to_go_away_is_left_alone() {
        let (asked, mut count) = tokio::sync::mpsc::unbounded_channel();
        let address = server(move |question| {
            asked.send(()).unwrap();
            let mut answer = right(question, Duration::ZERO);
            answer[1] = 0;
            answer[12..16].copy_from_slice(b"RATE");
            answer
        })
        .await;
        let mut servers = NtpServers::new(vec![address.to_string()], Duration::from_millis(1));
        assert!(
            servers
                .ask()
                .await
                .unwrap_err()
                .contains("refuses service (RATE)")
        );
        assert!(servers.ask().await.unwrap_err().contains("refused service"));
        count.close();
        assert!(count.recv().await.is_some());
        assert!(count.recv().await.is_none(), "asked once, then left alone");
    }

    #[tokio::test]
    async fn a_closed_port_and_a_name_without_address_are_told_in_words() {
        let closed = {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.local_addr().unwrap()
        };
        let begun = Instant::now();
        let reason = ask(vec![closed.to_string()]).await.unwrap_err();
        assert!(reason.contains("port is closed"), "{reason}");
        assert!(
            begun.elapsed() < Duration::from_millis(SAMPLE_TIMEOUT_MS),
            "told at once"
        );
        let reason = ask(vec!["no-such-host.invalid:123".to_string()])
            .await
            .unwrap_err();
        assert!(reason.contains("no-such-host.invalid:123: its name"), "{reason}");
    }

    #[tokio::test]
    async fn one_server_that_answers_is_enough() {
        let address = server(|question| right(question, Duration::ZERO)).await;
        let names = vec!["no-such-host.invalid:123".to_string(), address.to_string()];
        assert_eq!(ask(names).await.unwrap().server, address.to_string());
    }
}
