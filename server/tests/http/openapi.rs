//! `openapi.json` at the top of the repository is the document that the code generates.

use std::collections::BTreeSet;

use bellwire_server::{compat, http};
use serde_json::Value;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../openapi.json");

fn document() -> String {
    let mut text = http::document(compat::document()).to_pretty_json().unwrap();
    text.push('\n');
    text
}

#[test]
fn the_committed_document_is_the_generated_one() {
    let generated = document();
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(PATH, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(
        committed == generated,
        "openapi.json differs from the code; run `UPDATE_OPENAPI=1 cargo test -p bellwire-server --test http_openapi` \
         and look at the difference"
    );
}

/// Everything under `key`, wherever it stands.
fn collect<'v>(value: &'v Value, key: &str, found: &mut Vec<&'v Value>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                if name == key {
                    found.push(member);
                }
                collect(member, key, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, key, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_reference_leads_somewhere() {
    let document: Value = serde_json::from_str(&document()).unwrap();
    let mut references = Vec::new();
    collect(&document, "$ref", &mut references);
    assert!(!references.is_empty());
    for reference in references {
        let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
        assert!(
            document.pointer(pointer).is_some(),
            "{pointer} leads nowhere"
        );
    }
}

#[test]
fn every_operation_has_a_name_a_summary_and_its_refusals() {
    let document: Value = serde_json::from_str(&document()).unwrap();
    let mut names = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let name = operation["operationId"].as_str().unwrap();
            assert!(names.insert(name.to_owned()), "{name} is used twice");
            assert!(operation["summary"].is_string(), "{method} {path}");
            let open = operation["security"] == serde_json::json!([{}]);
            let responses = operation["responses"].as_object().unwrap();
            assert_eq!(!open, responses.contains_key("401"), "{method} {path}");
        }
    }
    assert!(names.len() >= 18, "{names:?}");
}

#[test]
fn every_code_over_http_is_documented_or_not_ours() {
    use bellwire_protocol::Code;
    let text = document();
    // Answers of the device port, and of the router to what no operation is.
    let elsewhere = [
        Code::UnsupportedSubprotocol,
        Code::NotADeviceEndpoint,
        Code::TlsRequired,
        Code::UnsupportedVersion,
        Code::TooManyConnections,
        Code::MethodNotAllowed,
    ];
    for code in Code::ALL {
        if code.http_status().is_some() && !elsewhere.contains(code) {
            assert!(
                text.contains(&format!("`{code}`")),
                "{code} is in no response"
            );
        }
    }
}
