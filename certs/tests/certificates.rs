//! The certificates in use: real handshakes in memory, what the reader says of good and bad files, and the openssl
//! commands of the README.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bellwire_certs::{
    AltName, CertError, DevAuthority, IfExists, Issued, LEAF_DAYS, SanName, Validity, check_server,
    check_server_files, inspect, inspect_chain, inspect_file, write_private, write_public,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
};
use time::OffsetDateTime;
use time::macros::datetime;

const NOW: OffsetDateTime = datetime!(2026-11-21 12:00:00 UTC);
const DEVICE: &str = "aebagbafaydqqcikbmga2dqpca";

fn authority() -> DevAuthority {
    DevAuthority::generate("Test CA", Validity::authority(NOW).unwrap()).unwrap()
}

fn server_names() -> Vec<SanName> {
    ["localhost", "push.example.com", "::1"]
        .iter()
        .map(|name| name.parse().unwrap())
        .collect()
}

fn server(authority: &DevAuthority) -> Issued {
    authority
        .server(&server_names(), Validity::leaf(NOW).unwrap())
        .unwrap()
}

/// The time at which both ends of a handshake believe to be.
#[derive(Debug)]
struct At(OffsetDateTime);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(
            u64::try_from(self.0.unix_timestamp()).unwrap(),
        )))
    }
}

/// A handshake in memory. `trusted` is the client's root, `client` what it shows of itself, if anything.
struct Handshake<'a> {
    now: OffsetDateTime,
    name: &'a str,
    trusted: &'a str,
    chain: &'a str,
    key: &'a str,
    client: Option<(&'a str, &'a str)>,
    client_ca: &'a str,
}

fn roots(pem: &str) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        roots.add(certificate.unwrap()).unwrap();
    }
    Arc::new(roots)
}

fn chain(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .map(Result::unwrap)
        .collect()
}

fn key(pem: &str) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap()
}

impl Handshake<'_> {
    /// The first certificate that the server saw of the client, or the first error of either side.
    fn run(&self) -> Result<Option<CertificateDer<'static>>, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = ServerConfig::builder_with_details(provider.clone(), Arc::new(At(self.now)))
            .with_safe_default_protocol_versions()
            .unwrap();
        let server = if self.client.is_some() {
            let verifier = WebPkiClientVerifier::builder_with_provider(
                roots(self.client_ca),
                provider.clone(),
            )
            .build()
            .unwrap();
            server.with_client_cert_verifier(verifier)
        } else {
            server.with_no_client_auth()
        };
        let server = server.with_single_cert(chain(self.chain), key(self.key))?;
        let client = ClientConfig::builder_with_details(provider, Arc::new(At(self.now)))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots(self.trusted));
        let client = match self.client {
            Some((cert, private)) => client.with_client_auth_cert(chain(cert), key(private))?,
            None => client.with_no_client_auth(),
        };
        let name = ServerName::try_from(self.name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name)?;
        let mut server = ServerConnection::new(Arc::new(server))?;
        let mut wire = Vec::new();
        while client.is_handshaking()
            || server.is_handshaking()
            || client.wants_write()
            || server.wants_write()
        {
            wire.clear();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            let mut bytes = wire.as_slice();
            while !bytes.is_empty() {
                server.read_tls(&mut bytes).unwrap();
                server.process_new_packets()?;
            }
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            let mut bytes = wire.as_slice();
            while !bytes.is_empty() {
                client.read_tls(&mut bytes).unwrap();
                client.process_new_packets()?;
            }
        }
        Ok(server
            .peer_certificates()
            .and_then(|chain| chain.first())
            .cloned()
            .map(CertificateDer::into_owned))
    }
}

fn handshake<'a>(authority: &'a DevAuthority, issued: &'a Issued) -> Handshake<'a> {
    Handshake {
        now: NOW,
        name: "push.example.com",
        trusted: authority.certificate_pem(),
        chain: &issued.chain_pem,
        key: &issued.key_pem,
        client: None,
        client_ca: authority.certificate_pem(),
    }
}

