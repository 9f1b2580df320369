//! `bellwire certs`: development certificates, and a look at any certificate.

use std::path::{Path, PathBuf};

use bellwire_certs::{
    AltName, CertInfo, IfExists, LEAF_DAYS, SanName, Validity, check_server_files, inspect_file,
    write_private, write_public,
};
use clap::{Args, Subcommand};
use serde_json::json;
use time::format_description::well_known::Rfc3339;

use super::files::{DEV_CA, cert, dev_authority, unusable};
use super::{Console, Failure, Outcome, now, plain};

const AFTER_HELP: &str = "\
Examples:
  bellwire certs make --name push.example.com --name 192.0.2.10 --dir pki
  bellwire certs inspect server-chain.pem --key server-key.pem

For real PKI see certs/README.md.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CertsArgs {
    #[command(subcommand)]
    command: CertsCommand,
}

#[derive(Debug, Subcommand)]
enum CertsCommand {
    /// Make a development authority (once) and a server certificate for these names
    #[command(after_help = "\
Examples:
  bellwire certs make --name push.example.com --name 192.0.2.10 --dir pki

Writes dev-ca.pem and dev-ca-key.pem unless they are there, then server.pem (the chain) and server-key.pem.
Devices trust dev-ca.pem; the settings tls.cert and tls.key name the other two.")]
    Make {
        /// A DNS name or IP address that devices connect to; several times for several
        #[arg(long = "name", value_name = "NAME", required = true)]
        names: Vec<SanName>,
        /// Where to write
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// Days until the certificate ends
        #[arg(long, default_value_t = LEAF_DAYS)]
        days: u32,
        /// Replace server.pem and server-key.pem if they are there
        #[arg(long)]
        replace: bool,
        /// Answer in JSON, for scripts
        #[arg(long)]
        json: bool,
    },
    /// Show what the certificates in a PEM file say
    #[command(after_help = "\
Examples:
  bellwire certs inspect server-chain.pem
  bellwire certs inspect server-chain.pem --key server-key.pem    checks that the server can use both")]
    Inspect {
        /// The file
        file: PathBuf,
        /// Check that this key belongs to it and that a server can use both now
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Answer in JSON, for scripts
        #[arg(long)]
        json: bool,
    },
}

impl CertsArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            CertsCommand::Make { json, .. } | CertsCommand::Inspect { json, .. } => *json,
        }
    }
}

pub(crate) fn run(args: &CertsArgs) -> Outcome {
    match &args.command {
        CertsCommand::Make {
            names,
            dir,
            days,
            replace,
            json,
        } => make(names, dir, *days, *replace, *json),
        CertsCommand::Inspect { file, key, json } => {
            let certificates = inspect_file(file).map_err(|error| cert(&error))?;
            if let Some(key) = key {
                check_server_files(file, key, now()).map_err(|error| cert(&error))?;
            }
            show(file, &certificates, key.is_some(), *json);
            Ok(())
        }
    }
}

fn make(names: &[SanName], dir: &Path, days: u32, replace: bool, as_json: bool) -> Outcome {
    std::fs::create_dir_all(dir).map_err(|error| unusable(dir, &error))?;
    let (chain, key) = (dir.join("server.pem"), dir.join("server-key.pem"));
    let if_exists = if replace {
        IfExists::Replace
    } else {
        IfExists::Refuse
    };
    if !replace && let Some(there) = [&chain, &key].into_iter().find(|file| file.exists()) {
        return Err(Failure::new(
            format!("{} is there already", there.display()),
            "say --replace to make a new one in its place, or name another directory with --dir",
        ));
    }
    let validity = Validity::days(now(), days).map_err(|error| cert(&error))?;
    let authority = dev_authority(dir, now(), write_public).map_err(|error| cert(&error))?;
    let issued = authority
        .server(names, validity)
        .map_err(|error| cert(&error))?;
    write_private(&key, issued.key_pem.as_bytes(), if_exists).map_err(|error| cert(&error))?;
    write_public(&chain, issued.chain_pem.as_bytes(), if_exists).map_err(|error| cert(&error))?;
    let out = Console::out();
    let ca = dir.join(DEV_CA);
    if as_json {
        let files = json!({
            "ca": ca.display().to_string(),
            "cert": chain.display().to_string(),
            "key": key.display().to_string(),
            "not_after": date(issued.not_after),
        });
        out.line(&files.to_string());
        return Ok(());
    }
    out.pairs(&[
        ("devices trust", ca.display().to_string()),
        ("tls.cert", chain.display().to_string()),
        ("tls.key", format!("{} (mode 0600)", key.display())),
        ("valid until", date(issued.not_after)),
    ]);
    out.line("This is a development authority: it cannot revoke. certs/README.md says how to use your own PKI.");
    Ok(())
}

fn show(file: &Path, certificates: &[CertInfo], checked: bool, as_json: bool) {
    let out = Console::out();
    if as_json {
        let list: Vec<_> = certificates
            .iter()
            .map(|info| {
                json!({
                    "subject": info.subject,
                    "issuer": info.issuer,
                    "serial": info.serial,
                    "names": info.alt_names.iter().map(name).collect::<Vec<_>>(),
                    "not_before": date(info.not_before),
                    "not_after": date(info.not_after),
                    "ca": info.is_ca,
                    "for_servers": info.for_servers,
                    "for_clients": info.for_clients,
                })
            })
            .collect();
        out.line(&json!({ "file": file.display().to_string(), "certificates": list }).to_string());
        return;
    }
    for (index, info) in certificates.iter().enumerate() {
        if index > 0 {
            out.line("");
        }
        let names: Vec<String> = info.alt_names.iter().map(name).collect();
        let role = match (info.is_ca, info.for_servers, info.for_clients) {
            (true, _, _) => "authority",
            (false, true, true) => "servers and clients",
            (false, true, false) => "servers",
            (false, false, true) => "clients",
            (false, false, false) => "neither servers nor clients",
        };
        out.pairs(&[
            ("subject", plain(&info.subject)),
            ("issuer", plain(&info.issuer)),
            ("serial", info.serial.clone()),
            ("names", names.join(", ")),
            ("valid from", date(info.not_before)),
            ("valid until", date(info.not_after)),
            ("for", role.to_owned()),
        ]);
    }
    if checked {
        out.line("\nThe key belongs to it, and a server can use both.");
    }
}

fn name(name: &AltName) -> String {
    plain(&match name {
        AltName::Dns(name) => name.clone(),
        AltName::Ip(ip) => ip.to_string(),
        AltName::Uri(uri) => uri.clone(),
        AltName::Other(text) => text.clone(),
    })
}

fn date(moment: time::OffsetDateTime) -> String {
    moment
        .format(&Rfc3339)
        .unwrap_or_else(|_| moment.to_string())
}
