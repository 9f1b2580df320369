//! The parameters of a request: a form or JSON, over those of the query. Forgiving, as the original is: what is not
//! known is ignored, a single value stands for a list of one, and texts and numbers stand for one another.

use std::borrow::Cow;
use std::collections::HashMap;

use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde_json::Value;

/// The body says it is JSON and is not, or is no object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotJson;

/// A parameter.
#[derive(Debug, Clone, PartialEq)]
enum Given {
    /// `name=value`.
    Single(String),
    /// `name[]=value`, as often as it came.
    List(Vec<String>),
    /// A member of a JSON object.
    Json(Value),
}

/// The parameters by name, without `[]`.
#[derive(Debug, Default)]
pub(super) struct Params(HashMap<String, Given>);

/// Whether the content type begins with `application/json`.
pub(super) fn is_json(headers: &HeaderMap) -> bool {
    const JSON: &[u8] = b"application/json";
    headers.get(CONTENT_TYPE).is_some_and(|value| {
        value
            .as_bytes()
            .get(..JSON.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(JSON))
    })
}

impl Params {
    /// Reads query and body; the body's parameters win.
    pub(super) fn read(query: Option<&str>, json: bool, body: &[u8]) -> Result<Params, NotJson> {
        let mut params = form(query.unwrap_or_default().as_bytes());
        if !json {
            params.extend(form(body));
        } else if !body.trim_ascii().is_empty() {
            let object: serde_json::Map<String, Value> =
                serde_json::from_slice(body).map_err(|_| NotJson)?;
            params.extend(
                object
                    .into_iter()
                    .map(|(name, value)| (name, Given::Json(value))),
            );
        }
        Ok(Params(params))
    }

    /// A parameter as one text. A list has none.
    pub(super) fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        match self.0.get(name)? {
            Given::Single(text) => Some(Cow::Borrowed(text)),
            Given::List(_) => None,
            Given::Json(value) => scalar(value),
        }
    }

    /// A parameter as a list of texts; a single one is a list of one. What is no text or number in it is left out.
    pub(super) fn list(&self, name: &str) -> Option<Vec<String>> {
        match self.0.get(name)? {
            Given::Single(text) => Some(vec![text.clone()]),
            Given::List(texts) => Some(texts.clone()),
            Given::Json(Value::Array(values)) => Some(
                values
                    .iter()
                    .filter_map(scalar)
                    .map(Cow::into_owned)
                    .collect(),
            ),
            Given::Json(value) => scalar(value).map(|text| vec![text.into_owned()]),
        }
    }

    /// A parameter as a whole number; negative ones and those that are no number are none, larger ones are cut.
    pub(super) fn number(&self, name: &str) -> Option<u32> {
        let text = self.text(name)?;
        let digits = text.trim();
        let digits = digits.strip_prefix('+').unwrap_or(digits);
        // `2000.0` is how some JSON writers put a whole number.
        let digits = digits.split_once('.').map_or(digits, |(whole, fraction)| {
            if fraction.bytes().all(|byte| byte == b'0') {
                whole
            } else {
                digits
            }
        });
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        Some(digits.parse().unwrap_or(u32::MAX))
    }

    /// Whether a parameter is there and true in the sense of Ruby, where only `nil` and `false` are not: in a form every
    /// value is a text and so true.
    pub(super) fn truthy(&self, name: &str) -> bool {
        match self.0.get(name) {
            None | Some(Given::Json(Value::Null | Value::Bool(false))) => false,
            Some(Given::Single(_) | Given::List(_) | Given::Json(_)) => true,
        }
    }
}

/// A form; of a repeated single parameter the last one counts. Bytes that are no UTF-8 are replaced.
fn form(bytes: &[u8]) -> HashMap<String, Given> {
    let mut params = HashMap::new();
    // Every sequence of bytes is a form.
    let pairs: Vec<(String, String)> = serde_urlencoded::from_bytes(bytes).unwrap_or_default();
    for (name, value) in pairs {
        match name.strip_suffix("[]") {
            None => {
                params.insert(name, Given::Single(value));
            }
            Some(name) => match params.get_mut(name) {
                Some(Given::List(values)) => values.push(value),
                Some(Given::Single(_) | Given::Json(_)) | None => {
                    params.insert(name.to_owned(), Given::List(vec![value]));
                }
            },
        }
    }
    params
}

