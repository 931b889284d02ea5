//! Programs that get signals while they wait for an answer.

use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use super::*;

/// Longest time from a signal to the end of the program, on a busy machine.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Runs dd, which writes and waits for fsync as long as `cluster` takes no content, kills it, and checks how long it
/// took to end.
fn kill_in_fsync(mount: &TestMount, signal: i32) {
    let mut dd = Command::new("dd")
        .args([
            "if=/dev/zero",
            "bs=256k",
            "count=1",
            "conv=fsync,notrunc",
            "status=none",
        ])
        .arg(format!("of={}", mount.path("file").display()))
        .spawn()
        .unwrap();
    let wchan = format!("/proc/{}/wchan", dd.id());
    let begin = Instant::now();
    while mount.filesystem.dirty_bytes() == 0 || fs::read_to_string(&wchan).unwrap() != "request_wait_answer"
    {
        assert!(begin.elapsed() < END_LIMIT, "dd does not wait");
        std::thread::sleep(Duration::from_millis(5));
    }
    check(unsafe { libc::kill(dd.id() as i32, signal) }).unwrap();
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = dd.try_wait().unwrap() {
            break status;
        }
        assert!(
            begin.elapsed() < END_LIMIT,
            "it still waits after signal {signal}"
        );
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.signal(), Some(signal));
}

#[test]
fn a_killed_program_ends_and_its_writes_are_kept() {
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let mount = mount(&cluster, 1);
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGQUIT] {
        File::create(mount.path("file")).unwrap();
        let gate = mount.runtime.block_on(cluster.put_gate.write());
        kill_in_fsync(&mount, signal);
        assert!(mount.filesystem.dirty_bytes() > 0, "the write was dropped");
        drop(gate);
        assert_eq!(fs::read(mount.path("file")).unwrap(), vec![0; 256 << 10]);
        mount.runtime.block_on(mount.filesystem.flush_all()).unwrap();
    }
    mount.unmount();
}

/// Timers, children and profilers send signals all the time, and programs expect no EINTR from files.
#[test]
fn handled_signals_do_not_disturb_a_program() {
    static HANDLED: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn handle(_signal: libc::c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }
    if !can_mount() {
        return;
    }
    let cluster = MemoryCluster::new();
    let mount = mount(&cluster, 1);
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    check(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }).unwrap();
    let own = unsafe { libc::pthread_self() };
    let stop = AtomicBool::new(false);
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                unsafe { libc::pthread_kill(own, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let done = (0..20).try_for_each(|round| {
            // The cluster is slow from time to time, for longer than callers are left alone.
            let gate = (round % 10 == 0).then(|| mount.runtime.block_on(cluster.put_gate.write()));
            if let Some(gate) = gate {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(1_500));
                    drop(gate);
                });
            }
            let result = work(&mount, round);
            if let Err(error) = &result {
                eprintln!("round {round}: {error}");
            }
            result
        });
        stop.store(true, Ordering::Relaxed);
        done.unwrap();
    });
    assert!(began.elapsed() > Duration::from_secs(3), "it never had to wait");
    assert!(HANDLED.load(Ordering::Relaxed) >= 3, "no signals came");
    mount.unmount();
}

/// Makes every call once; the library repeats none of them.
fn work(mount: &TestMount, round: usize) -> io::Result<()> {
    let (directory, file) = (
        c_path(&mount.path(&format!("d{round}"))),
        mount.path(&format!("f{round}")),
    );
    let (path, moved) = (c_path(&file), c_path(&mount.path(&format!("m{round}"))));
    let bytes = pattern(200_000);
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    unsafe {
        check(libc::mkdir(directory.as_ptr(), 0o755))?;
        let fd = libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CREAT, 0o644);
        check(fd)?;
        for _ in 0..3 {
            check(libc::write(fd, bytes.as_ptr().cast(), bytes.len()) as i32)?;
        }
        check(libc::fsync(fd))?;
        let mut back = vec![0u8; bytes.len()];
        check(libc::pread(fd, back.as_mut_ptr().cast(), back.len(), 0) as i32)?;
        assert!(back == bytes);
        check(libc::ftruncate(fd, 7))?;
        check(libc::close(fd))?;
        check(libc::rename(path.as_ptr(), moved.as_ptr()))?;
        check(libc::stat(moved.as_ptr(), &raw mut stat))?;
        assert_eq!(stat.st_size, 7);
        check(libc::unlink(moved.as_ptr()))?;
        check(libc::rmdir(directory.as_ptr()))
    }
}
