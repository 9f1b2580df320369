//! The head of a proxy's answer to CONNECT: read within a limit, judged once it is complete.

use super::ProxyFault;

/// Most bytes of the answer's head, interim answers included. Larger ones are no answers to CONNECT.
pub(super) const HEAD_MAX_BYTES: usize = 8 * 1024;

/// Most header lines of the answer.
const HEADERS_MAX: usize = 64;

/// Longest list of schemes that an error repeats, in bytes.
const SCHEMES_MAX_BYTES: usize = 128;

/// What has come of the answer.
pub(super) struct Answer {
    bytes: Box<[u8; HEAD_MAX_BYTES]>,
    filled: usize,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            bytes: Box::new([0; HEAD_MAX_BYTES]),
            filled: 0,
        }
    }
}

impl Answer {
    /// Where the next bytes go. Empty: the limit is reached.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// `read` more bytes are there. Answers when they decide; `None`: more is needed.
    pub(super) fn take(
        &mut self,
        read: usize,
        had_credentials: bool,
    ) -> Option<Result<(), ProxyFault>> {
        self.filled = HEAD_MAX_BYTES.min(self.filled + read);
        let mut from = 0;
        loop {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut response = httparse::Response::new(&mut headers);
            let head = match response.parse(&self.bytes[from..self.filled]) {
                Ok(httparse::Status::Complete(head)) => head,
                Ok(httparse::Status::Partial) => return None,
                Err(httparse::Error::TooManyHeaders) => {
                    return Some(Err(ProxyFault::AnswerTooLong));
                }
                Err(_) => return Some(Err(ProxyFault::NotHttp)),
            };
            let status = response.code.unwrap_or_default();
            from += head;
            match status {
                // An interim answer: the one that counts follows.
                100..=199 => {}
                // What follows the head is the tunnel, and nobody in there speaks before we do.
                200..=299 if from < self.filled => return Some(Err(ProxyFault::SpokeFirst)),
                200..=299 => return Some(Ok(())),
                // 407 is right. Some proxies say 401, which belongs to servers; but no server speaks before the tunnel stands.
                401 | 407 => {
                    return Some(Err(wants_credentials(
                        status,
                        response.headers,
                        had_credentials,
                    )));
                }
                status => return Some(Err(ProxyFault::Refused { status })),
            }
        }
    }
}

/// What a 407 means depends on what the proxy asks for, and on what it was given.
fn wants_credentials(
    status: u16,
    headers: &[httparse::Header<'_>],
    had_credentials: bool,
) -> ProxyFault {
    let asks = match status {
        401 => "www-authenticate",
        _ => "proxy-authenticate",
    };
    let mut offered: Vec<String> = headers
        .iter()
        .filter(|header| header.name.eq_ignore_ascii_case(asks))
        .filter_map(|header| std::str::from_utf8(header.value).ok())
        .filter_map(|value| value.split([' ', ',']).next())
        .filter(|scheme| {
            !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
        .map(str::to_owned)
        .collect();
    offered.dedup();
    let basic = offered
        .iter()
        .any(|scheme| scheme.eq_ignore_ascii_case("basic"));
    let mut schemes = offered.join(", ");
    schemes.truncate(SCHEMES_MAX_BYTES);
    match (basic || offered.is_empty(), had_credentials) {
        (false, _) => ProxyFault::OtherScheme { schemes, status },
        (true, false) => ProxyFault::WantsCredentials { status },
        (true, true) => ProxyFault::WrongCredentials { status },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Feeds an answer in pieces of this size; the text of what was decided.
    fn decided(answer: &[u8], piece: usize, had_credentials: bool) -> String {
        let mut head = Answer::default();
        for bytes in answer.chunks(piece) {
            let space = head.space();
            if space.len() < bytes.len() {
                return "too long".to_owned();
            }
            space[..bytes.len()].copy_from_slice(bytes);
            match head.take(bytes.len(), had_credentials) {
                Some(Ok(())) => return "through".to_owned(),
                Some(Err(fault)) => return fault.to_string(),
                None => {}
            }
        }
        "more".to_owned()
    }

    #[test]
    fn an_answer_is_judged_however_it_is_cut() {
        for (answer, had_credentials, expected) in [
            (
                "HTTP/1.1 200 Connection established\r\n\r\n",
                true,
                "through",
            ),
            ("HTTP/1.0 200 OK\r\nVia: x\r\n\r\n", false, "through"),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
                false,
                "through",
            ),
            ("HTTP/1.1 200 OK\r\nVia: x\r\n", false, "more"),
            (
                "HTTP/1.1 407 x\r\nProxy-Authenticate: Basic realm=\"a\"\r\n\r\n",
                false,
                "it wants a user and a password (HTTP 407)",
            ),
            (
                "HTTP/1.1 407 x\r\nproxy-authenticate: basic\r\n\r\n",
                true,
                "it does not accept this user and password (HTTP 407)",
            ),
            (
                "HTTP/1.1 407 x\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n",
                true,
                "it wants another kind of authentication than Basic: Negotiate, NTLM (HTTP 407)",
            ),
            (
                "HTTP/1.0 401 Unauthorized\r\nConnection: close\r\n\r\n",
                true,
                "it does not accept this user and password (HTTP 401)",
            ),
            (
                "HTTP/1.1 401 x\r\nWWW-Authenticate: Basic realm=\"a\"\r\n\r\n",
                false,
                "it wants a user and a password (HTTP 401)",
            ),
            (
                "HTTP/1.1 401 x\r\nWWW-Authenticate: Negotiate\r\n\r\n",
                true,
                "it wants another kind of authentication than Basic: Negotiate (HTTP 401)",
            ),
            (
                "HTTP/1.1 403 Forbidden\r\n\r\n",
                true,
                "it forbids this server and port (HTTP 403)",
            ),
            (
                "HTTP/1.1 502 Bad\r\n\r\n",
                true,
                "it cannot reach the server (HTTP 502)",
            ),
            ("HTTP/1.1 302 Found\r\n\r\n", true, "it answered HTTP 302"),
            ("SSH-2.0-x\r\n\r\n", false, "it does not speak HTTP"),
            ("\u{16}\u{3}\u{1}", false, "it does not speak HTTP"),
        ] {
            for piece in [1, 7, 4_096] {
                assert_eq!(
                    decided(answer.as_bytes(), piece, had_credentials),
                    expected,
                    "{answer:?} in pieces of {piece}"
                );
            }
        }
    }

    #[test]
    fn an_answer_without_an_end_and_one_with_too_much_behind_it_are_refused() {
        let endless = [
            b"HTTP/1.1 200 OK\r\nX: ".to_vec(),
            vec![b'x'; 2 * HEAD_MAX_BYTES],
        ]
        .concat();
        assert_eq!(decided(&endless, 1_000, false), "too long");
        let eager = b"HTTP/1.1 200 OK\r\n\r\nhello";
        assert!(decided(eager, 4_096, false).contains("before we did"));
        let many = format!(
            "HTTP/1.1 200 OK\r\n{}\r\n",
            "a: b\r\n".repeat(HEADERS_MAX + 1)
        );
        assert!(decided(many.as_bytes(), 4_096, false).contains("64 lines"));
    }
}
