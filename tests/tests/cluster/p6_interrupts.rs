//! P6: a program that waits for a quorum can be killed, and a mount that waits for one can be taken away.

use std::fs;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use quorumfs_tests::environment::{wait_for, workspace_folder};
use quorumfs_tests::mount::is_mounted;
use quorumfs_tests::process::spawn;
use quorumfs_tests::{Cluster, Sandbox, shell};

/// From a signal to the end of a program: a second, and what a busy machine adds.
const END_LIMIT: Duration = Duration::from_secs(8);
/// From its start until a program waits for an answer.
const BLOCK_LIMIT: Duration = Duration::from_secs(20);

/// A shell script and what it starts, in a process group of its own.
struct Program {
    what: &'static str,
    child: Child,
}

impl Program {
    /// Runs `script` in the folder `at`.
    fn start(what: &'static str, at: &Path, script: &str) -> Program {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .current_dir(at)
            .env("LC_ALL", "C")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = spawn(command).unwrap_or_else(|error| panic!("start {what}: {error}"));
        Program { what, child }
    }

    /// The processes of the group, but for those that have ended.
    fn members(&self) -> Vec<u32> {
        let of_group = |id: &u32| {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
            let fields: Vec<&str> = fields.split(' ').collect();
            fields.first().is_some_and(|state| *state != "Z")
                && fields.get(2).and_then(|group| group.parse().ok()) == Some(self.child.id())
        };
        let processes = fs::read_dir("/proc").expect("Linux has /proc");
        let ids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        ids.filter(of_group).collect()
    }

    /// Waits until one of them waits for an answer of the mount.
    fn wait_blocked(&self) {
        wait_for(&format!("{} waits for the mount", self.what), BLOCK_LIMIT, || {
            self.members().iter().any(|id| {
                let place = fs::read_to_string(format!("/proc/{id}/wchan")).unwrap_or_default();
                place == "request_wait_answer"
            })
        });
    }

    fn signal(&self, signal: Signal) {
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("process ids fit"));
        killpg(group, signal).unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.what));
    }

    /// Waits until all of them have ended.
    fn wait_ended(self) -> ExitStatus {
        self.wait_ended_within(END_LIMIT)
    }

    fn wait_ended_within(mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        wait_for(&format!("{} ends", self.what), limit, || {
            // The shell first: until it is waited for it is one of the group.
            let ended = self.child.try_wait().expect("wait for a program").is_some();
            ended && self.members().is_empty()
        });
        eprintln!("{} ended after {:?}", self.what, start.elapsed());
        self.child.wait().expect("it has ended")
    }
}

fn stop_quorum(cluster: &Cluster<'_>) -> Vec<usize> {
    let followers = cluster.followers();
    followers.iter().for_each(|slot| cluster.kill(*slot));
    followers
}

