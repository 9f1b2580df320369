//! `/docs`: the OpenAPI document as a page for people, made once at the start.
//!
//! One HTML page, one style sheet and one icon, all from here: no script, no font, nothing from another host. The policy
//! that is sent with them allows exactly that, so that a mistake in the page could do nothing either.

use std::fmt::Write as _;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use http::{HeaderName, HeaderValue};
use serde_json::Value;

use super::Backend;

/// What the page may load: its style sheet and its icon.
const POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

const STYLE: &str = include_str!("docs_page.css");

/// Named in the page, or browsers would ask for one where there is none.
const ICON: &str = include_str!("docs_icon.svg");

/// The methods of an OpenAPI path, in the order of the page.
const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// Deepest chain of lists and maps that is written out in the name of a type.
const TYPE_DEPTH_MAX: usize = 8;

/// The API's description, for people.
#[utoipa::path(
    get,
    path = "/docs",
    tag = "operations",
    operation_id = "docs",
    security(()),
    responses((status = 200, description = "A page that loads nothing from elsewhere.", body = String, content_type = "text/html")),
)]
pub(super) async fn docs(State(backend): State<Backend>) -> Response {
    dressed("text/html; charset=utf-8", backend.page)
}

/// The style sheet of that page.
#[utoipa::path(
    get,
    path = "/docs/style.css",
    tag = "operations",
    operation_id = "docs_style",
    security(()),
    responses((status = 200, description = "It.", body = String, content_type = "text/css")),
)]
pub(super) async fn style() -> Response {
    dressed(
        "text/css; charset=utf-8",
        Bytes::from_static(STYLE.as_bytes()),
    )
}

/// The icon of that page.
#[utoipa::path(
    get,
    path = "/docs/icon.svg",
    tag = "operations",
    operation_id = "docs_icon",
    security(()),
    responses((status = 200, description = "It.", body = String, content_type = "image/svg+xml")),
)]
pub(super) async fn icon() -> Response {
    dressed("image/svg+xml", Bytes::from_static(ICON.as_bytes()))
}

