//! The way out of the process, as the settings say it.

use std::sync::Arc;

use bellwire_server::config::{self, Checked, Host};
use bellwire_server::outbound::{Allowed, AllowedHost, AllowedPort, Rules, Ways};

use super::Failure;
use super::api::trusted;

/// What the settings allow. Without a host nothing is read, and nothing is allowed.
pub(crate) fn ways(checked: &Checked) -> Result<Ways, Failure> {
    let callbacks = &checked.callbacks;
    let tls = match (&callbacks.ca, callbacks.allow.is_empty()) {
        (_, true) => None,
        (Some(ca), false) => Some(trusted(Some(ca))?),
        // A system without authorities can still be told of some, or post over plain http.
        (None, false) => match trusted(None) {
            Ok(roots) => Some(roots),
            Err(failure) => {
                tracing::warn!(
                    help = "name a file with authorities in callbacks.ca",
                    "callbacks over https will not work: {}",
                    failure.what()
                );
                None
            }
        },
    };
    Ok(Ways {
        rules: Rules {
            allow: callbacks.allow.iter().cloned().map(allowed).collect(),
            plain_http: callbacks.plain_http,
        },
        tls: tls.map(|roots| {
            let mut config = rustls::ClientConfig::builder()
                .with_root_certificates(roots)
                .with_no_client_auth();
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            Arc::new(config)
        }),
        timeout: callbacks.timeout,
    })
}

fn allowed(listed: config::Allowed) -> Allowed {
    Allowed {
        host: match listed.host {
            Host::Name(name) => AllowedHost::Name(name),
            Host::Below(end) => AllowedHost::Below(end),
            Host::Network(address, prefix) => AllowedHost::Network(address, prefix),
        },
        port: match listed.port {
            config::AllowedPort::OfScheme => AllowedPort::OfScheme,
            config::AllowedPort::Only(port) => AllowedPort::Only(port),
            config::AllowedPort::Any => AllowedPort::Any,
        },
    }
}
