//! Reading request bodies strictly, in one pass over the bytes.
//!
//! A body is one JSON object with known members. Unknown members, repeated members and wrong types are refused, and the
//! refusal points at the member (RFC 6901) and says what belongs there. It never repeats a value: values are content.
//! `null` is the same as leaving an optional member out, because many serialisers write it.

use std::fmt::{self, Write as _};
use std::marker::PhantomData;

use bellwire_protocol::Code;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;

use super::error::{Place, Problem};

/// Greatest part of an unknown member's name that a refusal repeats, in characters.
const NAME_SHOWN: usize = 64;

/// An object with a closed set of members (at most 32).
pub(super) trait Members: Default {
    /// Their names.
    const NAMES: &'static [&'static str];

    /// Reads the value of the member `name` with [`Trail::value`] or its siblings.
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error>;
}

/// Where the reader stands, and what it found wrong there.
#[derive(Default)]
pub(super) struct Trail {
    steps: Vec<Step>,
    expected: &'static str,
    /// What is read: a body, or a line of one.
    whole: &'static str,
    fault: Option<(Code, String)>,
}

enum Step {
    Member(&'static str),
    Unknown(String),
    Index(usize),
}

impl Trail {
    /// Reads a value that serde knows. `expected` completes the sentence "must be …".
    pub(super) fn value<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
        &mut self,
        map: &mut A,
        expected: &'static str,
    ) -> Result<T, A::Error> {
        self.expected = expected;
        map.next_value()
    }

    /// Reads a text, or `null`, and turns it into something.
    pub(super) fn text<'de, T, A: MapAccess<'de>>(
        &mut self,
        map: &mut A,
        expected: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, A::Error> {
        self.expected = expected;
        map.next_value_seed(OptionalText { trail: self, parse })
    }

    /// Reads an array of texts, or `null`, and turns each into something. `each` completes "must be …" for one of them.
    pub(super) fn texts<'de, T, A: MapAccess<'de>>(
        &mut self,
        map: &mut A,
        (expected, each): (&'static str, &'static str),
        max: usize,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<Vec<T>>, A::Error> {
        self.expected = expected;
        map.next_value_seed(OptionalTexts {
            trail: self,
            each,
            max,
            parse,
        })
    }

    /// Reads an object, or `null`.
    pub(super) fn object<'de, T: Members, A: MapAccess<'de>>(
        &mut self,
        map: &mut A,
    ) -> Result<Option<T>, A::Error> {
        self.expected = "an object";
        map.next_value_seed(OptionalObject(self, PhantomData))
    }

    /// Refuses the member that is being read.
    pub(super) fn refuse<E: serde::de::Error>(&mut self, code: Code, detail: String) -> E {
        self.fault = Some((code, detail));
        E::custom("")
    }

    /// The place as a JSON pointer.
    fn pointer(&self) -> String {
        let mut pointer = String::new();
        for step in &self.steps {
            pointer.push('/');
            match step {
                Step::Member(name) => pointer.push_str(name),
                Step::Unknown(name) => {
                    pointer.push_str(&name.replace('~', "~0").replace('/', "~1"));
                }
                // Writing to a string cannot fail.
                Step::Index(index) => drop(write!(pointer, "{index}")),
            }
        }
        pointer
    }
}

/// Reads the whole body as one object.
///
/// # Errors
/// 400 `malformed`, or what a member's reader refused with.
pub(super) fn read<T: Members>(body: &[u8]) -> Result<T, Problem> {
    read_whole(body, "body")
}

/// The same for a line of a body.
pub(super) fn read_line<T: Members>(line: &[u8]) -> Result<T, Problem> {
    read_whole(line, "line")
}

fn read_whole<T: Members>(bytes: &[u8], whole: &'static str) -> Result<T, Problem> {
    let mut trail = Trail {
        expected: "one JSON object",
        whole,
        ..Trail::default()
    };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Object::<T>(&mut trail, PhantomData)
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    value.map_err(|error| explain(&trail, &error))
}

fn explain(trail: &Trail, error: &serde_json::Error) -> Problem {
    let pointer = trail.pointer();
    if let Some((code, detail)) = &trail.fault {
        return Problem::new(*code, detail.clone()).at(Place::Body(pointer));
    }
    match error.classify() {
        Category::Data if pointer.is_empty() => Problem::new(
            Code::Malformed,
            format!("The {} must be {}.", trail.whole, trail.expected),
        )
        .at(Place::Body(pointer)),
        Category::Data => Problem::new(
            Code::Malformed,
            format!("`{pointer}` must be {}.", trail.expected),
        )
        .at(Place::Body(pointer)),
        Category::Eof => Problem::new(
            Code::Malformed,
            format!(
                "The {} ends in the middle of its JSON, or is empty.",
                trail.whole
            ),
        ),
        Category::Syntax | Category::Io if trail.whole == "line" => Problem::new(
            Code::Malformed,
            format!(
                "The line is not well-formed JSON at column {}.",
                error.column()
            ),
        ),
        Category::Syntax | Category::Io => Problem::new(
            Code::Malformed,
            format!(
                "The body is not well-formed JSON at line {}, column {}.",
                error.line(),
                error.column()
            ),
        ),
    }
}

/// The refusal of an object in which `name` is missing.
pub(super) fn missing(pointer: &str, expected: &str) -> Problem {
    Problem::new(
        Code::Malformed,
        format!("`{pointer}` is missing; it must be {expected}."),
    )
    .at(Place::Body(pointer.to_owned()))
}

// ---- Objects -----------------------------------------------------------------------------------------------------

struct Object<'t, T>(&'t mut Trail, PhantomData<T>);

impl<'de, T: Members> DeserializeSeed<'de> for Object<'_, T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: Members> Visitor<'de> for Object<'_, T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        const { assert!(T::NAMES.len() <= 32) };
        let trail = self.0;
        let mut value = T::default();
        let mut seen = 0u32;
        while let Some(name) = map.next_key_seed(Name(T::NAMES))? {
            let index = match name {
                Ok(index) => index,
                Err(unknown) => {
                    let detail = format!(
                        "`{unknown}` is not a member here; known are: {}.",
                        T::NAMES.join(", ")
                    );
                    trail.steps.push(Step::Unknown(unknown));
                    return Err(trail.refuse(Code::Malformed, detail));
                }
            };
            let name = T::NAMES[index];
            trail.steps.push(Step::Member(name));
            if seen & (1 << index) != 0 {
                let detail = format!("`{}` comes twice.", trail.pointer());
                return Err(trail.refuse(Code::Malformed, detail));
            }
            seen |= 1 << index;
            value.read(name, &mut map, trail)?;
            trail.steps.pop();
        }
        Ok(value)
    }
}