#[test]
fn p6_programs_that_wait_for_a_quorum_can_be_killed() {
    let sandbox = Sandbox::light("p6-kill-waiting");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    // A folder for each: the kernel lets only one at a time change a folder.
    const LAST: &str = "write";
    let programs = [
        ("ls", "exec ls"),
        ("df", "exec df ."),
        ("cat", "exec cat file"),
        ("mkdir", "exec mkdir new"),
        ("rm", "exec rm -f file"),
        ("mv", "exec mv file elsewhere"),
        ("truncate", "exec truncate -s 5 file"),
        (
            "fsync",
            "exec dd if=/dev/zero bs=4k count=1 conv=notrunc,fsync >&3",
        ),
        ("append", "exec dd if=/dev/zero bs=1M count=2 conv=notrunc >&4"),
        ("close", "printf kept >&3; exec 3>&-"),
        // Without a redirection of its own, at whose end the shell would close a copy and wait for that.
        ("exit", "exec >&3; printf kept; kill -9 $$"),
        // When it has filled the room for what is written, all others that write wait for that.
        (LAST, "exec dd if=/dev/zero bs=1M count=200 conv=notrunc >&3"),
    ];
    for (what, _) in programs {
        fs::create_dir(mount.path(what)).expect("mkdir");
        fs::write(mount.path(what).join("file"), "before").expect("write");
    }
    // The fullest case for what is half-done: a change is under way in any moment.
    fs::create_dir(mount.path("loop")).expect("mkdir");
    let made = sandbox.path("made");
    let script = format!(
        "i=0; while mkdir $i; do echo $i >>'{}'; i=$((i+1)); done",
        made.display()
    );
    let looping = Program::start("loop", &mount.path("loop"), &script);
    wait_for("directories are made", BLOCK_LIMIT, || {
        fs::read_to_string(&made).is_ok_and(|text| text.lines().count() > 5)
    });
    let gate = sandbox.path("gate");
    let opened: Vec<Program> = programs
        .iter()
        .map(|(what, script)| {
            let wait = format!(
                "exec 3<>file 4>>file; : >'{gate}.{what}'; until [ -e '{gate}.{go}' ]; do sleep 0.05; done; {script}",
                gate = gate.display(),
                go = if *what == LAST { "last" } else { "go" },
            );
            Program::start(what, &mount.path(what), &wait)
        })
        .collect();
    for (what, _) in programs {
        let ready = format!("{}.{what}", gate.display());
        wait_for("the file is open", BLOCK_LIMIT, || Path::new(&ready).exists());
    }
    let stopped = stop_quorum(&cluster);
    let open_gate = |go: &str| fs::write(gate.with_extension(go), "").expect("open the gate");
    open_gate("go");
    let unmounting = Program::start(
        "umount",
        &sandbox.path(""),
        &format!("exec umount '{}'", mount.directory().display()),
    );
    // Blocked, each is killed; the others wait on.
    for program in &opened {
        match program.what {
            LAST => open_gate("last"),
            // The kernel does not make a process wait that ends.
            "exit" => continue,
            _ => {}
        }
        program.wait_blocked();
    }
    unmounting.wait_blocked();
    looping.wait_blocked();
    looping.signal(Signal::SIGINT);
    looping.wait_ended();
    for program in opened.into_iter().chain([unmounting]) {
        let what = program.what;
        if what != "exit" {
            program.signal(Signal::SIGKILL);
        }
        assert_eq!(program.wait_ended().signal(), Some(libc::SIGKILL), "{what}");
    }

    for slot in stopped {
        cluster.start_node(slot);
    }
    cluster.wait_ready();
    // What is decided now stays: nothing of those that were killed comes later.
    let listing = || {
        shell(&format!(
            "cd '{}' && mkdir -p after && ls loop mkdir mv rm",
            mount.directory().display()
        ))
    };
    let listed = listing();
    let text = fs::read_to_string(&made).expect("read what was made");
    let acknowledged = text.lines().count();
    let present = fs::read_dir(mount.path("loop")).expect("list").count();
    assert!(
        (acknowledged..=acknowledged + 1).contains(&present),
        "{present} directories, of which {acknowledged} were acknowledged"
    );
    for what in ["close", "exit"] {
        let file = mount.path(what).join("file");
        assert_eq!(
            fs::read(file).expect("read"),
            b"keptre",
            "what was written before the kill ({what})"
        );
    }
    fs::create_dir_all(mount.path("mkdir/new")).expect("what was interrupted can be done again");
    fs::remove_dir(mount.path("mkdir/new")).expect("and undone");
    std::thread::sleep(Duration::from_secs(2));
    let new = |text: &str| text.replace("\nnew\n", "\n");
    assert_eq!(new(&listing()), new(&listed));
    mount.unmount();
}

/// `ls` resets the terminal's colours in its handler; shells run their traps.
#[test]
fn p6_a_handled_interrupt_ends_a_call_that_only_asks() {
    let sandbox = Sandbox::light("p6-handled");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    fs::create_dir(mount.path("folder")).expect("mkdir");
    let script = format!(
        "trap 'exit 3' INT; while [ -d '{}' ]; do :; done",
        mount.path("folder").display()
    );
    let asking = Program::start("trap", &sandbox.path(""), &script);
    let changing = {
        let script = "trap 'exit 3' USR1; i=0; while : >$i; do i=$((i+1)); done";
        Program::start("changing", &mount.path("folder"), script)
    };
    let stopped = stop_quorum(&cluster);
    asking.wait_blocked();
    changing.wait_blocked();
    changing.signal(Signal::SIGUSR1);
    asking.signal(Signal::SIGINT);
    assert_eq!(asking.wait_ended().code(), Some(3));
    for slot in stopped {
        cluster.start_node(slot);
    }
    assert_eq!(
        changing.wait_ended_within(Duration::from_secs(40)).code(),
        Some(3),
        "no call fails"
    );
    mount.unmount();
}