fn dressed(content_type: &'static str, body: Bytes) -> Response {
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    let says: [(HeaderName, &'static str); 7] = [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        // After an upgrade the page must tell what is served now.
        (CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in says {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The page of a document.
pub(super) fn render(document: &Value) -> String {
    let mut page = Page {
        html: String::with_capacity(128 << 10),
        document,
    };
    page.whole();
    page.html
}

struct Page<'d> {
    html: String,
    document: &'d Value,
}

/// Adds formatted text. Writing to a string cannot fail.
macro_rules! put {
    ($page:expr, $($text:tt)+) => {
        let _ = write!($page.html, $($text)+);
    };
}

impl Page<'_> {
    fn whole(&mut self) {
        let document = self.document;
        let title = escaped(text(&document["info"]["title"]));
        let version = escaped(text(&document["info"]["version"]));
        put!(
            self,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\">\n<title>{title} {version}: the API</title>\n<link \
             rel=\"stylesheet\" href=\"/docs/style.css\">\n<link rel=\"icon\" type=\"image/svg+xml\" \
             href=\"/docs/icon.svg\">\n</head>\n<body>\n"
        );
        let tags: Vec<&Value> = document["tags"].as_array().into_iter().flatten().collect();
        put!(
            self,
            "<nav aria-label=\"Contents\">\n<p class=\"name\">{title}</p>\n"
        );
        for tag in &tags {
            let name = text(&tag["name"]);
            put!(
                self,
                "<h2><a href=\"#{0}\">{0}</a></h2>\n<ul>\n",
                escaped(name)
            );
            for (path, method, operation) in operations(document, name) {
                put!(
                    self,
                    "<li><a href=\"#{}\"><span class=\"method {method}\">{method}</span> {}</a></li>\n",
                    anchor(operation),
                    escaped(path)
                );
            }
            self.html.push_str("</ul>\n");
        }
        put!(
            self,
            "<h2><a href=\"#types\">types</a></h2>\n</nav>\n<main>\n<h1>{title} <small>{version}</small></h1>\n"
        );
        self.prose(text(&document["info"]["description"]));
        put!(
            self,
            "<p>The same for machines: <a href=\"/openapi.json\">openapi.json</a>.</p>\n"
        );
        self.prose(text(
            &document["components"]["securitySchemes"]["api_key"]["description"],
        ));
        put!(self, "<pre>Authorization: Bearer bw_…</pre>\n");
        for tag in &tags {
            let name = text(&tag["name"]);
            put!(self, "<section>\n<h2 id=\"{0}\">{0}</h2>\n", escaped(name));
            self.prose(text(&tag["description"]));
            for (path, method, operation) in operations(document, name) {
                self.operation(path, method, operation);
            }
            self.html.push_str("</section>\n");
        }
        self.html
            .push_str("<section>\n<h2 id=\"types\">types</h2>\n");
        for (name, schema) in entries(&document["components"]["schemas"]) {
            self.schema(name, schema);
        }
        self.html
            .push_str("</section>\n</main>\n</body>\n</html>\n");
    }

    fn operation(&mut self, path: &str, method: &str, operation: &Value) {
        put!(
            self,
            "<article id=\"{}\">\n<h3><span class=\"method {method}\">{method}</span> <code>{}</code></h3>\n",
            anchor(operation),
            escaped(path)
        );
        put!(
            self,
            "<p class=\"summary\">{}</p>\n",
            marked(text(&operation["summary"]))
        );
        self.prose(text(&operation["description"]));
        let open = operation["security"]
            .as_array()
            .is_some_and(|ways| ways.iter().all(|way| entries(way).next().is_none()));
        if open {
            self.html.push_str("<p class=\"note\">Needs no key.</p>\n");
        }
        let parameters: Vec<&Value> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .collect();
        if !parameters.is_empty() {
            self.html.push_str("<h4>Parameters</h4>\n<table>\n<thead><tr><th>name</th><th>in</th><th>type</th><th>what it is</th></tr></thead>\n<tbody>\n");
            for parameter in parameters {
                let must = if parameter["required"] == true {
                    " <em>required</em>"
                } else {
                    ""
                };
                put!(
                    self,
                    "<tr><td><code>{}</code>{must}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n",
                    escaped(text(&parameter["name"])),
                    escaped(text(&parameter["in"])),
                    type_of(&parameter["schema"], 0),
                    marked(text(&parameter["description"]))
                );
            }
            self.html.push_str("</tbody>\n</table>\n");
        }
        for (kind, content) in entries(&operation["requestBody"]["content"]) {
            put!(
                self,
                "<h4>Body</h4>\n<p><code>{}</code>: {}</p>\n",
                escaped(kind),
                type_of(&content["schema"], 0)
            );
            self.examples(content);
        }
        self.html.push_str("<h4>Answers</h4>\n");
        for (status, response) in entries(&operation["responses"]) {
            let refusal = if status.starts_with('2') {
                ""
            } else {
                " class=\"refusal\""
            };
            put!(
                self,
                "<details{refusal}>\n<summary><strong>{}</strong> {}</summary>\n",
                escaped(status),
                marked(text(&response["description"]))
            );
            for (name, header) in entries(&response["headers"]) {
                put!(
                    self,
                    "<p>Header <code>{}</code>: {}</p>\n",
                    escaped(name),
                    marked(text(&header["description"]))
                );
            }
            for (kind, content) in entries(&response["content"]) {
                put!(
                    self,
                    "<p><code>{}</code>: {}</p>\n",
                    escaped(kind),
                    type_of(&content["schema"], 0)
                );
                self.examples(content);
            }
            self.html.push_str("</details>\n");
        }
        self.html.push_str("</article>\n");
    }

    fn examples(&mut self, content: &Value) {
        if let Some(example) = content.get("example") {
            self.example("", example);
        }
        for (name, example) in entries(&content["examples"]) {
            self.example(name, &example["value"]);
        }
    }

    fn example(&mut self, name: &str, example: &Value) {
        let shown = match example.as_str() {
            Some(text) => text.to_owned(),
            // A value of the document: written as it was read.
            None => serde_json::to_string_pretty(example).unwrap_or_default(),
        };
        put!(self, "<figure>");
        if !name.is_empty() {
            put!(self, "<figcaption>{}</figcaption>", marked(name));
        }
        put!(self, "<pre>{}</pre></figure>\n", escaped(shown.trim_end()));
    }

    fn schema(&mut self, name: &str, schema: &Value) {
        put!(
            self,
            "<article id=\"type-{0}\">\n<h3><code>{0}</code></h3>\n",
            escaped(name)
        );
        self.prose(text(&schema["description"]));
        let required: Vec<&str> = schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .map(text)
            .collect();
        let mut members = entries(&schema["properties"]).peekable();
        if members.peek().is_none() {
            put!(self, "<p>{}</p>\n</article>\n", type_of(schema, 0));
            return;
        }
        self.html.push_str("<table>\n<thead><tr><th>member</th><th>type</th><th>what it is</th></tr></thead>\n<tbody>\n");
        for (member, of) in members {
            let must = if required.contains(&member) {
                ""
            } else {
                " <em>may be absent</em>"
            };
            put!(
                self,
                "<tr><td><code>{}</code>{must}</td><td>{}</td><td>{}</td></tr>\n",
                escaped(member),
                type_of(of, 0),
                marked(text(&of["description"]))
            );
        }
        self.html.push_str("</tbody>\n</table>\n</article>\n");
    }

    /// Paragraphs.
    fn prose(&mut self, prose: &str) {
        for paragraph in prose.split("\n\n").filter(|text| !text.trim().is_empty()) {
            put!(self, "<p>{}</p>\n", marked(paragraph.trim()));
        }
    }
}

/// The operations of a tag: path, method, operation.
///
/// Those whose path bears the tag's name come first: what somebody looks for under that name.
fn operations<'d>(document: &'d Value, tag: &str) -> Vec<(&'d str, &'static str, &'d Value)> {
    let mut found: Vec<_> = entries(&document["paths"])
        .flat_map(|(path, item)| {
            METHODS
                .into_iter()
                .filter_map(move |method| Some((path, method, item.get(method)?)))
        })
        .filter(|(_, _, operation)| operation["tags"][0] == tag)
        .collect();
    found.sort_by_key(|(path, _, _)| path.split('/').nth(2) != Some(tag));
    found
}

/// The members of a map; nothing, if it is none.
fn entries(map: &Value) -> impl Iterator<Item = (&str, &Value)> {
    map.as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.as_str(), value))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Where an operation stands on the page.
fn anchor(operation: &Value) -> String {
    format!("op-{}", escaped(text(&operation["operationId"])))
}

/// A type in a few words, as HTML.
fn type_of(schema: &Value, depth: usize) -> String {
    if depth > TYPE_DEPTH_MAX {
        return "…".to_owned();
    }
    if let Some(name) = text(&schema["$ref"]).strip_prefix("#/components/schemas/") {
        let name = escaped(name);
        return format!("<a href=\"#type-{name}\">{name}</a>");
    }
    for kind in ["oneOf", "anyOf", "allOf"] {
        if let Some(several) = schema[kind].as_array() {
            let named: Vec<String> = several.iter().map(|one| type_of(one, depth + 1)).collect();
            return named.join(if kind == "allOf" { " and " } else { " or " });
        }
    }
    let kinds = match schema["type"].as_array() {
        Some(kinds) => kinds
            .iter()
            .map(text)
            .filter(|kind| *kind != "null")
            .collect(),
        None => vec![text(&schema["type"])],
    };
    let mut said = match kinds.as_slice() {
        ["array"] => format!("list of {}", type_of(&schema["items"], depth + 1)),
        [] | [""] => "anything".to_owned(),
        kinds => escaped(&kinds.join(" or ")),
    };
    if let Some(words) = schema["enum"].as_array() {
        let words: Vec<String> = words
            .iter()
            .map(|word| format!("<code>{}</code>", escaped(text(word))))
            .collect();
        said = words.join(", ");
    }
    let mut bounds = Vec::new();
    for (bound, word) in [
        ("minimum", "at least"),
        ("maximum", "at most"),
        ("minLength", "at least"),
        ("maxLength", "at most"),
        ("minItems", "at least"),
        ("maxItems", "at most"),
    ] {
        if let Some(number) = schema[bound].as_number() {
            // That a number is not negative needs no word.
            if !(bound == "minimum" && number.as_u64() == Some(0)) {
                bounds.push(format!("{word} {number}"));
            }
        }
    }
    if !bounds.is_empty() {
        let _ = write!(said, ", {}", bounds.join(", "));
    }
    said
}

/// Text for HTML, in elements and in attributes.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// Text for HTML in which what stands between back-ticks is code.
fn marked(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    let mut code = false;
    let parts: Vec<&str> = text.split('`').collect();
    let last = parts.len() - 1;
    for (index, part) in parts.into_iter().enumerate() {
        html.push_str(&escaped(part));
        // A back-tick without a partner stands for itself.
        if index < last {
            let closes = code;
            if !closes && index + 1 == last {
                html.push('`');
            } else {
                html.push_str(if closes { "</code>" } else { "<code>" });
                code = !code;
            }
        }
    }
    html
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn page() -> String {
        let document = crate::http::document(utoipa::openapi::OpenApi::default());
        render(&serde_json::to_value(&document).unwrap())
    }

    #[test]
    fn every_operation_and_every_type_is_on_the_page_and_every_link_leads_somewhere() {
        let document = crate::http::document(utoipa::openapi::OpenApi::default());
        let document = serde_json::to_value(&document).unwrap();
        let page = render(&document);
        let mut operations = 0;
        for (path, item) in entries(&document["paths"]) {
            for (_, operation) in entries(item) {
                operations += 1;
                assert!(
                    page.contains(&format!("<article id=\"{}\">", anchor(operation))),
                    "{path}"
                );
            }
        }
        assert!(operations > 10);
        for (name, _) in entries(&document["components"]["schemas"]) {
            assert!(
                page.contains(&format!("<article id=\"type-{name}\">")),
                "{name}"
            );
        }
        for link in page.split("href=\"#").skip(1) {
            let target = link.split_once('"').unwrap().0;
            assert!(page.contains(&format!("id=\"{target}\"")), "{target}");
        }
    }

    #[test]
    fn nothing_on_the_page_is_loaded_from_elsewhere_or_executed() {
        for served in [page(), STYLE.to_owned()] {
            for never in [
                "http:",
                "https:",
                "//",
                "<script",
                "javascript:",
                "style=",
                "<style",
                "<img",
                "<iframe",
                "@import",
                "url(",
                " onload",
                " onclick",
                " onerror",
            ] {
                // Two strokes may stand in an example, but never where something is loaded.
                if never == "//" || never.starts_with("http") {
                    for place in ["src=\"", "href=\"", "url("] {
                        for loaded in served.split(place).skip(1) {
                            let target = loaded.split('"').next().unwrap();
                            assert!(!target.contains(never), "{target}");
                        }
                    }
                } else {
                    assert!(!served.contains(never), "{never}");
                }
            }
        }
    }

    #[test]
    fn what_a_document_says_stays_text() {
        let hostile = "<img src=x onerror=\"alert(1)\">'&`<b>`";
        let document = json!({
            "info": {"title": hostile, "description": hostile},
            "tags": [{"name": "t", "description": hostile}],
            "paths": {"/<x>": {"get": {"tags": ["t"], "operationId": "a\"b", "summary": hostile,
                "parameters": [{"name": hostile, "in": hostile, "schema": {"enum": [hostile]}}],
                "responses": {"200": {"description": hostile, "content": {hostile: {"example": hostile}}}}}}},
            "components": {"schemas": {hostile: {"properties": {hostile: {"type": hostile}}}}},
        });
        let page = render(&document);
        assert!(
            !page.contains("<img") && !page.contains("<b>") && !page.contains("=\"alert"),
            "{page}"
        );
        assert!(page.contains("<code>&lt;b&gt;</code>"));
    }

    #[test]
    fn back_ticks_come_in_pairs() {
        assert_eq!(marked("a `b` c"), "a <code>b</code> c");
        assert_eq!(marked("a ` b"), "a ` b");
        assert_eq!(marked("`a` `b` `"), "<code>a</code> <code>b</code> `");
        assert_eq!(marked(""), "");
    }
}
