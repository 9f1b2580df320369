//! A backend, as small as one can be.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// A backend with a key.
#[derive(Clone)]
pub struct Api {
    api: SocketAddr,
    operations: SocketAddr,
    key: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// What the server said.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body as text.
    pub text: String,
}

impl Answer {
    /// The body as JSON; null if it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or(Value::Null)
    }

    /// The body as JSON, if the status is as expected.
    ///
    /// # Panics
    ///
    /// With the whole answer, if it is not.
    #[track_caller]
    #[must_use]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        self.json()
    }

    /// The id of what was made; empty if there is none.
    #[must_use]
    pub fn id(&self) -> String {
        self.json()["id"].as_str().unwrap_or_default().to_owned()
    }

    /// The problem's code.
    #[must_use]
    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl Api {
    /// A backend that calls `api` with `key`.
    #[must_use]
    pub fn new(api: SocketAddr, operations: SocketAddr, key: &str) -> Api {
        Api {
            api,
            operations,
            key: key.to_owned(),
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// The same backend with another key.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Api {
        Api {
            key: key.to_owned(),
            ..self.clone()
        }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Any request; `None` when there was no answer, as when the server was killed.
    pub async fn try_send(&self, request: Request<Full<Bytes>>) -> Option<Answer> {
        let response = self.client.request(request).await.ok()?;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.ok()?.to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        Some(Answer {
            status: parts.status,
            headers: parts.headers,
            text,
        })
    }

    /// A request to the API with this backend's key, with more headers.
    ///
    /// # Panics
    ///
    /// When the parts do not make a request.
    #[must_use]
    pub fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Request<Full<Bytes>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.api))
            .header("authorization", format!("Bearer {}", self.key));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        request
            .body(Full::from(body.to_owned()))
            .expect("a test's request is well-formed")
    }

    /// A call of the API that is answered.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    pub async fn call(&self, method: Method, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let request = self.request(method, path, &[], &body);
        self.try_send(request).await.expect("the server answers")
    }

    /// `GET` of the API.
    pub async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, &Value::Null).await
    }

    /// `POST` to the API.
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(Method::POST, path, &body).await
    }

    /// `DELETE` of the API.
    pub async fn delete(&self, path: &str) -> Answer {
        self.call(Method::DELETE, path, &Value::Null).await
    }

    /// `GET` of the operations listener, without a key.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    pub async fn operations(&self, path: &str) -> Answer {
        let request = Request::get(format!("http://{}{path}", self.operations))
            .body(Full::default())
            .expect("a test's request is well-formed");
        self.try_send(request).await.expect("the server answers")
    }

    /// Registers a device: its id and secret.
    ///
    /// # Panics
    ///
    /// When that is refused.
    pub async fn device(&self, user: &str) -> (String, String) {
        let made = self
            .post("/v1/devices", serde_json::json!({ "user": user }))
            .await
            .expect(201);
        let text = |name: &str| {
            made[name]
                .as_str()
                .expect("a made device has an id and a secret")
                .to_owned()
        };
        (text("device"), text("secret"))
    }
}
