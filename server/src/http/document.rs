//! The OpenAPI document, generated from the handlers. `openapi.json` at the top of the repository is a copy; a test
//! fails when it drifts.

use std::collections::BTreeMap;

use bellwire_protocol::Code;
use serde_json::json;
use utoipa::OpenApi;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::example::Example;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::schema::{ObjectBuilder, SchemaType, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Ref, RefOr, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::{ProblemBody, retry_after_s};
use super::events::GapEntry;
use super::outcomes::OutcomeEntry;
use super::{
    Backend, backup, batch, callbacks, devices, docs_page, events, keys, operations, outcomes,
    pings, topics, users,
};

/// Groups of refusals for the responses of a handler: `Name: Code, Code;`.
macro_rules! refusals {
    ($($name:ident: $($code:ident),+;)+) => {
        $(
            struct $name;

            impl utoipa::IntoResponses for $name {
                fn responses() -> std::collections::BTreeMap<
                    String,
                    utoipa::openapi::RefOr<utoipa::openapi::Response>,
                > {
                    $crate::http::document::refusal_responses(&[$(bellwire_protocol::Code::$code),+])
                }
            }
        )+
    };
}
pub(super) use refusals;

/// One response for each status among these codes, with an example for each code.
pub(super) fn refusal_responses(codes: &[Code]) -> BTreeMap<String, RefOr<Response>> {
    let mut by_status: BTreeMap<u16, Vec<Code>> = BTreeMap::new();
    for code in codes {
        if let Some(status) = code.http_status() {
            by_status.entry(status).or_default().push(*code);
        }
    }
    by_status
        .into_iter()
        .map(|(status, codes)| {
            let names: Vec<String> = codes.iter().map(|code| format!("`{code}`")).collect();
            let examples = codes.iter().map(|code| {
                let mut shown = Example::new();
                shown.value = Some(example(*code, status));
                (code.name().to_owned(), shown)
            });
            let content = ContentBuilder::new()
                .schema(Some(Ref::from_schema_name("Problem")))
                .examples_from_iter(examples)
                .build();
            let mut response = ResponseBuilder::new()
                .description(names.join(", "))
                .content("application/problem+json", content);
            if codes.iter().any(|code| retry_after_s(*code).is_some()) {
                response = response.header(
                    "Retry-After",
                    HeaderBuilder::new()
                        .schema(Some(
                            ObjectBuilder::new().schema_type(SchemaType::Type(Type::Integer)),
                        ))
                        .description(Some("When to try again, in seconds."))
                        .build(),
                );
            }
            (status.to_string(), response.build().into())
        })
        .collect()
}

fn example(code: Code, status: u16) -> serde_json::Value {
    json!({
        "type": format!("urn:bellwire:problem:{code}"),
        "title": code.meaning(),
        "status": status,
        "detail": code.meaning(),
        "code": code.name(),
        "remedy": code.remedy(),
        "request_id": "lq0x3k2m-17",
    })
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Bellwire",
        description = "Rings devices over a wire that the company owns. docs/http-api.md explains how to use it; \
            docs/errors.md lists every `code`. Every refusal is `application/problem+json` (RFC 9457); the front doors of \
            other systems answer in their own ways.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    components(schemas(ProblemBody<'static>, OutcomeEntry, GapEntry)),
    security(("api_key" = [])),
    tags(
        (name = "pings", description = "Ring devices and see what became of it."),
        (name = "callbacks", description = "Where outcomes are posted."),
        (name = "devices", description = "Who can be rung."),
        (name = "users", description = "Whose devices they are."),
        (name = "keys", description = "Who may call."),
        (name = "operations", description = "How the server is. On a listener of its own; status and this document are on both."),
        (name = "rhoconnect", description = "The ping endpoint of RhoConnect, for backends that change only the address."),
    ),
)]
struct Frame;

/// The routes of the API listener.
pub(super) fn api_routes() -> OpenApiRouter<Backend> {
    OpenApiRouter::new()
        .routes(routes!(pings::create))
        .routes(routes!(batch::create))
        .routes(routes!(pings::look, pings::revoke))
        .routes(routes!(pings::withdraw))
        .routes(routes!(devices::create, devices::list))
        .routes(routes!(outcomes::list))
        .routes(routes!(devices::look, devices::change, devices::revoke))
        .routes(routes!(events::follow))
        .routes(routes!(outcomes::of_device))
        .routes(routes!(devices::rotate))
        .routes(routes!(topics::look, topics::set, topics::edit))
        .routes(routes!(users::look, users::erase))
        .routes(routes!(callbacks::set, callbacks::look, callbacks::remove))
        .routes(routes!(callbacks::rotate))
        .routes(routes!(callbacks::test))
        .routes(routes!(callbacks::letters))
        .routes(routes!(callbacks::resend))
        .routes(routes!(callbacks::drop_letter))
        .routes(routes!(keys::create, keys::list))
        .routes(routes!(keys::revoke))
        .routes(routes!(backup::take))
        .routes(routes!(operations::status))
        .routes(routes!(operations::openapi))
}

/// The routes of the operations listener.
pub(super) fn operations_routes() -> OpenApiRouter<Backend> {
    OpenApiRouter::new()
        .routes(routes!(operations::status))
        .routes(routes!(operations::alive))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::metrics))
        .routes(routes!(operations::openapi))
        .routes(routes!(docs_page::docs))
        .routes(routes!(docs_page::style))
        .routes(routes!(docs_page::icon))
}

/// The document of the whole surface: the native API, operations, and the front doors whose document is given.
#[must_use]
pub fn document(doors: utoipa::openapi::OpenApi) -> utoipa::openapi::OpenApi {
    let mut document = Frame::openapi();
    document.merge(api_routes().into_openapi());
    document.merge(operations_routes().into_openapi());
    document.merge(doors);
    if let Some(components) = document.components.as_mut() {
        components.add_security_scheme(
            "api_key",
            SecurityScheme::Http(
                HttpBuilder::new()
                    .scheme(HttpAuthScheme::Bearer)
                    .bearer_format("bw_…")
                    .description(Some(
                        "An API key. It belongs to one app and has scopes: `ping`, `read`, `devices`, `keys`, `admin`.",
                    ))
                    .build(),
            ),
        );
    }
    document
}

/// The document as text: two spaces of indentation and a newline at the end.
#[must_use]
pub(super) fn render(document: &utoipa::openapi::OpenApi) -> String {
    // Generated from constants; a test serialises it.
    let mut text = document.to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}
