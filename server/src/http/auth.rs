//! Who calls, and whether they may. A handler that takes a [`Scoped`] cannot forget to ask.

use std::marker::PhantomData;

use axum::extract::FromRequestParts;
use bellwire_protocol::Code;
use http::header::AUTHORIZATION;
use http::request::Parts;

use super::Backend;
use super::error::{Place, Problem};
use crate::runtime::{Principal, Scopes};

/// A scope as a type.
pub(super) trait Scope: Send + Sync + 'static {
    /// As the key carries it.
    const SCOPE: Scopes;
    /// Its name in the API.
    const NAME: &'static str;
}

macro_rules! scopes {
    ($($(#[$doc:meta])* $name:ident = $scope:ident $text:literal;)*) => {
        $(
            $(#[$doc])*
            pub(super) struct $name;

            impl Scope for $name {
                const SCOPE: Scopes = Scopes::$scope;
                const NAME: &'static str = $text;
            }
        )*
    };
}

scopes! {
    /// Send pings, revoke them.
    Ping = PING "ping";
    /// Read outcomes, devices, status.
    Read = READ "read";
    /// Register and revoke devices.
    Devices = DEVICES "devices";
    /// Make and revoke keys.
    Keys = KEYS "keys";
    /// Everything that concerns the whole server.
    Admin = ADMIN "admin";
}

/// Proof that the caller's key is good and carries the scope `S`.
pub(super) struct Scoped<S> {
    principal: Principal,
    _scope: PhantomData<fn() -> S>,
}

impl<S> std::ops::Deref for Scoped<S> {
    type Target = Principal;

    fn deref(&self) -> &Principal {
        &self.principal
    }
}

impl<S: Scope> FromRequestParts<Backend> for Scoped<S> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, backend: &Backend) -> Result<Self, Problem> {
        let key = bearer(parts)?;
        let principal = backend.handle.authenticate_key(key).await?;
        if principal.may(S::SCOPE) {
            Ok(Scoped {
                principal,
                _scope: PhantomData,
            })
        } else {
            Err(Problem::new(
                Code::Forbidden,
                format!("This call needs a key with the scope `{}`.", S::NAME),
            ))
        }
    }
}

/// The key in `Authorization: Bearer <key>` (RFC 6750 section 2.1).
fn bearer(parts: &Parts) -> Result<&str, Problem> {
    let refuse =
        |detail| Problem::new(Code::Unauthenticated, detail).at(Place::Header("Authorization"));
    let mut values = parts.headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(refuse("Send one API key: `Authorization: Bearer <key>`."));
    };
    let bytes = value.as_bytes();
    match bytes.split_first_chunk::<7>() {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => {
            std::str::from_utf8(key.trim_ascii())
                .map_err(|_| refuse("The API key has characters that no key has.").bad_token())
        }
        _ => Err(refuse("The `Authorization` header must be `Bearer <key>`.")),
    }
}
