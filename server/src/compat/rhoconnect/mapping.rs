//! What becomes of RhoConnect's parameters: the one place that docs/rhoconnect.md describes.

use bellwire_protocol::Content;
use bellwire_protocol::limits::SYNC_MAX;

use super::params::Params;

/// The content of the ping.
///
/// | parameter | member |
/// | --- | --- |
/// | `message` | `body`, an empty one too |
/// | `sources` | `sync`, in the order given; a single source is a list of one, `all` a source like any other |
/// | `vibrate` | `vibrate_ms`; what is no whole number is left out, as the devices ignore it too |
/// | `badge` | `badge`, likewise |
/// | `sound` | `sound`, unless empty |
///
/// Ranges are the device's affair (a client makes 2,500 ms of 0 and caps at 25,500 ms), so numbers pass unchanged.
///
/// # Errors
/// A text for the caller when there are more sources than a notification can name.
pub(super) fn content(params: &Params) -> Result<Content, String> {
    let sync = params.list("sources");
    if let Some(sources) = &sync
        && sources.len() > SYNC_MAX
    {
        return Err(format!("A ping names at most {SYNC_MAX} sources"));
    }
    Ok(Content {
        body: params.text("message").map(String::from),
        sync,
        vibrate_ms: params.number("vibrate"),
        badge: params.number("badge"),
        sound: params
            .text("sound")
            .filter(|sound| !sound.is_empty())
            .map(String::from),
        ..Content::default()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn check(body: &str, json: bool) -> Content {
        content(&Params::read(None, json, body.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn every_parameter_has_its_member() {
        let expected = Content {
            body: Some("Order ready".to_owned()),
            sync: Some(vec!["Product".to_owned(), "Customer".to_owned()]),
            vibrate_ms: Some(2_000),
            badge: Some(3),
            sound: Some("ding.mp3".to_owned()),
            ..Content::default()
        };
        assert!(
            check(
                "message=Order+ready&sources[]=Product&sources[]=Customer&vibrate=2000&badge=3&sound=ding.mp3",
                false,
            ) == expected
        );
        assert!(
            check(
                r#"{"message":"Order ready","sources":["Product","Customer"],"vibrate":"2000","badge":3,"sound":"ding.mp3"}"#,
                true,
            ) == expected
        );
    }

    #[test]
    fn what_the_original_ignores_is_ignored() {
        assert!(
            check(
                "user_id=a&source_id=X&vibrate=soon&badge=-1&sound=&phone=1",
                false
            )
            .is_empty()
        );
        assert!(check(r#"{"user_id":"a","message":null,"vibrate":{}}"#, true).is_empty());
    }

    #[test]
    fn too_many_sources_are_refused_with_a_text() {
        let body = "sources[]=s&".repeat(SYNC_MAX + 1);
        let params = Params::read(None, false, body.as_bytes()).unwrap();
        assert!(content(&params).is_err());
    }
}