#[test]
fn p6_a_mount_without_a_quorum_can_be_taken_away() {
    let sandbox = Sandbox::light("p6-take-away");
    let cluster = Cluster::start(&sandbox);
    let [mut forced, mut lazy, mut ended, script] = std::array::from_fn(|_| cluster.mount());
    for mount in [&forced, &lazy, &ended] {
        fs::write(mount.path("file"), "text").expect("write");
    }
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(ended.path("file")).expect("stat"));
    let dirty = format!(
        // The kernel asks about capabilities before the first write, which nobody could answer later.
        "exec 3<>file; printf old >&3; : >'{0}'; until [ -e '{0}.go' ]; do sleep 0.05; done; printf new >&3; exec 3>&-",
        sandbox.path("gate").display()
    );
    let writing = Program::start("writer", ended.directory(), &dirty);
    wait_for("the file is open", BLOCK_LIMIT, || sandbox.path("gate").exists());
    stop_quorum(&cluster);
    fs::write(sandbox.path("gate.go"), "").expect("open the gate");
    writing.wait_blocked();
    // Not begun in the folder: who starts a program waits until it is there.
    let read = format!("exec cat '{}'", forced.path("file").display());
    let reading = Program::start("cat", &sandbox.path(""), &read);
    reading.wait_blocked();

    // The kernel refuses the first where something is in use, and lets go of it all the same.
    let at = forced.directory().display().to_string();
    let _busy =
        Program::start("umount -f", &sandbox.path(""), &format!("exec umount -f '{at}'")).wait_ended();
    reading.wait_ended();
    wait_for("the mount is gone", Duration::from_secs(20), || {
        !is_mounted(forced.directory())
    });
    assert!(forced.wait_ended(Duration::from_secs(30)).success());

    let at = lazy.directory().display().to_string();
    let detaching = Program::start("umount -l", &sandbox.path(""), &format!("exec umount -l '{at}'"));
    assert!(detaching.wait_ended().success());
    assert!(!is_mounted(lazy.directory()));
    lazy.wait_ended(Duration::from_secs(30));

    cluster_script(&sandbox, script.directory());
    assert!(!is_mounted(script.directory()));

    // The first asks to write what is dirty, the second not to wait for it.
    ended.signal(Signal::SIGTERM);
    ended.signal(Signal::SIGTERM);
    // Half a minute for those that use it, then as much as is tried to write and to say goodbye.
    assert!(!ended.wait_ended(Duration::from_secs(70)).success());
    let log = ended.log();
    let line = log
        .lines()
        .find(|line| line.contains("did not reach the cluster and are lost"));
    let line = line.unwrap_or_else(|| panic!("nothing is said of what is lost: {log}"));
    assert!(
        line.contains("bytes=") && line.contains(&inode.to_string()),
        "{line}"
    );
    assert!(!is_mounted(ended.directory()));
}

/// `scripts/cluster.sh status` and `down` of a cluster of one dead node and this mount.
fn cluster_script(sandbox: &Sandbox, mount: &Path) {
    let state = sandbox.make_folder("script");
    let settings = format!(
        "declare -g data='{0}'\ndeclare -g mount='{1}'\ndeclare -ga made=()\ndeclare -g nodes='1'\n\
         declare -g grpc_port='1'\ndeclare -g http_port='1'\n",
        state.display(),
        mount.display()
    );
    fs::write(state.join("cluster.env"), settings).expect("write the script's settings");
    let run = |action: &str| {
        let script = workspace_folder().join("scripts/cluster.sh");
        shell(&format!(
            "QUORUMFS_STATE='{}' timeout 60 '{}' {action} 2>&1",
            state.display(),
            script.display()
        ))
    };
    let status = run("status");
    assert!(
        status.contains(&format!("mounted at {}", mount.display())),
        "{status}"
    );
    let down = run("down --keep");
    assert!(down.contains("is detached") && down.contains("stopped"), "{down}");
}
