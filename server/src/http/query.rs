//! Query parameters, as strict as bodies.

use std::borrow::Cow;

use axum::extract::{FromRequestParts, Path};
use bellwire_protocol::Code;
use http::request::Parts;

use super::error::{Place, Problem};

/// Entries of one page when the caller does not say.
const PAGE_DEFAULT: usize = 100;

/// Most entries of one page: keeps an answer well under a megabyte.
const PAGE_MAX: usize = 1_000;

/// The decoded parameters of one request; each known one is there at most once.
pub(super) struct Query<'q>(Vec<(Cow<'q, str>, Cow<'q, str>)>);

impl<'q> Query<'q> {
    /// Reads the query of a URI.
    ///
    /// # Errors
    /// 400 for unknown and repeated parameters.
    pub(super) fn read(query: Option<&'q str>, known: &[&'static str]) -> Result<Self, Problem> {
        let Some(query) = query else {
            return Ok(Query(Vec::new()));
        };
        let pairs: Vec<(Cow<'q, str>, Cow<'q, str>)> = serde_urlencoded::from_str(query)
            .map_err(|_| Problem::new(Code::Malformed, "The query is not `name=value&…`."))?;
        for (index, (name, _)) in pairs.iter().enumerate() {
            if !known.contains(&name.as_ref()) {
                let shown: String = name.chars().take(64).collect();
                let detail = if known.is_empty() {
                    format!("`{shown}` is not a query parameter here; there are none.")
                } else {
                    format!(
                        "`{shown}` is not a query parameter here; known are: {}.",
                        known.join(", ")
                    )
                };
                return Err(Problem::new(Code::Malformed, detail).at(Place::Parameter(shown)));
            }
            if pairs[..index].iter().any(|(earlier, _)| earlier == name) {
                return Err(wrong(name, "given once"));
            }
        }
        Ok(Query(pairs))
    }

    /// One parameter as text.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_ref())
    }

    /// One parameter, turned into something. `expected` completes the sentence "must be …".
    pub(super) fn parsed<T>(
        &self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, Problem> {
        self.get(name)
            .map(|text| parse(text).ok_or_else(|| wrong(name, expected)))
            .transpose()
    }

    /// The parameter `limit` of a paged list.
    pub(super) fn limit(&self) -> Result<usize, Problem> {
        self.parsed("limit", "an integer from 1 to 1000", |text| {
            text.parse()
                .ok()
                .filter(|limit| (1..=PAGE_MAX).contains(limit))
        })
        .map(|limit| limit.unwrap_or(PAGE_DEFAULT))
    }
}

/// The refusal of a parameter.
pub(super) fn wrong(name: &str, expected: &str) -> Problem {
    Problem::new(
        Code::Malformed,
        format!("The query parameter `{name}` must be {expected}."),
    )
    .at(Place::Parameter(name.to_owned()))
}

/// The `{id}` of a path, as text.
pub(super) struct PathId(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<PathId, Problem> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(PathId(id)),
            Err(_) => Err(Problem::new(
                Code::Malformed,
                "The path is not percent-encoded UTF-8.",
            )),
        }
    }
}
