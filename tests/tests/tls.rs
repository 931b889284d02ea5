//! Mutual TLS between nodes and mounts: everything works over it, and whoever has no certificate of the cluster's
//! authority gets nowhere.

use std::path::{Path, PathBuf};

use quorumfs_tests::environment::binary;
use quorumfs_tests::mount::{MountOptions, is_mounted};
use quorumfs_tests::shell::shell_fails;
use quorumfs_tests::{Cluster, Sandbox};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// An authority's certificate, and a certificate that it signed with its key: PEM files.
struct Papers {
    authority: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Papers {
    fn make(folder: &Path) -> Papers {
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).expect("write a PEM file");
            path
        };
        let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let issuer = CertifiedIssuer::self_signed(authority, KeyPair::generate().expect("a key"))
            .expect("an authority signs itself");
        let key = KeyPair::generate().expect("a key");
        let mut own = CertificateParams::new(vec!["127.0.0.1".to_string()]).expect("parameters");
        own.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = own.signed_by(&key, &issuer).expect("it is signed");
        Papers {
            authority: write("authority.pem", issuer.pem()),
            certificate: write("certificate.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
        }
    }

    fn options(&self) -> String {
        format!(
            "tls-ca={},tls-cert={},tls-key={}",
            self.authority.display(),
            self.certificate.display(),
            self.key.display()
        )
    }
}

#[test]
fn everything_works_over_tls_and_strangers_get_nowhere() {
    let sandbox = Sandbox::light("tls");
    let papers = Papers::make(&sandbox.make_folder("papers"));
    let text = |path: &Path| path.to_str().expect("UTF-8").to_string();
    let (authority, certificate, key) = (
        text(&papers.authority),
        text(&papers.certificate),
        text(&papers.key),
    );
    let cluster = Cluster::builder(&sandbox)
        .arguments(&[
            "--tls-ca",
            &authority,
            "--tls-cert",
            &certificate,
            "--tls-key",
            &key,
        ])
        .start();
    let mount = cluster.mount_with(MountOptions::options(&papers.options()));
    let large: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(mount.path("large"), &large).expect("write");
    std::fs::write(mount.path("small"), "small").expect("write");
    cluster.wait_at_rest();
    // What goes from node to node goes over TLS too: a follower fetches and serves, and a new leader is found.
    let old = cluster.leader();
    cluster.kill(old);
    std::fs::write(mount.path("after"), "the leader was killed").expect("write");
    assert_eq!(std::fs::read(mount.path("large")).expect("read"), large);
    let follower = cluster.followers()[0];
    let reply = cluster.http(follower).get("/upload/small").expect(&[200]);
    assert_eq!(reply.text(), "small");
    cluster.start_node(old);
    cluster.wait_ready();
    cluster.wait_at_rest();

    // One without papers, one with another authority's, one that does not trust ours.
    let strangers = Papers::make(&sandbox.make_folder("strangers"));
    let pretender = Papers {
        authority: papers.authority.clone(),
        ..Papers::make(&sandbox.make_folder("pretender"))
    };
    let place = sandbox.make_folder("stranger");
    for options in ["".to_string(), strangers.options(), pretender.options()] {
        let error = shell_fails(&format!(
            "timeout 60 '{}' -o 'timeout=5{}' '{}' '{}'",
            binary("quorumfs-mount").display(),
            if options.is_empty() {
                options
            } else {
                format!(",{options}")
            },
            cluster.members(),
            place.display()
        ));
        assert!(!is_mounted(&place), "a stranger has mounted: {error}");
        assert!(!error.is_empty() && !error.contains("panicked"), "{error}");
        eprintln!("a stranger is told: {}", error.trim());
    }
    mount.unmount();
}
