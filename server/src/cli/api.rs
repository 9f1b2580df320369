//! The command line speaks HTTP like everybody. This finds the server, the key, and asks.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use std::time::Duration;

use bellwire_server::config::{self, Environment};
use bytes::Bytes;
use clap::Args;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use serde_json::Value;

use super::failure::{EXIT_TROUBLE, Failure, Trouble};
use crate::cli::files::{BOOTSTRAP_KEY, LISTEN_JSON};

/// Longest time for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for an answer, on top of the time that the server was asked to wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest silence of the server while something large comes.
const DOWNLOAD_STALL: Duration = Duration::from_secs(60);
/// Most bytes of an answer; a page of a list has less than one of these.
const ANSWER_MAX: usize = 16 << 20;
/// Most bytes of `listen.json` or a key file.
const SMALL_FILE_MAX: u64 = 16 << 10;

/// Where a system keeps the authorities that it trusts, most common first.
const SYSTEM_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// How to reach the server. Without any of these, the server of the data directory is asked, with its bootstrap key.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Reaching the server")]
pub(crate) struct ApiArgs {
    /// The API's address, such as `https://push.example.com:8480`
    #[arg(long, value_name = "URL", env = "BELLWIRE_API", hide_env_values = true)]
    api: Option<String>,

    /// File with the API key; default: bootstrap.key of the data directory
    #[arg(
        long,
        value_name = "FILE",
        env = "BELLWIRE_KEY_FILE",
        hide_env_values = true
    )]
    key_file: Option<PathBuf>,

    /// Authorities to trust for https, PEM; default: those of the system
    #[arg(long, value_name = "FILE", env = "BELLWIRE_CA", hide_env_values = true)]
    ca: Option<PathBuf>,

    /// Data directory of a server on this machine; default: as the settings say
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// Settings file, to find the data directory
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

impl ApiArgs {
    /// The settings file that was named.
    pub(crate) fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// The data directory that was named.
    pub(crate) fn data_dir(&self) -> Option<&PathBuf> {
        self.data_dir.as_ref()
    }
}

/// What `listen.json` says: the addresses really bound.
#[derive(Debug, Deserialize)]
pub(crate) struct ListenFile {
    /// Devices.
    pub(crate) devices: SocketAddr,
    /// Load balancers, if they have a listener.
    #[serde(default)]
    pub(crate) devices_plain: Option<SocketAddr>,
    /// The API.
    pub(crate) api: SocketAddr,
    /// Operations.
    pub(crate) operations: SocketAddr,
    /// `http` or `https`.
    pub(crate) api_scheme: String,
    /// The server's process.
    pub(crate) pid: u32,
}

impl ListenFile {
    /// Reads the one of a data directory; `None`: there is none, so no server runs.
    pub(crate) fn read(data_dir: &Path) -> Result<Option<ListenFile>, Failure> {
        let path = data_dir.join(LISTEN_JSON);
        let text = match read_small(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Failure::new(
                    format!("{} cannot be read: {error}", path.display()),
                    "run this as the user that runs the server, or name the server with --api and --key-file",
                ));
            }
        };
        serde_json::from_str(&text).map(Some).map_err(|error| {
            Failure::new(
                format!(
                    "{} is not what a server writes there: {error}",
                    path.display()
                ),
                "restart the server, which writes it anew",
            )
        })
    }

    /// The API's address as a program on this machine reaches it.
    pub(crate) fn api_url(&self) -> String {
        format!("{}://{}", self.api_scheme, reachable(self.api))
    }
}

/// A listener on every address is reached through loopback.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(_) | IpAddr::V6(_) => address.ip(),
    };
    SocketAddr::new(ip, address.port())
}

/// A server's API, found and unlocked.
pub(crate) struct Api {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: String,
    key: String,
}

