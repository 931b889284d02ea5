//! Who answers, whose clock is right, and whether a node can serve: as an administrator and a load balancer see it.

use std::fs;
use std::io::Write as _;
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use quorumfs_tests::environment::{Finally, wait_for};
use quorumfs_tests::mount::MountOptions;
use quorumfs_tests::process::ManagedProcess;
use quorumfs_tests::proxy::{Fault, Victim};
use quorumfs_tests::{Cluster, Mount, Sandbox, shell, wait_until};
use serde_json::Value;

/// Probes this often, tests of what is found need not wait long.
const QUICK: [&str; 2] = ["--probe-interval-ms", "300"];
/// Two intervals of 5 s, and a time-out of 2 s for each probe, on a loaded machine.
const JUDGED_LIMIT: Duration = Duration::from_secs(20);
/// Within so long of losing the quorum, or of its return, a node says so.
const TOLD_LIMIT: Duration = Duration::from_secs(10);
/// For what needs a few quick rounds.
const ROUNDS_LIMIT: Duration = Duration::from_secs(20);
/// So often a leader is tried whose leadership moves on.
const LEAP_ATTEMPTS_MAX: usize = 3;

fn health(cluster: &Cluster, slot: usize) -> Value {
    cluster.http(slot).get("/health/status").expect(&[200]).json()
}

/// The strings of a list.
fn texts(value: &Value) -> Vec<String> {
    let list = value.as_array().unwrap_or_else(|| panic!("not a list: {value}"));
    list.iter()
        .map(|text| text.as_str().expect("a string").to_string())
        .collect()
}

/// What `report` says of the node `slot`, in one of its lists (`peers` or `nodes`).
fn entry(report: &Value, list: &str, slot: usize) -> Value {
    let entries = report[list].as_array().expect("a list");
    let found = entries.iter().find(|entry| entry["slot"] == slot);
    found.cloned().unwrap_or_else(|| panic!("no {slot} in {report}"))
}