#[test]
fn a_client_that_trusts_the_authority_accepts_the_server_by_each_of_its_names() {
    let authority = authority();
    let issued = server(&authority);
    for name in ["push.example.com", "localhost", "::1"] {
        Handshake {
            name,
            ..handshake(&authority, &issued)
        }
        .run()
        .unwrap();
    }
    Handshake {
        chain: &issued.cert_pem,
        ..handshake(&authority, &issued)
    }
    .run()
    .unwrap();
}

#[test]
fn a_device_whose_clock_is_up_to_an_hour_behind_accepts_the_server() {
    let authority = authority();
    let issued = server(&authority);
    let behind = NOW - time::Duration::minutes(59);
    Handshake {
        now: behind,
        ..handshake(&authority, &issued)
    }
    .run()
    .unwrap();
}

#[test]
fn a_client_refuses_another_name_a_foreign_authority_and_a_time_past_the_end() {
    let (own, foreign) = (authority(), authority());
    let issued = server(&own);
    let refused = |handshake: Handshake<'_>| {
        let error = handshake.run().unwrap_err();
        let rustls::Error::InvalidCertificate(why) = error else {
            panic!("not refused for its certificate: {error}");
        };
        why
    };
    assert!(matches!(
        refused(Handshake {
            name: "other.example.com",
            ..handshake(&own, &issued)
        }),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
    ));
    let stranger = Handshake {
        trusted: foreign.certificate_pem(),
        ..handshake(&own, &issued)
    };
    // Both authorities have the same name, so the path is found and its signature is what fails.
    assert!(matches!(
        refused(stranger),
        CertificateError::BadSignature | CertificateError::UnknownIssuer
    ));
    let late = NOW + time::Duration::days(i64::from(LEAF_DAYS)) + time::Duration::SECOND;
    assert!(matches!(
        refused(Handshake {
            now: late,
            ..handshake(&own, &issued)
        }),
        CertificateError::Expired | CertificateError::ExpiredContext { .. }
    ));
}

#[test]
fn a_device_certificate_carries_its_id_through_a_handshake() {
    let authority = authority();
    let issued = server(&authority);
    let device = authority
        .device(DEVICE, Validity::leaf(NOW).unwrap())
        .unwrap();
    let seen = Handshake {
        client: Some((&device.cert_pem, &device.key_pem)),
        ..handshake(&authority, &issued)
    }
    .run()
    .unwrap()
    .unwrap();
    assert_eq!(seen, chain(&device.cert_pem)[0]);
    let info = inspect(device.cert_pem.as_bytes()).unwrap();
    assert_eq!(info.device(), Some(DEVICE));
    assert!(info.for_clients && !info.for_servers && !info.is_ca);
}

#[test]
fn a_server_refuses_a_device_certificate_of_a_foreign_authority_and_a_server_certificate_in_its_place()
 {
    let (own, foreign) = (authority(), authority());
    let issued = server(&own);
    let stranger = foreign
        .device(DEVICE, Validity::leaf(NOW).unwrap())
        .unwrap();
    for (cert, key) in [
        (&stranger.cert_pem, &stranger.key_pem),
        (&issued.cert_pem, &issued.key_pem),
    ] {
        let result = Handshake {
            client: Some((cert, key)),
            ..handshake(&own, &issued)
        }
        .run();
        assert!(
            matches!(result, Err(rustls::Error::InvalidCertificate(_))),
            "{result:?}"
        );
    }
}

#[test]
fn a_certificate_that_names_no_device_or_another_kind_of_client_speaks_for_no_device() {
    let authority = authority();
    let client = authority
        .client("backend-1", Validity::leaf(NOW).unwrap())
        .unwrap();
    let info = inspect(client.cert_pem.as_bytes()).unwrap();
    assert_eq!(
        info.alt_names,
        [AltName::Uri("bellwire:client:backend-1".to_owned())]
    );
    assert_eq!(info.device(), None);

    let device_uri = |text: &str| AltName::Uri(format!("bellwire:device:{text}"));
    let mut forged = info;
    forged.alt_names = vec![device_uri("../../etc")];
    assert_eq!(forged.device(), None);
    forged.alt_names = vec![device_uri(DEVICE), device_uri("baaaaaaaaaaaaaaaaaaaaaaaaa")];
    assert_eq!(forged.device(), None, "two devices are none");
    forged.alt_names = vec![AltName::Dns("a.example".to_owned()), device_uri(DEVICE)];
    assert_eq!(forged.device(), Some(DEVICE));
}

