//! The tables of `schema` against the golden vectors: the same members, the same keys, the same types.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use bellwire_protocol::schema::{
    CONTENT, DEVICE_FRAMES, Kind, Member, SEEN, SERVER_FRAMES, Shape, enumerations,
};
use data_encoding::HEXLOWER;
use minicbor::data::Type;
use serde_json::Value;

/// JSON members in the order of the text, which a map of the JSON library would lose.
fn members_in_order(json: &str) -> Vec<(String, Value)> {
    struct Ordered(Vec<(String, Value)>);
    impl<'de> serde::Deserialize<'de> for Ordered {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Ordered;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(
                    self,
                    mut map: A,
                ) -> Result<Ordered, A::Error> {
                    let mut members = Vec::new();
                    while let Some(member) = map.next_entry()? {
                        members.push(member);
                    }
                    Ok(Ordered(members))
                }
            }
            deserializer.deserialize_map(Visitor)
        }
    }
    serde_json::from_str::<Ordered>(json).unwrap().0
}

fn check_value(member: &Member, json: &Value, d: &mut minicbor::Decoder<'_>) {
    let place = format!("member `{}`", member.name);
    let kind = d.datatype().unwrap();
    let number = |kind: Type| matches!(kind, Type::U8 | Type::U16 | Type::U32 | Type::U64);
    let texts = |json: &Value| json.as_array().unwrap().iter().all(Value::is_string);
    match member.kind {
        Kind::Integer | Kind::Small => assert!(json.is_u64() && number(kind), "{place}"),
        Kind::Boolean => assert!(json.is_boolean() && kind == Type::Bool, "{place}"),
        Kind::Text => assert!(json.is_string() && kind == Type::String, "{place}"),
        Kind::Texts => assert!(texts(json) && kind == Type::Array, "{place}"),
        Kind::Bytes => assert!(json.is_string() && kind == Type::Bytes, "{place}"),
        Kind::Id => assert!(
            json.as_str().unwrap().len() == 26 && kind == Type::Bytes,
            "{place}"
        ),
        Kind::Ids => assert!(texts(json) && kind == Type::Array, "{place}"),
        Kind::Range => assert!(
            json.as_array().unwrap().len() == 2 && kind == Type::Array,
            "{place}"
        ),
        Kind::Seen => {
            let json = json.as_array().unwrap();
            assert_eq!(
                d.clone().array().unwrap(),
                Some(json.len() as u64),
                "{place}"
            );
            let mut d = d.clone();
            d.array().unwrap();
            for entry in json {
                assert_eq!(d.map().unwrap(), Some(SEEN.members.len() as u64), "{place}");
                for member in SEEN.members {
                    assert_eq!(d.u64().unwrap(), member.key, "{place}");
                    check_value(member, &entry[member.name], &mut d);
                }
            }
        }
        Kind::Verdict | Kind::Urgency | Kind::PresenceState | Kind::GoawayReason | Kind::Retry => {
            let values = enumerations()
                .into_iter()
                .find(|(name, _)| *name == member.kind.name())
                .unwrap()
                .1;
            let number = d.clone().u64().unwrap() as usize;
            assert_eq!(Some(values[number]), json.as_str(), "{place}");
        }
    }
    d.skip().unwrap();
}

fn check(file: &str, shapes: &[Shape]) {
    let path = format!("{}/vectors/{file}", env!("CARGO_MANIFEST_DIR"));
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let (mut seen, mut expected) = (BTreeSet::new(), BTreeSet::new());
    for vector in file["frames"].as_array().unwrap() {
        let json = members_in_order(vector["json"].as_str().unwrap());
        let cbor = HEXLOWER
            .decode(vector["cbor"].as_str().unwrap().as_bytes())
            .unwrap();
        let mut d = minicbor::Decoder::new(&cbor);
        assert_eq!(d.map().unwrap(), Some(json.len() as u64));
        let ((tag, name), members) = json.split_first().unwrap();
        assert_eq!((tag.as_str(), d.u64().unwrap()), ("type", 0));
        let shape = shapes
            .iter()
            .find(|shape| Some(shape.name) == name.as_str())
            .unwrap();
        assert_eq!(Some(d.u64().unwrap()), shape.number);
        let content = if shape.name == "notify" {
            CONTENT.members
        } else {
            &[]
        };
        for (name, value) in members {
            let member = shape
                .members
                .iter()
                .chain(content)
                .find(|member| member.name == name)
                .unwrap();
            assert_eq!(d.u64().unwrap(), member.key, "`{name}` of `{}`", shape.name);
            check_value(member, value, &mut d);
            seen.insert((shape.name, member.name));
        }
        let missing = shape
            .members
            .iter()
            .find(|m| !m.optional && !members.iter().any(|(name, _)| name == m.name));
        assert!(missing.is_none(), "{missing:?} of `{}`", shape.name);
    }
    for shape in shapes {
        let content = if shape.name == "notify" {
            CONTENT.members
        } else {
            &[]
        };
        expected.extend(
            shape
                .members
                .iter()
                .chain(content)
                .map(|member| (shape.name, member.name)),
        );
    }
    assert_eq!(
        seen, expected,
        "every member of every frame is in some vector"
    );
}

#[test]
fn the_tables_say_what_the_vectors_show() {
    check("device.json", DEVICE_FRAMES);
    check("server.json", SERVER_FRAMES);
}

#[test]
fn the_table_of_content_names_the_members_in_the_order_of_their_keys() {
    let names: Vec<_> = CONTENT.members.iter().map(|member| member.name).collect();
    assert_eq!(names, bellwire_protocol::Content::MEMBERS);
    assert!(CONTENT.members.is_sorted_by_key(|member| member.key));
}