/// Waits until every node finds all healthy; a panic shows the last report that did not.
fn wait_healthy(cluster: &Cluster, limit: Duration) {
    let begun = Instant::now();
    for slot in cluster.running() {
        loop {
            let last = match cluster.http(slot).try_get("/health/status") {
                Ok(reply) if reply.status == 200 => reply.json(),
                other => Value::String(format!("{other:?}")),
            };
            if last["healthy"] == true {
                break;
            }
            assert!(
                begun.elapsed() < limit,
                "node {slot} does not find all healthy: {last}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The message of `GET /readyz` if the node is not ready.
fn not_ready(cluster: &Cluster, slot: usize) -> Option<String> {
    let reply = cluster.http(slot).get("/readyz").expect(&[200, 503]);
    let body: Value = reply.json();
    match reply.status {
        200 => {
            assert_eq!(body["ready"], true);
            None
        }
        _ => {
            assert_eq!(body["code"], "not_ready", "{body}");
            Some(body["message"].as_str().expect("a message").to_string())
        }
    }
}

#[test]
fn a_dead_node_is_named_within_20_s_and_healthy_again_when_it_is_back() {
    let sandbox = Sandbox::light("health-dead");
    // With the interval that everybody has.
    let cluster = Cluster::start(&sandbox);
    wait_healthy(&cluster, JUDGED_LIMIT);
    let report = health(&cluster, 1);
    assert_eq!(report["probe_interval_ms"], 5000);
    assert!(texts(&report["problems"]).is_empty(), "{report}");
    assert_eq!(report["views"].as_array().map(Vec::len), Some(3), "{report}");
    let peer = entry(&report, "peers", 2);
    assert_eq!(
        (&peer["state"], &peer["failures_in_row"]),
        (&"healthy".into(), &0.into())
    );
    for time in ["last_us", "mean_us", "p99_us"] {
        let time = peer["response"][time].as_u64().expect("a time");
        assert!((1..2_000_000).contains(&time), "{peer}");
    }
    assert!(
        peer["clock_ahead_us"].as_i64().expect("a clock").abs() < 500_000,
        "{peer}"
    );
    println!("response times: {}", peer["response"]);

    let dead = cluster.followers()[0];
    let lives = cluster.running().into_iter().filter(|slot| *slot != dead);
    let lives: Vec<usize> = lives.collect();
    cluster.kill(dead);
    let begun = Instant::now();
    for slot in &lives {
        wait_for("the dead node is unhealthy", JUDGED_LIMIT, || {
            entry(&health(&cluster, *slot), "peers", dead)["state"] == "unhealthy"
        });
    }
    println!("named after {:?}", begun.elapsed());
    assert!(begun.elapsed() < JUDGED_LIMIT);
    for slot in &lives {
        // The other one's view comes with the next probe.
        let problems = wait_until("the merged view says so in words", JUDGED_LIMIT, || {
            let report = health(&cluster, *slot);
            let merged = entry(&report, "nodes", dead)["state"] == "unhealthy";
            merged.then(|| (texts(&report["problems"]), texts(&report["partitions"])))
        });
        assert!(
            problems.0[0].starts_with(&format!("node {dead} is unhealthy: no node reaches it")),
            "{problems:?}"
        );
        assert!(problems.1.is_empty(), "death is not a partition: {problems:?}");
        assert_eq!(cluster.http(*slot).get("/healthz").status, 200);
        assert_eq!(not_ready(&cluster, *slot), None, "two of three are a quorum");
        cluster.wait_log(*slot, &["node is unhealthy"], JUDGED_LIMIT);
    }
    cluster.start_node(dead);
    cluster.wait_ready();
    let begun = Instant::now();
    wait_healthy(&cluster, JUDGED_LIMIT);
    println!("healthy again {:?} after it was back", begun.elapsed());
    for slot in lives {
        let told = |text: &str| cluster.log(slot).matches(text).count();
        cluster.wait_log(slot, &["node is healthy again"], JUDGED_LIMIT);
        assert_eq!(
            (told("node is unhealthy"), told("node is healthy again")),
            (1, 1),
            "told once"
        );
    }
}

/// Kills two of three and looks at the one that is left; then starts them again.
fn the_last_one_says_why(cluster: &Cluster, last: usize) {
    let killed: Vec<usize> = cluster.slots().filter(|slot| *slot != last).collect();
    killed.iter().for_each(|slot| cluster.kill(*slot));
    let begun = Instant::now();
    let why = wait_until("/readyz of the last node is 503", TOLD_LIMIT, || {
        not_ready(cluster, last).filter(|why| killed.iter().all(|slot| why.contains(&format!("node {slot}"))))
    });
    println!("/readyz after {:?}: {why}", begun.elapsed());
    let status = wait_until("/status of the last node says why", TOLD_LIMIT, || {
        cluster.status(last).ok().filter(|status| {
            let named = |slot: &usize| {
                let reason = status.reason.as_deref().unwrap_or_default();
                reason.contains(&format!("node {slot}"))
            };
            !status.writable && killed.iter().all(named)
        })
    });
    println!("/status after {:?}: {:?}", begun.elapsed(), status.reason);
    assert!(begun.elapsed() < TOLD_LIMIT, "{:?}", begun.elapsed());
    assert_eq!(
        cluster.http(last).get("/healthz").status,
        200,
        "the process serves"
    );

    killed.iter().for_each(|slot| cluster.start_node(*slot));
    let begun = Instant::now();
    for slot in cluster.slots() {
        wait_for("ready after the return", TOLD_LIMIT, || {
            cluster
                .http(slot)
                .try_get("/readyz")
                .is_ok_and(|reply| reply.status == 200)
        });
    }
    println!("all ready {:?} after the return", begun.elapsed());
    let path = format!("/upload/after-{last}");
    cluster.http(last).post(&path, "back").expect(&[201]);
    for slot in cluster.slots() {
        assert_eq!(cluster.http(slot).get(&path).expect(&[200]).body, b"back");
    }
}

#[test]
fn without_a_quorum_the_last_node_says_why_within_10_s() {
    let sandbox = Sandbox::heavy("health-quorum");
    let cluster = Cluster::start(&sandbox);
    for slot in cluster.slots() {
        wait_for("ready", TOLD_LIMIT, || not_ready(&cluster, slot).is_none());
    }
    the_last_one_says_why(&cluster, cluster.leader());
    cluster.wait_ready();
    the_last_one_says_why(&cluster, cluster.followers()[0]);
}

#[test]
fn a_node_that_waits_for_its_cluster_is_alive_but_not_ready() {
    let sandbox = Sandbox::light("health-waits");
    let cluster = Cluster::builder(&sandbox).build();
    cluster.start_node(1);
    wait_for("it serves", TOLD_LIMIT, || {
        cluster.http(1).try_get("/healthz").is_ok()
    });
    assert_eq!(cluster.http(1).get("/healthz").status, 200);
    let why = not_ready(&cluster, 1).expect("it is not ready");
    println!("{why}");
    cluster.http(1).get("/health/status").expect(&[503]);
}

#[test]
fn a_single_node_is_healthy_and_ready_however_long_it_is_idle() {
    let sandbox = Sandbox::light("health-single");
    let cluster = Cluster::builder(&sandbox).nodes(1).start();
    wait_for("ready", TOLD_LIMIT, || not_ready(&cluster, 1).is_none());
    // Above twice the longest election: a leader of three that heard nothing for so long has lost its quorum.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(not_ready(&cluster, 1), None);
    assert!(cluster.status(1).expect("it answers").writable);
    assert_eq!(health(&cluster, 1)["healthy"], true);
}

#[test]
fn partitions_are_named_with_their_direction_by_every_node() {
    let sandbox = Sandbox::light("health-partition");
    let cluster = Cluster::builder(&sandbox).proxied().arguments(&QUICK).start();
    wait_healthy(&cluster, ROUNDS_LIMIT);
    let followers = cluster.followers();
    let (a, b) = (followers[0], followers[1]);
    let third = cluster
        .slots()
        .find(|slot| !followers.contains(slot))
        .expect("three nodes");
    let all_say = |what: &dyn Fn(&[String]) -> bool| {
        for slot in cluster.slots() {
            let begun = Instant::now();
            loop {
                let report = health(&cluster, slot);
                if what(&texts(&report["partitions"])) {
                    break;
                }
                assert!(
                    begun.elapsed() < ROUNDS_LIMIT,
                    "node {slot} does not see it: {report}"
                );
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    };
    // What a calls of b does not arrive.
    let cuts = |from: usize, to: usize| {
        let caller = Victim::Process(cluster.process_id(from));
        cluster.proxy(to).set(Fault::Refuse, caller);
    };
    cuts(a, b);
    let words = format!("one-way partition: node {b} reaches node {a}, but node {a} does not reach node {b}");
    all_say(&|partitions| partitions == [words.clone()]);
    let report = health(&cluster, third);
    assert_eq!(entry(&report, "nodes", b)["state"], "disputed", "{report}");
    println!("{words}");
    // And the other way too.
    cuts(b, a);
    let (low, high) = (a.min(b), a.max(b));
    let words =
        format!("node {low} and node {high} do not reach each other, though node {third} reaches both");
    all_say(&|partitions| partitions.len() == 1 && partitions[0].starts_with(&words));
    println!("{words}");
    assert_eq!(
        not_ready(&cluster, a),
        None,
        "it reaches the leader, and the leader a quorum"
    );
    cluster.proxy(a).heal();
    cluster.proxy(b).heal();
    wait_healthy(&cluster, ROUNDS_LIMIT);
}

/// A real NTP server at `port` of loopback, which says that its own clock is right and touches no clock.
fn chrony(sandbox: &Sandbox, port: u16) -> ManagedProcess {
    if Command::new("chronyd").arg("--version").output().is_err() {
        shell("apt-get update -qq && apt-get install -y -qq chrony >/dev/null 2>&1");
    }
    let folder = sandbox.make_folder("chrony");
    let config = folder.join("chrony.conf");
    let lines = format!(
        "port {port}\nbindaddress 127.0.0.1\nallow 127.0.0.1\nlocal stratum 8\ncmdport 0\n\
         bindcmdaddress {0}/socket\npidfile {0}/pid\ndriftfile {0}/drift\n",
        folder.display()
    );
    fs::write(&config, lines).expect("write chrony's configuration");
    let mut command = Command::new("chronyd");
    command.args(["-x", "-d", "-u", "root", "-f"]).arg(&config);
    ManagedProcess::start("chronyd", command, &sandbox.log_path("chronyd"))
}

/// An NTP server at `port` of loopback whose clock is `ahead` of this machine's. Ends when dropped.
struct WrongServer(Arc<AtomicBool>);

impl WrongServer {
    fn start(port: u16, ahead: Duration) -> WrongServer {
        let socket = UdpSocket::bind(("127.0.0.1", port)).expect("bind the wrong server");
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .expect("set a time-out");
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        std::thread::spawn(move || {
            let mut question = [0; 48];
            while !ended.load(Ordering::Relaxed) {
                let Ok((48, from)) = socket.recv_from(&mut question) else {
                    continue;
                };
                let _ = socket.send_to(&wrong_answer(&question, ahead), from);
            }
        });
        WrongServer(over)
    }
}

impl Drop for WrongServer {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Stratum 1, no leap, version 4: all is well, but for the time.
fn wrong_answer(question: &[u8; 48], ahead: Duration) -> [u8; 48] {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970") + ahead;
    let fraction = (u64::from(now.subsec_nanos()) << 32) / 1_000_000_000;
    let stamp = (((now.as_secs() + 2_208_988_800) << 32) | fraction).to_be_bytes();
    let mut answer = [0; 48];
    answer[..4].copy_from_slice(&[0x24, 1, 0, 0xec]);
    answer[24..32].copy_from_slice(&question[40..]);
    answer[32..40].copy_from_slice(&stamp);
    answer[40..].copy_from_slice(&stamp);
    answer
}

#[test]
fn clocks_are_compared_with_ntp_servers_right_wrong_and_none() {
    let sandbox = Sandbox::light("health-clock");
    let port = sandbox.port();
    let server = format!("127.0.0.1:{port}");
    let arguments = [&QUICK[..], &["--ntp", &server, "--ntp-interval-ms", "500"]].concat();
    let cluster = Cluster::builder(&sandbox).arguments(&arguments).start();
    let clock = |slot| -> Value { cluster.http(slot).get("/status").json::<Value>()["clock"].clone() };
    let all_are = |state: &str| {
        for slot in cluster.slots() {
            wait_for(
                &format!("the clock of node {slot} is {state}"),
                ROUNDS_LIMIT,
                || clock(slot)["state"] == state,
            );
        }
    };
    // Nobody answers: it is told, and everything works.
    all_are("unsynchronized");
    wait_for("it is named in health", ROUNDS_LIMIT, || {
        let problems = texts(&health(&cluster, 1)["clock_problems"]);
        cluster.slots().all(|slot| {
            let begins = format!("the clock of node {slot} is unsynchronized: no NTP server answers");
            problems.iter().any(|problem| problem.starts_with(&begins))
        })
    });
    assert!(clock(1)["reason"].as_str().expect("a reason").contains(&server));
    wait_for("ready all the same", TOLD_LIMIT, || {
        not_ready(&cluster, 1).is_none()
    });
    cluster.http(2).post("/upload/without", "time").expect(&[201]);

    // A real server.
    let mut chronyd = chrony(&sandbox, port);
    all_are("synchronized");
    let report = clock(1);
    println!("by chrony: {report}");
    assert_eq!(
        (&report["stratum"], &report["server"]),
        (&8.into(), &server.as_str().into())
    );
    let number = |name: &str| {
        report[name]
            .as_i64()
            .unwrap_or_else(|| panic!("no {name} in {report}"))
    };
    assert!(
        number("offset_us").abs() <= number("uncertainty_us") + 1_000,
        "{report}"
    );
    assert!((1..200_000).contains(&number("delay_us")), "{report}");
    assert!(number("uncertainty_us") < 200_000, "{report}");
    wait_healthy(&cluster, ROUNDS_LIMIT);

    // It ends; another answers in its place, and is wrong.
    chronyd.kill();
    let wrong = WrongServer::start(port, Duration::from_secs(5));
    all_are("skewed");
    let offset = clock(1)["offset_us"].as_i64().expect("an offset");
    assert!(offset.abs_diff(5_000_000) < 200_000, "{offset}");
    wait_for("it is named in health", ROUNDS_LIMIT, || {
        let report = health(&cluster, 3);
        let named = |slot| {
            let words = format!("the clock of node {slot} is skewed: 5.0 s behind its NTP server");
            texts(&report["problems"]).contains(&words)
        };
        report["healthy"] == false && cluster.slots().all(named)
    });
    // Some rounds more: it is told once, not in every round.
    let rounds = clock(1)["rounds"].as_u64().expect("a count");
    wait_for("more rounds", ROUNDS_LIMIT, || {
        clock(1)["rounds"].as_u64() > Some(rounds + 3)
    });
    drop(wrong);
    all_are("unsynchronized");
    cluster.http(3).post("/upload/still", "without").expect(&[201]);
    for slot in cluster.slots() {
        let told = |text: &str| cluster.log(slot).matches(text).count();
        assert_eq!(told("clock of this node is synchronized"), 1, "node {slot}");
        assert_eq!(told("clock of this node is skewed"), 1, "node {slot}");
        assert_eq!(
            told("clock of this node is unsynchronized"),
            2,
            "node {slot}: before and after"
        );
    }
}

/// libfaketime, which shows a process another time than the machine's.
fn faketime_library() -> String {
    let find = || {
        let folders = fs::read_dir("/usr/lib").ok()?.flatten();
        let mut paths = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1"));
        paths.find(|path| path.is_file())
    };
    if find().is_none() {
        shell("apt-get update -qq && apt-get install -y -qq faketime >/dev/null 2>&1");
    }
    let found = find().expect("the Debian package `faketime` has the library");
    found.to_str().expect("UTF-8").to_string()
}

/// Makes a directory in a mount, and answers how far its time of change is ahead of this machine's, in seconds.
fn stamped_ahead(folder: &Path) -> i64 {
    fs::create_dir(folder).expect("mkdir");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let stamp = fs::metadata(folder).expect("stat").ctime();
    stamp - i64::try_from(now.as_secs()).expect("fits")
}

#[test]
fn a_leader_whose_clock_leaps_ahead_does_not_stamp_with_it() {
    let sandbox = Sandbox::light("health-leap");
    let library = faketime_library();
    let shift = |slot: usize| sandbox.path(format!("shift-{slot}"));
    let mut builder = Cluster::builder(&sandbox).arguments(&QUICK);
    for slot in 1..=3 {
        fs::write(shift(slot), "+0\n").expect("write the shift");
        builder = builder
            .variable(slot, "LD_PRELOAD", &library)
            .variable(
                slot,
                "FAKETIME_TIMESTAMP_FILE",
                shift(slot).to_str().expect("UTF-8"),
            )
            .variable(slot, "FAKETIME_NO_CACHE", "1")
            // Only what clocks on the wall show; time-outs run as they do.
            .variable(slot, "FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }
    let cluster = builder.start();
    let mount = cluster.mount();
    wait_healthy(&cluster, ROUNDS_LIMIT);
    assert!(stamped_ahead(&mount.path("before")).abs() <= 1);

    // If leadership moves meanwhile (the machine is loaded), nothing was tested of the one that leapt.
    let tested = (0..LEAP_ATTEMPTS_MAX).any(|attempt| a_leap(&cluster, &mount, attempt, &shift));
    assert!(tested, "leadership moved each time");
}

/// What a leap of the leader's clock does, forwards and back; answers whether it led throughout.
fn a_leap(cluster: &Cluster, mount: &Mount, attempt: usize, shift: &impl Fn(usize) -> PathBuf) -> bool {
    let make = |name: &str| mount.path(format!("{name}-{attempt}"));
    let leader = cluster.leader();
    let set_shift = |shift_s: &str| fs::write(shift(leader), shift_s).expect("write the shift");
    let _in_the_end = Finally(|| set_shift("+0\n"));
    set_shift("+3600\n");
    // From the first command on, before any probe could tell.
    let ahead = stamped_ahead(&make("at-once"));
    assert!(ahead.abs() <= 2, "stamped {ahead} s ahead");
    let problem = wait_until("health names the clock", ROUNDS_LIMIT, || {
        let problems = texts(&health(cluster, leader)["clock_problems"]);
        problems
            .into_iter()
            .find(|problem| problem.contains("does not stamp"))
    });
    println!("{problem}");
    cluster.wait_log(leader, &["commands are not stamped with it"], ROUNDS_LIMIT);
    let other = cluster.slots().find(|slot| *slot != leader).expect("three nodes");
    wait_for("the others name it too", ROUNDS_LIMIT, || {
        let begins = [3599, 3600].map(|ahead_s| format!("the clock of node {leader} is {ahead_s}."));
        let words = texts(&health(cluster, other)["problems"]);
        let named = |word: &String| begins.iter().any(|begins| word.starts_with(begins));
        words.iter().any(named)
    });
    let ahead = stamped_ahead(&make("later"));
    assert!(ahead.abs() <= 2, "stamped {ahead} s ahead");

    // Mended: as before. And backwards, stamps go on from the last.
    set_shift("+0\n");
    wait_healthy(cluster, ROUNDS_LIMIT);
    assert!(stamped_ahead(&make("mended")).abs() <= 1);
    let before = fs::metadata(make("mended")).expect("stat");
    set_shift("-3600\n");
    fs::create_dir(make("backwards")).expect("mkdir");
    let after = fs::metadata(make("backwards")).expect("stat");
    let stamp = |metadata: &fs::Metadata| (metadata.ctime(), metadata.ctime_nsec());
    assert!(
        stamp(&after) > stamp(&before),
        "time runs on: {before:?} {after:?}"
    );
    // Slowly, but it does not stand still.
    std::thread::sleep(Duration::from_secs(1));
    fs::create_dir(make("onwards")).expect("mkdir");
    let onwards = fs::metadata(make("onwards")).expect("stat");
    let nanoseconds = |metadata: &fs::Metadata| metadata.ctime() * 1_000_000_000 + metadata.ctime_nsec();
    let step = nanoseconds(&onwards) - nanoseconds(&after);
    assert!(step > 100_000_000, "{step} ns in a second: time stands still");
    cluster.leader() == leader
}

#[test]
fn a_mount_whose_clock_is_an_hour_behind_stamps_what_is_written_with_the_leaders() {
    let sandbox = Sandbox::light("health-mount-clock");
    let cluster = Cluster::start(&sandbox);
    let variables = [
        ("LD_PRELOAD", faketime_library()),
        ("FAKETIME", String::from("-3600")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", String::from("1")),
    ];
    let mount = cluster.mount_with(MountOptions {
        variables: variables.map(|(name, value)| (name.to_string(), value)).to_vec(),
        ..MountOptions::default()
    });
    let mtime = |name: &str| {
        fs::metadata(mount.path(name))
            .expect("stat")
            .modified()
            .expect("mtime")
    };
    let mut object = fs::File::create(mount.path("obj.o")).expect("create");
    for round in 0..3 {
        // As `touch src.c` does; then the compiler writes.
        let source = fs::File::create(mount.path("src.c")).expect("create");
        nix::sys::stat::futimens(&source, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW).expect("touch");
        let touched = mtime("src.c");
        object.write_all(b"code").expect("write");
        let written = mtime("obj.o");
        assert!(written >= touched, "round {round}: {written:?} after {touched:?}");
        object.sync_all().expect("fsync");
        assert_eq!(mtime("obj.o"), written, "round {round}: the time of the write");
        let now = SystemTime::now();
        let off = now
            .duration_since(written)
            .unwrap_or_else(|ahead| ahead.duration());
        assert!(off < Duration::from_secs(60), "round {round}: {off:?} off");
    }
    mount.unmount();
}