impl Api {
    /// Finds the server and the key.
    pub(crate) fn find(args: &ApiArgs) -> Result<Api, Failure> {
        // The settings are read only if the data directory is needed and not named.
        let data_dir = || match &args.data_dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok::<_, Failure>(
                config::load(args.config.as_deref(), &Environment::of_process())?.data_dir,
            ),
        };
        let base = match &args.api {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => {
                let dir = data_dir()?;
                let listen = ListenFile::read(&dir)?.ok_or_else(|| {
                    Failure::new(
                        format!("no server runs on the data directory {}", dir.display()),
                        "start one with: bellwire serve; or name another with --data-dir, or with --api and --key-file",
                    )
                })?;
                listen.api_url()
            }
        };
        let key_file = match &args.key_file {
            Some(file) => file.clone(),
            None => data_dir()?.join(BOOTSTRAP_KEY),
        };
        let key = read_small(&key_file).map_err(|error| {
            Failure::new(
                format!("the API key in {} cannot be read: {error}", key_file.display()),
                "name a file that holds an API key with --key-file or BELLWIRE_KEY_FILE; `bellwire key create` makes one",
            )
        })?;
        Api::new(&base, key.trim(), args.ca.as_deref())
    }

    /// An API at this address with this key.
    pub(crate) fn new(base: &str, key: &str, ca: Option<&Path>) -> Result<Api, Failure> {
        let uri: Uri = base.parse().map_err(|_| bad_url(base))?;
        let scheme = uri.scheme_str().ok_or_else(|| bad_url(base))?;
        if uri.authority().is_none() || !matches!(uri.path(), "" | "/") {
            return Err(bad_url(base));
        }
        let roots = match scheme {
            "https" => trusted(ca)?,
            "http" => rustls::RootCertStore::empty(),
            _ => return Err(bad_url(base)),
        };
        let tls = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        http.set_nodelay(true);
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Failure::new(
                "the key file holds no API key",
                "it must hold one line that starts with bw_",
            ));
        }
        Ok(Api {
            client: Client::builder(TokioExecutor::new()).build(connector),
            base: base.to_owned(),
            key: key.to_owned(),
        })
    }

    /// Asks, and gives the body of the answer (`null` if there is none) if it is one of success.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        self.ask_waiting(method, path, body, &[], Duration::ZERO)
            .await
    }

    /// The same, with further headers, for a call in which the server may wait so long before it answers.
    pub(crate) async fn ask_waiting(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        headers: &[(&'static str, &str)],
        wait: Duration,
    ) -> Result<Value, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.key))
            .header(header::ACCEPT, "application/json")
            .header(
                header::USER_AGENT,
                concat!("bellwire/", env!("CARGO_PKG_VERSION")),
            );
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(body.to_string())
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(bytes)).map_err(|error| {
            Failure::usage(
                format!("the request cannot be made: {error}"),
                "look at the values given: they must be plain text",
            )
        })?;
        let limit = ANSWER_TIMEOUT + wait;
        match tokio::time::timeout(limit, self.exchange(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::new(
                format!("{} did not answer within {} s", self.base, limit.as_secs()),
                "look at the server's log; `bellwire status` tells whether it is behind",
            )),
        }
    }

    /// Asks for something large and hands it on as it comes. Without the end of it this is an error.
    pub(crate) async fn download(
        &self,
        path: &str,
        take: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let request = Request::builder().method(Method::GET);
        self.hand_on(request, path, Bytes::new(), take).await
    }

    /// Sends a batch of pings, one a line, and hands on the answer as it comes. Without the end of it this is an error.
    pub(crate) async fn batch(
        &self,
        lines: Bytes,
        take: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let request = Request::builder()
            .method(Method::POST)
            .header(header::CONTENT_TYPE, "application/x-ndjson");
        self.hand_on(request, "/v1/pings/batch", lines, take).await
    }

    async fn hand_on(
        &self,
        request: http::request::Builder,
        path: &str,
        body: Bytes,
        take: &mut dyn FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let request = request
            .uri(format!("{}{path}", self.base))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.key))
            .header(
                header::USER_AGENT,
                concat!("bellwire/", env!("CARGO_PKG_VERSION")),
            )
            .body(Full::new(body))
            .map_err(|error| {
                Failure::usage(
                    format!("the request cannot be made: {error}"),
                    "look at the values given: they must be plain text",
                )
            })?;
        let silent = || {
            Failure::new(
                format!(
                    "{} sent nothing for {} s",
                    self.base,
                    DOWNLOAD_STALL.as_secs()
                ),
                "look at the server's log; `bellwire status` tells how it is",
            )
        };
        let response = tokio::time::timeout(DOWNLOAD_STALL, self.client.request(request))
            .await
            .map_err(|_| silent())?
            .map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let text =
                tokio::time::timeout(DOWNLOAD_STALL, Limited::new(body, ANSWER_MAX).collect())
                    .await
                    .map_err(|_| silent())?
                    .map_or_else(|_| Bytes::new(), http_body_util::Collected::to_bytes);
            let problem = serde_json::from_slice(&text).unwrap_or(Value::Null);
            return Err(refused(status, &problem, &self.base));
        }
        loop {
            let frame = tokio::time::timeout(DOWNLOAD_STALL, body.frame())
                .await
                .map_err(|_| silent())?;
            match frame {
                None => return Ok(()),
                Some(Ok(frame)) => {
                    if let Some(bytes) = frame.data_ref() {
                        take(bytes)?;
                    }
                }
                Some(Err(error)) => {
                    return Err(Failure::new(
                        format!(
                            "{} broke off before the end: {}",
                            self.base,
                            root_cause(&error)
                        ),
                        "look at the server's log for the reason, then try again",
                    ));
                }
            }
        }
    }

    /// Pings as a RhoConnect backend does: a form, the key in it, an empty 200.
    #[cfg(feature = "demo")]
    pub(crate) async fn rhoconnect_ping(&self, fields: &[(&str, &str)]) -> Result<(), Failure> {
        let mut form = format!("api_token={}", encode(&self.key));
        for (name, value) in fields {
            form.push_str(&format!("&{}={}", encode(name), encode(value)));
        }
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/rc/v1/users/ping", self.base))
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Full::new(Bytes::from(form)))
            .map_err(|error| {
                Failure::new(
                    format!("the request cannot be made: {error}"),
                    "please report it",
                )
            })?;
        match tokio::time::timeout(ANSWER_TIMEOUT, self.exchange(request)).await {
            Ok(Ok(Value::Null)) => Ok(()),
            Ok(Ok(_)) => Err(Failure::new(
                "the answer to a RhoConnect ping is not empty",
                "please report it",
            )),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::new(
                format!("{} did not answer in time", self.base),
                "look at the server's log",
            )),
        }
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<Value, Failure> {
        let response = self
            .client
            .request(request)
            .await
            .map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), ANSWER_MAX)
            .collect()
            .await
            .map_err(|error| {
                Failure::new(
                    format!("the answer of {} broke off: {error}", self.base),
                    "try again; a ping is safe to send again with the same --idempotency-key",
                )
            })?
            .to_bytes();
        let body = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes).unwrap_or(Value::Null)
        };
        if status.is_success() {
            return Ok(body);
        }
        Err(refused(status, &body, &self.base))
    }

    fn unreachable(&self, error: &hyper_util::client::legacy::Error) -> Failure {
        let cause = root_cause(error);
        let help = if cause.contains("UnknownIssuer") || cause.contains("BadSignature") {
            "the server's certificate was issued by somebody that is not trusted here: name the authority with --ca"
        } else if cause.contains("certificate") || cause.contains("NotValidForName") {
            "the server's certificate does not fit: use a name that stands in it, or look at it with: bellwire certs \
             inspect"
        } else {
            "is the server running, and is this its API address? `bellwire serve` says where it listens"
        };
        Failure::new(format!("{} cannot be reached: {cause}", self.base), help)
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// Turns a refusal (RFC 9457) into words.
fn refused(status: StatusCode, body: &Value, base: &str) -> Failure {
    let text = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_owned);
    let code = text("code").unwrap_or_else(|| "no_code".to_owned());
    let help = match status.as_u16() {
        401 => Some(
            "the key is not known to this server: give another with --key-file; if every key was lost, `bellwire \
                     serve --new-key` makes one",
        ),
        403 => Some(
            "this key may not do that: use one with the right scope (`bellwire key list` shows scopes)",
        ),
        404 if body.is_null() => {
            Some("is this the API of a bellwire server? Its default port is 8480")
        }
        409 if code == "backup_under_way" => {
            Some("wait until that one is done; with backup.dir set, `bellwire status` shows it")
        }
        409 => {
            Some("the idempotency key was used with another body: take a new key for a new ping")
        }
        429 | 503 => Some(
            "try again in a moment; a ping is safe to send again with the same --idempotency-key",
        ),
        507 => Some("make room on the server's disk; what was accepted is still delivered"),
        _ => None,
    };
    let what = text("title").unwrap_or_else(|| format!("{base} answered {status}"));
    Failure::Trouble(Trouble {
        // Said once is enough.
        detail: text("detail").filter(|detail| *detail != what),
        what,
        help: help.map(str::to_owned),
        api: Some((code, status.as_u16())),
        exit: EXIT_TROUBLE,
    })
}

