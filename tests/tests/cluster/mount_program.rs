//! The mount program: ready when it returns, gone when unmounted, whichever way it is called or ended.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use quorumfs_tests::environment::{binary, wait_for};
use quorumfs_tests::mount::{MountOptions, is_mounted};
use quorumfs_tests::posix::errno;
use quorumfs_tests::process::processes_under;
use quorumfs_tests::shell::shell_fails;
use quorumfs_tests::{Cluster, Sandbox, posix, shell};

#[test]
fn a_sub_directory_can_be_mounted() {
    let sandbox = Sandbox::light("posix-subdirectory");
    let cluster = Cluster::start(&sandbox);
    let whole = cluster.mount();
    fs::create_dir_all(whole.path("one/two words/three")).expect("mkdir");
    let options = MountOptions {
        subdirectory: Some("/one/two words".into()),
        ..MountOptions::default()
    };
    let part = cluster.mount_with(options);
    fs::write(part.path("three/file"), "same").expect("write");
    assert_eq!(
        fs::read_to_string(whole.path("one/two words/three/file")).expect("read"),
        "same"
    );
    assert_eq!(
        fs::canonicalize(part.path("three/../..")).expect("resolve"),
        sandbox.folder()
    );
    part.unmount();
    let mount = binary("quorumfs-mount");
    let place = sandbox.make_folder("nothing");
    let error = shell_fails(&format!(
        "'{}' '{}:/one/none' '{}'",
        mount.display(),
        cluster.members(),
        place.display()
    ));
    assert!(error.contains("/one/none") || error.contains("none"), "{error}");
    whole.unmount();
}

#[test]
fn a_read_only_mount_reads_only() {
    let sandbox = Sandbox::light("posix-read-only");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    fs::write(mount.path("file"), "content").expect("write");
    let read_only = cluster.mount_with(MountOptions::options("ro"));
    assert_eq!(
        fs::read_to_string(read_only.path("file")).expect("read"),
        "content"
    );
    assert_eq!(errno(fs::write(read_only.path("file"), "other")), libc::EROFS);
    assert_eq!(errno(fs::create_dir(read_only.path("directory"))), libc::EROFS);
    assert_eq!(errno(fs::remove_file(read_only.path("file"))), libc::EROFS);
    assert_eq!(
        errno(posix::set_xattr(&read_only.path("file"), "user.a", b"", 0)),
        libc::EROFS
    );
    read_only.unmount();
    mount.unmount();
}

#[test]
fn the_mount_program_returns_when_the_mount_is_ready_and_ends_with_umount() {
    let sandbox = Sandbox::light("mount-background");
    let cluster = Cluster::start(&sandbox);
    let place = sandbox.make_folder("mnt");
    let program = binary("quorumfs-mount");
    // Output to pipes: a daemon that kept them open would hang here, as it would hang `$(…)`.
    shell(&format!(
        "'{}' '{}' '{}'; mkdir '{}/made'",
        program.display(),
        cluster.members(),
        place.display(),
        place.display()
    ));
    assert!(place.join("made").is_dir());
    umount_ends_the_process(&place);
    // As mount(8) calls its helpers.
    let helper = sandbox.path("mount.quorumfs");
    std::os::unix::fs::symlink(&program, &helper).expect("make a link");
    let line = format!(
        "'{}' '{}:/made' '{}'",
        helper.display(),
        cluster.members(),
        place.display()
    );
    shell(&format!(
        "{line} -v -o rw,noatime,_netdev,nofail,user,relatime 2>/dev/null; touch '{}/file'",
        place.display()
    ));
    umount_ends_the_process(&place);
    shell(&format!("{line} -f -o ro"));
    assert!(!is_mounted(&place), "mount -f only pretends");
    let error = shell_fails(&format!("{line} -o no_such_option"));
    assert!(error.contains("no_such_option"), "{error}");
    let error = shell_fails(&format!(
        "timeout 60 '{}' 127.0.0.1:1 '{}' -o timeout=2",
        program.display(),
        place.display()
    ));
    assert!(error.contains("127.0.0.1:1"), "{error}");
}

#[track_caller]
fn umount_ends_the_process(place: &Path) {
    assert!(is_mounted(place));
    shell(&format!("umount '{}'", place.display()));
    // The mount point is the program's argument.
    let runs = || {
        let mut arguments = place.as_os_str().as_encoded_bytes().to_vec();
        arguments.push(0);
        processes_under(place.parent().expect("the sandbox"))
            .into_iter()
            .any(|id| {
                let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
                line.windows(arguments.len()).any(|window| window == arguments)
                    && !line.starts_with(b"timeout")
            })
    };
    wait_for(
        "the program ends when it is unmounted",
        Duration::from_secs(20),
        || !is_mounted(place) && !runs(),
    );
}

#[test]
fn a_dead_mount_can_be_mounted_again() {
    let sandbox = Sandbox::light("mount-dead");
    let cluster = Cluster::start(&sandbox);
    let place = sandbox.make_folder("mnt");
    let mut mount = cluster.mount_with(MountOptions::at(&place));
    fs::write(mount.path("file"), "kept").expect("write");
    mount.kill();
    assert_eq!(errno(fs::metadata(&place)), libc::ENOTCONN);
    let again = cluster.mount_with(MountOptions::at(&place));
    assert_eq!(fs::read_to_string(again.path("file")).expect("read"), "kept");
    again.unmount();
}

#[test]
fn sigterm_and_sigint_flush_and_unmount() {
    let sandbox = Sandbox::light("mount-signals");
    let cluster = Cluster::start(&sandbox);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut mount = cluster.mount();
        // Dirty bytes of a file that is still open: the worst moment.
        let mut file = File::create(mount.path(format!("{signal}"))).expect("create");
        file.write_all(&vec![9; 3_000_000]).expect("write");
        mount.signal(signal);
        wait_for("it is unmounted", Duration::from_secs(30), || {
            !is_mounted(mount.directory())
        });
        drop(file);
        assert!(mount.wait_ended(Duration::from_secs(60)).success());
        let again = cluster.mount();
        assert_eq!(
            fs::read(again.path(format!("{signal}"))).expect("read"),
            vec![9; 3_000_000]
        );
        again.unmount();
    }
}