struct OptionalObject<'t, T>(&'t mut Trail, PhantomData<T>);

impl<'de, T: Members> DeserializeSeed<'de> for OptionalObject<'_, T> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, T: Members> Visitor<'de> for OptionalObject<'_, T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_none<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        Object(self.0, PhantomData)
            .deserialize(deserializer)
            .map(Some)
    }
}

/// A member's name: its place in the list, or the beginning of an unknown one.
struct Name(&'static [&'static str]);

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Result<usize, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for Name {
    type Value = Result<usize, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self
            .0
            .iter()
            .position(|known| *known == name)
            .ok_or_else(|| name.chars().take(NAME_SHOWN).collect()))
    }
}

// ---- Texts -------------------------------------------------------------------------------------------------------

struct OptionalText<'t, F> {
    trail: &'t mut Trail,
    parse: F,
}

impl<'de, T, F: Fn(&str) -> Option<T>> DeserializeSeed<'de> for OptionalText<'_, F> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, T, F: Fn(&str) -> Option<T>> Visitor<'de> for OptionalText<'_, F> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_none<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        let Self { trail, parse } = self;
        Text { trail, parse }.deserialize(deserializer).map(Some)
    }
}

struct Text<'t, F> {
    trail: &'t mut Trail,
    parse: F,
}

impl<'de, T, F: Fn(&str) -> Option<T>> DeserializeSeed<'de> for Text<'_, F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<T, F: Fn(&str) -> Option<T>> Visitor<'_> for Text<'_, F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        match (self.parse)(text) {
            Some(value) => Ok(value),
            None => {
                let detail = format!(
                    "`{}` must be {}.",
                    self.trail.pointer(),
                    self.trail.expected
                );
                Err(self.trail.refuse(Code::Malformed, detail))
            }
        }
    }
}

struct OptionalTexts<'t, F> {
    trail: &'t mut Trail,
    each: &'static str,
    max: usize,
    parse: F,
}

