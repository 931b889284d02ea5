//! Mutual TLS between nodes and mounts: everything works over it, and whoever has no certificate of the cluster's
//! authority gets nowhere. A mount's certificate does not open what is for nodes alone.

use std::path::{Path, PathBuf};

use quorumfs_tests::environment::binary;
use quorumfs_tests::mount::{MountOptions, is_mounted};
use quorumfs_tests::shell::shell_fails;
use quorumfs_tests::{Cluster, Sandbox};
use quorumfs_wire::RaftMessage;
use quorumfs_wire::peer_client::PeerClient;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// Signs certificates.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// An authority's certificate, and a certificate that it signed with its key: PEM files.
struct Papers {
    authority: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new() -> Authority {
        let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let issuer = CertifiedIssuer::self_signed(authority, KeyPair::generate().expect("a key"));
        Authority {
            issuer: issuer.expect("an authority signs itself"),
        }
    }

    /// A certificate with a role, or without one.
    fn papers(&self, folder: &Path, role: Option<&str>) -> Papers {
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).expect("write a PEM file");
            path
        };
        let key = KeyPair::generate().expect("a key");
        let mut own = CertificateParams::new(vec!["127.0.0.1".to_string()]).expect("parameters");
        let uri = role.map(|role| SanType::URI(role.try_into().expect("ASCII")));
        own.subject_alt_names.extend(uri);
        own.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = own.signed_by(&key, &self.issuer).expect("it is signed");
        Papers {
            authority: write("authority.pem", self.issuer.pem()),
            certificate: write("certificate.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
        }
    }
}

impl Papers {
    /// What a node answers to a vote that is asked for with these papers.
    fn ask_for_a_vote(&self, address: &str) -> tonic::Code {
        let read = |path: &Path| std::fs::read(path).expect("read a PEM file");
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read(&self.authority)))
            .identity(Identity::from_pem(read(&self.certificate), read(&self.key)));
        let endpoint = Endpoint::from_shared(format!("https://{address}")).expect("an address");
        let endpoint = endpoint.tls_config(tls).expect("sound papers");
        let runtime = tokio::runtime::Runtime::new().expect("start a runtime");
        runtime.block_on(async {
            let channel = endpoint.connect().await.expect("connect");
            let asked = PeerClient::new(channel).vote(RaftMessage::default()).await;
            asked
                .expect_err("nothing was said that a node understands")
                .code()
        })
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
    let authority = Authority::new();
    let papers = authority.papers(&sandbox.make_folder("papers"), Some("quorumfs:node"));
    let of_mount = authority.papers(&sandbox.make_folder("mount-papers"), Some("quorumfs:mount"));
    let without_role = authority.papers(&sandbox.make_folder("old-papers"), None);
    let text = |path: &Path| path.to_str().expect("UTF-8").to_string();
    let (trusted, certificate, key) = (
        text(&papers.authority),
        text(&papers.certificate),
        text(&papers.key),
    );
    let cluster = Cluster::builder(&sandbox)
        .arguments(&[
            "--tls-ca",
            &trusted,
            "--tls-cert",
            &certificate,
            "--tls-key",
            &key,
        ])
        .start();
    let mount = cluster.mount_with(MountOptions::options(&of_mount.options()));
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

    // Only nodes speak to nodes.
    let address = cluster.grpc_address(old);
    for others in [&of_mount, &without_role] {
        assert_eq!(others.ask_for_a_vote(address), tonic::Code::PermissionDenied);
    }
    assert_eq!(papers.ask_for_a_vote(address), tonic::Code::FailedPrecondition);
    let old_mount = cluster.mount_with(MountOptions::options(&without_role.options()));
    assert_eq!(std::fs::read(old_mount.path("large")).expect("read"), large);
    old_mount.unmount();

    // One without papers, one with another authority's, one that does not trust ours.
    let mount_uri = Some("quorumfs:mount");
    let strangers = Authority::new().papers(&sandbox.make_folder("strangers"), mount_uri);
    let pretender = Papers {
        authority: papers.authority.clone(),
        ..Authority::new().papers(&sandbox.make_folder("pretender"), mount_uri)
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
