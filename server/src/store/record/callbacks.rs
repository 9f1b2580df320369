//! Records of signed callbacks and their dead letters.

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;

use super::mailbox::{outcome, outcome_number};
use super::{Fault, read, write};
use crate::delivery::AppId;
use crate::ports::{CallbackRecord, DeadLetter, Failing, OutcomePosition, SigningSecret};

#[derive(Encode, BorrowDecode)]
struct SigningSecretV1<'a> {
    key: &'a [u8],
    until_ms: Option<u64>,
}

#[derive(Encode, BorrowDecode)]
struct FailingV1<'a> {
    since_ms: u64,
    tries: u32,
    why: &'a str,
}

#[derive(Encode, BorrowDecode)]
struct CallbackV1<'a> {
    app: u32,
    url: &'a str,
    outcomes: &'a [u8],
    secrets: Vec<SigningSecretV1<'a>>,
    created_ms: u64,
    position: u64,
    sending: Option<u64>,
    failing: Option<FailingV1<'a>>,
    gone_ms: Option<u64>,
    next_letter: u64,
}

#[derive(Encode, BorrowDecode)]
struct DeadLetterV1<'a> {
    id: &'a str,
    body: &'a [u8],
    events: u32,
    tries: u32,
    since_ms: u64,
    at_ms: u64,
    why: &'a str,
}

/// Writes where outcomes are posted.
pub(in crate::store) fn put_callback(key: &[u8], out: &mut Vec<u8>, callback: &CallbackRecord) {
    let outcomes: Vec<u8> = callback
        .outcomes
        .iter()
        .map(|outcome| outcome_number(*outcome))
        .collect();
    write(
        key,
        out,
        &CallbackV1 {
            app: callback.app.0,
            url: &callback.url,
            outcomes: &outcomes,
            secrets: callback
                .secrets
                .iter()
                .map(|secret| SigningSecretV1 {
                    key: &secret.key,
                    until_ms: secret.until_ms,
                })
                .collect(),
            created_ms: callback.created_ms,
            position: callback.position.0,
            sending: callback.sending.map(|end| end.0),
            failing: callback.failing.as_ref().map(|failing| FailingV1 {
                since_ms: failing.since_ms,
                tries: failing.tries,
                why: &failing.why,
            }),
            gone_ms: callback.gone_ms,
            next_letter: callback.next_letter,
        },
    );
}

/// Reads where outcomes are posted.
pub(in crate::store) fn callback(key: &[u8], value: &[u8]) -> Result<CallbackRecord, Fault> {
    let disk: CallbackV1<'_> = read(key, value)?;
    Ok(CallbackRecord {
        app: AppId(disk.app),
        url: disk.url.to_owned(),
        outcomes: disk
            .outcomes
            .iter()
            .map(|number| outcome(*number))
            .collect::<Result<_, _>>()?,
        secrets: disk
            .secrets
            .into_iter()
            .map(|secret| SigningSecret {
                key: secret.key.to_vec(),
                until_ms: secret.until_ms,
            })
            .collect(),
        created_ms: disk.created_ms,
        position: OutcomePosition(disk.position),
        sending: disk.sending.map(OutcomePosition),
        failing: disk.failing.map(|failing| Failing {
            since_ms: failing.since_ms,
            tries: failing.tries,
            why: failing.why.to_owned(),
        }),
        gone_ms: disk.gone_ms,
        next_letter: disk.next_letter,
    })
}

/// Writes a batch that could not be posted; whose and which is in its key.
pub(in crate::store) fn put_dead_letter(key: &[u8], out: &mut Vec<u8>, letter: &DeadLetter) {
    write(
        key,
        out,
        &DeadLetterV1 {
            id: &letter.id,
            body: &letter.body,
            events: letter.events,
            tries: letter.tries,
            since_ms: letter.since_ms,
            at_ms: letter.at_ms,
            why: &letter.why,
        },
    );
}

/// Reads a batch that could not be posted. `app` and `number` are those of its key.
pub(in crate::store) fn dead_letter(
    key: &[u8],
    app: AppId,
    number: u64,
    value: &[u8],
) -> Result<DeadLetter, Fault> {
    let disk: DeadLetterV1<'_> = read(key, value)?;
    Ok(DeadLetter {
        app,
        number,
        id: disk.id.to_owned(),
        body: Bytes::copy_from_slice(disk.body),
        events: disk.events,
        tries: disk.tries,
        since_ms: disk.since_ms,
        at_ms: disk.at_ms,
        why: disk.why.to_owned(),
    })
}