impl<'de, T, F: Fn(&str) -> Option<T>> DeserializeSeed<'de> for OptionalTexts<'_, F> {
    type Value = Option<Vec<T>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, T, F: Fn(&str) -> Option<T>> Visitor<'de> for OptionalTexts<'_, F> {
    type Value = Option<Vec<T>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of texts")
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let Self {
            trail,
            each,
            max,
            parse,
        } = self;
        trail.expected = each;
        let mut values = Vec::new();
        loop {
            trail.steps.push(Step::Index(values.len()));
            let seed = Text {
                trail: &mut *trail,
                parse: &parse,
            };
            let Some(value) = seq.next_element_seed(seed)? else {
                trail.steps.pop();
                return Ok(Some(values));
            };
            trail.steps.pop();
            if values.len() == max {
                let detail = format!("`{}` has more than {max} entries.", trail.pointer());
                return Err(trail.refuse(Code::Unprocessable, detail));
            }
            values.push(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Inner {
        names: Option<Vec<String>>,
    }

    impl Members for Inner {
        const NAMES: &'static [&'static str] = &["names"];

        fn read<'de, A: MapAccess<'de>>(
            &mut self,
            _name: &'static str,
            map: &mut A,
            trail: &mut Trail,
        ) -> Result<(), A::Error> {
            self.names = trail.texts(map, ("an array of letters", "a letter"), 3, |text| {
                (text.len() == 1).then(|| text.to_owned())
            })?;
            Ok(())
        }
    }

    #[derive(Default)]
    struct Outer {
        count: Option<u32>,
        inner: Option<Inner>,
    }

    impl Members for Outer {
        const NAMES: &'static [&'static str] = &["count", "inner"];

        fn read<'de, A: MapAccess<'de>>(
            &mut self,
            name: &'static str,
            map: &mut A,
            trail: &mut Trail,
        ) -> Result<(), A::Error> {
            match name {
                "count" => self.count = trail.value(map, "a small number")?,
                _ => self.inner = trail.object(map)?,
            }
            Ok(())
        }
    }

    fn check(body: &str) -> String {
        match read::<Outer>(body.as_bytes()) {
            Ok(outer) => format!(
                "count {:?} names {:?}",
                outer.count,
                outer.inner.map(|inner| inner.names)
            ),
            Err(problem) => match problem.place() {
                Place::Body(pointer) => {
                    format!("{} at {pointer:?}: {}", problem.code(), problem.detail())
                }
                Place::Request | Place::Parameter(_) | Place::Header(_) => {
                    format!("{}: {}", problem.code(), problem.detail())
                }
            },
        }
    }

    #[test]
    fn what_is_right_is_read_and_null_is_absent() {
        assert_eq!(
            check(r#" {"count": 7, "inner": {"names": ["a", "b"]}} "#),
            r#"count Some(7) names Some(Some(["a", "b"]))"#
        );
        assert_eq!(
            check(r#"{"count": null, "inner": null}"#),
            "count None names None"
        );
        assert_eq!(
            check(r#"{"inner":{"names":null}}"#),
            "count None names Some(None)"
        );
        assert_eq!(check("{}"), "count None names None");
        assert_eq!(
            check(r#"{"in\u006eer":{"names":["\u0061"]}}"#),
            r#"count None names Some(Some(["a"]))"#
        );
    }

    #[test]
    fn what_is_wrong_is_pointed_at_and_never_repeated() {
        for (body, expected) in [
            (
                "",
                "malformed: The body ends in the middle of its JSON, or is empty.",
            ),
            (
                "{",
                "malformed: The body ends in the middle of its JSON, or is empty.",
            ),
            (
                "{}x",
                "malformed: The body is not well-formed JSON at line 1, column 3.",
            ),
            (
                "\u{feff}{}",
                "malformed: The body is not well-formed JSON at line 1, column 1.",
            ),
            ("[]", "malformed at \"\": The body must be one JSON object."),
            (
                "\"secret\"",
                "malformed at \"\": The body must be one JSON object.",
            ),
            (
                "null",
                "malformed at \"\": The body must be one JSON object.",
            ),
            (
                r#"{"count": "secret"}"#,
                r#"malformed at "/count": `/count` must be a small number."#,
            ),
            (
                r#"{"count": -1}"#,
                r#"malformed at "/count": `/count` must be a small number."#,
            ),
            (
                r#"{"count": 1.5}"#,
                r#"malformed at "/count": `/count` must be a small number."#,
            ),
            (
                r#"{"count": 1, "count": 1}"#,
                r#"malformed at "/count": `/count` comes twice."#,
            ),
            (
                r#"{"count": null, "count": 1}"#,
                r#"malformed at "/count": `/count` comes twice."#,
            ),
            (
                r#"{"cuont": "secret"}"#,
                r#"malformed at "/cuont": `cuont` is not a member here; known are: count, inner."#,
            ),
            (
                r#"{"a/b~c": 1}"#,
                r#"malformed at "/a~1b~0c": `a/b~c` is not a member here; known are: count, inner."#,
            ),
            (
                r#"{"inner": []}"#,
                r#"malformed at "/inner": `/inner` must be an object."#,
            ),
            (
                r#"{"inner": {"names": "a"}}"#,
                r#"malformed at "/inner/names": `/inner/names` must be an array of letters."#,
            ),
            (
                r#"{"inner": {"names": ["a", "secret"]}}"#,
                r#"malformed at "/inner/names/1": `/inner/names/1` must be a letter."#,
            ),
            (
                r#"{"inner": {"names": ["a", null]}}"#,
                r#"malformed at "/inner/names/1": `/inner/names/1` must be a letter."#,
            ),
            (
                r#"{"inner": {"names": ["a","b","c","d"]}}"#,
                r#"unprocessable at "/inner/names": `/inner/names` has more than 3 entries."#,
            ),
            (
                r#"{"inner": {"other": 1}}"#,
                r#"malformed at "/inner/other": `other` is not a member here; known are: names."#,
            ),
            (
                "{\"count\": \"\u{1}\"}",
                "malformed: The body is not well-formed JSON at line 1, column 12.",
            ),
            (
                r#"{"inner": {"names": ["\ud800"]}}"#,
                "malformed: The body is not well-formed JSON at line 1, column 29.",
            ),
        ] {
            let told = check(body);
            assert_eq!(told, expected, "for {body}");
            assert!(!told.contains("secret"));
        }
    }

    #[test]
    fn deep_nesting_is_refused_without_harm() {
        let deep = format!("{{\"count\": {}", "[".repeat(100_000));
        assert!(check(&deep).starts_with("malformed"));
    }
}