#[test]
fn what_is_issued_follows_the_profile() {
    let authority = authority();
    let ca = authority.info();
    assert!(ca.is_ca);
    assert_eq!(
        (ca.not_before, ca.not_after),
        (
            NOW - time::Duration::HOUR,
            NOW + time::Duration::days(3_652)
        )
    );
    let issued = server(&authority);
    let leaf = inspect(issued.cert_pem.as_bytes()).unwrap();
    assert!(!leaf.is_ca && leaf.for_servers && !leaf.for_clients);
    assert_eq!(leaf.issuer, ca.subject);
    assert_eq!(
        (leaf.not_before, leaf.not_after),
        (NOW - time::Duration::HOUR, NOW + time::Duration::days(397))
    );
    assert_eq!(leaf.not_after, issued.not_after);
    assert_eq!(
        leaf.alt_names,
        [
            AltName::Dns("localhost".to_owned()),
            AltName::Dns("push.example.com".to_owned()),
            AltName::Ip(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        ]
    );
    assert_ne!(
        leaf.serial,
        inspect(server(&authority).cert_pem.as_bytes())
            .unwrap()
            .serial
    );
    // 16 random bytes, shorter only when the first ones happen to be zero.
    assert!(
        leaf.serial.replace(':', "").len() >= 2 * 12,
        "{}",
        leaf.serial
    );
}

#[test]
fn an_authority_read_back_from_its_files_goes_on_issuing() {
    let directory = tempfile::tempdir().unwrap();
    let made = authority();
    let (cert, private) = (
        directory.path().join("dev-ca.pem"),
        directory.path().join("dev-ca-key.pem"),
    );
    write_public(&cert, made.certificate_pem().as_bytes(), IfExists::Refuse).unwrap();
    write_private(&private, made.key_pem().as_bytes(), IfExists::Refuse).unwrap();

    let back = DevAuthority::from_pem(
        &std::fs::read(&cert).unwrap(),
        &std::fs::read(&private).unwrap(),
    )
    .unwrap();
    assert_eq!(back.certificate_pem().trim(), made.certificate_pem().trim());
    let issued = server(&back);
    handshake(&made, &issued).run().unwrap();
}

#[test]
fn an_authority_does_not_issue_past_its_own_end() {
    let short = DevAuthority::generate("Short CA", Validity::days(NOW, 30).unwrap()).unwrap();
    let issued = server(&short);
    assert_eq!(issued.not_after, NOW + time::Duration::days(30));
    let late = Validity::leaf(NOW + time::Duration::days(30)).unwrap();
    let error = short.server(&server_names(), late).unwrap_err();
    assert!(matches!(error, CertError::AuthorityEnded { .. }), "{error}");
}

#[test]
fn impossible_wishes_are_refused_in_words() {
    let authority = authority();
    let leaf = Validity::leaf(NOW).unwrap();
    let wish = |result: Result<Issued, CertError>| result.unwrap_err().to_string();
    assert!(wish(authority.server(&[], leaf)).contains("at least one name"));
    let many: Vec<_> = (0..65)
        .map(|n| SanName::Dns(format!("h{n}.example")))
        .collect();
    assert!(wish(authority.server(&many, leaf)).contains("65 names"));
    assert!(wish(authority.device("NOT-AN-ID", leaf)).contains("\"NOT-AN-ID\" is not a device id"));
    assert!(wish(authority.client("a b", leaf)).contains("cannot be used as a name"));
    assert!(matches!(
        Validity::days(NOW, 0),
        Err(CertError::BadValidity)
    ));
    assert!(matches!(
        Validity::days(NOW, u32::MAX),
        Err(CertError::BadValidity)
    ));
    for bad in ["", "no spaces", "300.1.2.3", "a..b", "*.", "host.", "-"] {
        assert!(
            bad.parse::<SanName>().is_err(),
            "{bad:?} was taken for a name"
        );
    }
    for good in [
        "push.example.com",
        "*.example.com",
        "LOCALHOST",
        "192.0.2.1",
        "::1",
    ] {
        assert!(good.parse::<SanName>().is_ok(), "{good:?} was refused");
    }
}

#[test]
fn the_check_says_what_is_wrong_with_a_server_and_in_which_file() {
    let directory = tempfile::tempdir().unwrap();
    let (chain, private) = (
        directory.path().join("chain.pem"),
        directory.path().join("key.pem"),
    );
    let authority = authority();
    let issued = server(&authority);
    let other = server(&authority);
    let device = authority
        .device(DEVICE, Validity::leaf(NOW).unwrap())
        .unwrap();
    let backwards = format!("{}{}", authority.certificate_pem(), issued.cert_pem);
    let doubled = format!("{}{}", issued.cert_pem, other.cert_pem);
    let cut = &issued.cert_pem[..200];
    let rotten = issued.cert_pem.replacen("MII", "AII", 1);
    let ca_key = authority.key_pem();
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let not_a_key = "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
    let long = issued.cert_pem.repeat(11);
    let huge = "x".repeat(300_000);
    let (good_chain, good_key) = (issued.chain_pem.as_str(), issued.key_pem.as_str());
    let table: &[(&str, &str, &str)] = &[
        (
            good_chain,
            &other.key_pem,
            "key.pem: the private key does not belong to the first certificate",
        ),
        (
            good_chain,
            &ca_key,
            "key.pem: the private key does not belong",
        ),
        (good_chain, "nothing here", "key.pem: no private key in it"),
        (good_chain, good_chain, "key.pem: no private key in it"),
        (
            good_chain,
            encrypted,
            "key.pem: the private key is encrypted",
        ),
        (
            good_chain,
            not_a_key,
            "key.pem: the private key cannot be used",
        ),
        (good_chain, &huge, "key.pem: it is larger than 262144 bytes"),
        (
            &backwards,
            good_key,
            "chain.pem: the first certificate (O=Bellwire development, CN=Test CA) is an authority",
        ),
        (
            &doubled,
            good_key,
            "chain.pem: certificate 2 (O=Bellwire development, CN=Bellwire server) did not issue",
        ),
        ("", good_key, "chain.pem: no certificate in it"),
        (good_key, good_key, "chain.pem: no certificate in it"),
        (cut, good_key, "chain.pem: damaged PEM"),
        (
            &rotten,
            good_key,
            "chain.pem: certificate 1 in it cannot be read as X.509",
        ),
        (&long, good_key, "chain.pem: more than 10 certificates"),
        (
            &device.chain_pem,
            &device.key_pem,
            "has no subject alternative name",
        ),
    ];
    for (cert, key, expected) in table {
        std::fs::write(&chain, cert).unwrap();
        std::fs::write(&private, key).unwrap();
        let said = check_server_files(&chain, &private, NOW)
            .unwrap_err()
            .to_string();
        assert!(
            said.contains(expected),
            "expected {expected:?}, said {said:?}"
        );
        assert!(
            !said.contains("BEGIN PRIVATE KEY-----\nMII"),
            "a key must not appear in an error"
        );
    }
    std::fs::write(&chain, good_chain).unwrap();
    let said = check_server_files(&chain, &directory.path().join("absent.pem"), NOW)
        .unwrap_err()
        .to_string();
    assert!(said.contains("absent.pem: it cannot be read"), "{said}");

    let when = |now| {
        check_server(good_chain.as_bytes(), good_key.as_bytes(), now)
            .unwrap_err()
            .to_string()
    };
    assert!(when(NOW + time::Duration::days(398)).contains("ended at 2027-12-23 12:00:00"));
    assert!(when(NOW - time::Duration::hours(2)).contains("is this machine's clock right?"));
    std::fs::write(&private, good_key).unwrap();
    assert_eq!(check_server_files(&chain, &private, NOW).unwrap().len(), 2);
    assert_eq!(
        inspect_file(&chain).unwrap(),
        inspect_chain(good_chain.as_bytes()).unwrap()
    );
}

#[test]
fn reading_a_damaged_certificate_never_panics() {
    let authority = authority();
    let der = chain(authority.certificate_pem())[0].to_vec();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..4_000 {
        // A plain xorshift: the test must be the same every time.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let mut damaged = der.clone();
        let place = usize::try_from(seed % damaged.len() as u64).unwrap();
        damaged[place] ^= u8::try_from(1 + (seed >> 32) % 255).unwrap();
        damaged.truncate(damaged.len() - usize::try_from((seed >> 40) % 3).unwrap());
        let pem = pem_of(&damaged);
        // Either answer is right; coming back with one is what is tested.
        let _ = inspect(pem.as_bytes()).map(|info| info.to_owned());
    }
}

/// PEM by the shortest means: one long line is allowed when reading.
fn pem_of(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for group in der.chunks(3) {
        let bits = group
            .iter()
            .fold(0u32, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - group.len()));
        for place in 0..4 {
            let index = usize::try_from(bits >> (18 - 6 * place) & 63).unwrap();
            text.push(if place <= group.len() {
                char::from(ALPHABET[index])
            } else {
                '='
            });
        }
    }
    text.push_str("\n-----END CERTIFICATE-----\n");
    text
}