fn bad_url(url: &str) -> Failure {
    Failure::usage(
        format!("\"{url}\" is not the address of an API"),
        "write it like http://127.0.0.1:8480 or https://push.example.com:8480",
    )
}

pub(crate) fn trusted(ca: Option<&Path>) -> Result<rustls::RootCertStore, Failure> {
    let named = ca.map(Path::to_owned);
    let file = named.or_else(|| {
        SYSTEM_BUNDLES
            .iter()
            .map(PathBuf::from)
            .find(|bundle| bundle.is_file())
    });
    let Some(file) = file else {
        return Err(Failure::new(
            "no trusted authorities were found on this machine",
            "name a file with them with --ca",
        ));
    };
    let unfit = |why: String| {
        Failure::new(
            format!(
                "the authorities in {} cannot be read: {why}",
                file.display()
            ),
            "a PEM file with one or more certificates is expected",
        )
    };
    let mut roots = rustls::RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(&file).map_err(|error| unfit(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| unfit(error.to_string()))?;
        // Bundles of systems hold a few that today's rules refuse; the rest is what counts.
        let _ = roots.add(certificate);
    }
    if roots.is_empty() {
        return Err(unfit("it holds no usable certificate".to_owned()));
    }
    Ok(roots)
}

/// Reads a file that is expected to be small.
fn read_small(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(SMALL_FILE_MAX)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Percent-encodes one segment of a path or one value of a query (RFC 3986: everything but unreserved characters).
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_listener_on_every_address_is_reached_through_loopback() {
        let reach = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(reach("0.0.0.0:1"), "127.0.0.1:1");
        assert_eq!(reach("[::]:1"), "[::1]:1");
        assert_eq!(reach("192.0.2.1:1"), "192.0.2.1:1");
    }

    #[test]
    fn a_user_with_odd_characters_stays_one_segment() {
        assert_eq!(encode("a/b c?d=é"), "a%2Fb%20c%3Fd%3D%C3%A9");
        assert_eq!(encode("anna-1.2_3~4"), "anna-1.2_3~4");
    }

    #[test]
    fn a_refusal_without_a_problem_document_still_says_something() {
        let failure = refused(StatusCode::BAD_GATEWAY, &Value::Null, "http://x");
        let Failure::Trouble(trouble) = failure else {
            panic!("expected trouble");
        };
        assert_eq!(trouble.what, "http://x answered 502 Bad Gateway");
    }
}