fn scalar(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) => Some(Cow::Borrowed(text)),
        Value::Number(number) => Some(Cow::Owned(number.to_string())),
        Value::Bool(value) => Some(Cow::Borrowed(if *value { "true" } else { "false" })),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn params(query: &str, body: &str) -> Params {
        Params::read(Some(query), false, body.as_bytes()).unwrap()
    }

    fn json(body: &str) -> Params {
        Params::read(None, true, body.as_bytes()).unwrap()
    }

    #[test]
    fn a_form_gives_texts_and_lists() {
        let read = params(
            "user_id=query&message=query",
            "user_id[]=a%20b&user_id[]=c&sources%5B%5D=X&sources%5B%5D=Y&message=caf%C3%A9+bar",
        );
        assert_eq!(read.list("user_id").unwrap(), ["a b", "c"]);
        assert_eq!(read.list("sources").unwrap(), ["X", "Y"]);
        assert_eq!(read.text("message").unwrap(), "café bar");
        assert_eq!(
            params("user_id=a&user_id=b", "").list("user_id").unwrap(),
            ["b"]
        );
        assert_eq!(params("", "sources=all").list("sources").unwrap(), ["all"]);
        assert_eq!(params("", "other=1").list("sources"), None);
    }

    #[test]
    fn json_gives_the_same_and_takes_single_values_for_lists() {
        let read = json(
            r#"{"user_id":["a",7,null,{"b":1}],"sources":"all","message":"m","api_token":12}"#,
        );
        assert_eq!(read.list("user_id").unwrap(), ["a", "7"]);
        assert_eq!(read.list("sources").unwrap(), ["all"]);
        assert_eq!(read.text("api_token").unwrap(), "12");
        assert_eq!(
            json(r#"{"user_id":"a","user_id":"b"}"#)
                .list("user_id")
                .unwrap(),
            ["b"]
        );
        assert_eq!(json(r#"{"message":null}"#).text("message"), None);
        assert_eq!(json(" ").text("message"), None);
    }

    #[test]
    fn what_says_it_is_json_must_be_an_object() {
        for body in [
            "{",
            "[]",
            "\"a\"",
            "null",
            "{}x",
            "{\"a\":\"\\ud800\"}",
            "\u{1}",
        ] {
            assert_eq!(
                Params::read(None, true, body.as_bytes()).map(|_| ()),
                Err(NotJson),
                "{body}"
            );
        }
    }

    #[test]
    fn numbers_come_as_texts_too_and_what_is_none_is_left_out() {
        for (value, number) in [
            ("2000", Some(2_000)),
            ("+2000", Some(2_000)),
            (" 7 ", Some(7)),
            ("0", Some(0)),
            ("2000.0", Some(2_000)),
            ("99999999999999999999", Some(u32::MAX)),
            ("-1", None),
            ("2.5", None),
            ("1e3", None),
            ("soon", None),
            ("", None),
            (".", None),
        ] {
            let form: String = value.replace('+', "%2B").replace(' ', "%20");
            assert_eq!(
                params("", &format!("vibrate={form}")).number("vibrate"),
                number,
                "{value:?}"
            );
            assert_eq!(
                json(&format!("{{\"vibrate\":\"{value}\"}}")).number("vibrate"),
                number,
                "{value:?}"
            );
        }
        assert_eq!(json(r#"{"vibrate":2000}"#).number("vibrate"), Some(2_000));
        assert_eq!(json(r#"{"vibrate":2000.0}"#).number("vibrate"), Some(2_000));
        assert_eq!(json(r#"{"vibrate":[1]}"#).number("vibrate"), None);
    }

    #[test]
    fn only_nothing_null_and_false_are_not_true() {
        assert!(params("", "async=false").truthy("async"));
        assert!(params("", "async=").truthy("async"));
        assert!(params("async=1", "").truthy("async"));
        assert!(!params("", "a=1").truthy("async"));
        assert!(json(r#"{"async":0}"#).truthy("async"));
        assert!(json(r#"{"async":"false"}"#).truthy("async"));
        assert!(!json(r#"{"async":false}"#).truthy("async"));
        assert!(!json(r#"{"async":null}"#).truthy("async"));
    }

    #[test]
    fn the_content_type_only_has_to_begin_right() {
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, http::HeaderValue::from_static(value));
            is_json(&headers)
        };
        assert!(with("application/json"));
        assert!(with("application/json; charset=utf-8"));
        assert!(with("Application/JSON"));
        assert!(!with("application/x-www-form-urlencoded"));
        assert!(!with("text/json"));
        assert!(!is_json(&HeaderMap::new()));
    }
}