/// The blocks of the README that start with "```sh", in order.
fn readme_commands() -> Vec<String> {
    let readme = include_str!("../README.md");
    readme
        .split("```sh\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect()
}

fn shell(directory: &Path, script: &str) {
    let mut child = Command::new("sh")
        .args(["-eu", "-s"])
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{script}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_openssl_commands_of_the_readme_make_a_server_certificate_that_devices_accept() {
    if Command::new("openssl")
        .arg("version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        eprintln!("openssl is not installed: the README's commands are not tried on this machine");
        return;
    }
    let commands = readme_commands();
    assert_eq!(
        commands.len(),
        4,
        "request, stand-in authority, signing, chain"
    );
    let directory = tempfile::tempdir().unwrap();
    for block in &commands {
        shell(directory.path(), block);
    }
    let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).unwrap();
    let (chain, key, root) = (
        read("server-chain.pem"),
        read("server-key.pem"),
        read("root.pem"),
    );
    // The commands used this machine's clock; the certificate itself says when that was.
    let now = inspect(chain.as_bytes()).unwrap().not_before + time::Duration::HOUR;
    let infos = check_server_files(
        &directory.path().join("server-chain.pem"),
        &directory.path().join("server-key.pem"),
        now,
    )
    .unwrap();
    assert_eq!(infos.len(), 2);
    for name in ["push.example.com", "192.0.2.10"] {
        Handshake {
            now,
            name,
            trusted: &root,
            chain: &chain,
            key: &key,
            client: None,
            client_ca: &root,
        }
        .run()
        .unwrap();
    }

    // The other key formats that the README names, and the passphrase that it forbids.
    shell(
        directory.path(),
        "openssl ec -in server-key.pem -out sec1.pem\n\
         openssl pkcs8 -topk8 -in server-key.pem -out locked.pem -passout pass:secret\n\
         openssl ec -in server-key.pem -aes256 -out locked-sec1.pem -passout pass:secret\n\
         openssl req -x509 -newkey rsa:2048 -nodes -keyout rsa8.pem -out rsa.pem -days 2 -subj /CN=r \
           -addext subjectAltName=DNS:r.example -addext basicConstraints=CA:FALSE\n\
         openssl rsa -in rsa8.pem -traditional -out rsa1.pem\n\
         openssl req -x509 -newkey rsa:2048 -nodes -keyout self-key.pem -out self.pem -days 2 -subj /CN=r \
           -addext subjectAltName=DNS:r.example\n",
    );
    check_server(chain.as_bytes(), read("sec1.pem").as_bytes(), now).unwrap();
    let rsa = read("rsa.pem");
    let then = inspect(rsa.as_bytes()).unwrap().not_before + time::Duration::HOUR;
    for key in ["rsa8.pem", "rsa1.pem"] {
        check_server(rsa.as_bytes(), read(key).as_bytes(), then).unwrap();
    }
    for locked in ["locked.pem", "locked-sec1.pem"] {
        let error = check_server(chain.as_bytes(), read(locked).as_bytes(), now).unwrap_err();
        assert!(matches!(error, CertError::EncryptedKey), "{error}");
    }
    let error = check_server(
        read("self.pem").as_bytes(),
        read("self-key.pem").as_bytes(),
        then,
    )
    .unwrap_err();
    assert!(
        matches!(error, CertError::LeafIsAuthority { .. }),
        "{error}"
    );
}
