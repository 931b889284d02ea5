//! A node's REST interface, as a user of curl sees it.

use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use reqwest::blocking::{Body, Client, RequestBuilder};
use serde::de::DeserializeOwned;

/// Longer than a node may take to say that it has no quorum.
const TIMEOUT: Duration = Duration::from_secs(60);
/// For requests that carry gigabytes.
const BULK_TIMEOUT: Duration = Duration::from_secs(900);

/// The HTTP address of one node.
#[derive(Clone, Debug)]
pub struct Http {
    address: String,
    client: Client,
}

/// What a node answered.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Reply {
    /// The value of a header (name in lower case).
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e} in: {}", self.text()))
    }

    /// Panics unless the status is one of these.
    #[track_caller]
    pub fn expect(self, statuses: &[u16]) -> Reply {
        assert!(
            statuses.contains(&self.status),
            "expected {statuses:?}, not {}: {}",
            self.status,
            self.text()
        );
        self
    }
}

impl Http {
    /// The node that serves `address` (`HOST:PORT`).
    pub fn new(address: &str) -> Http {
        let client = Client::builder()
            .timeout(TIMEOUT)
            .build()
            .expect("make an HTTP client");
        Http {
            address: address.to_string(),
            client,
        }
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn send(request: RequestBuilder) -> reqwest::Result<Reply> {
        let response = request.send()?;
        let status = response.status().as_u16();
        let headers = response
            .headers()
            .iter()
            .map(|(name, value)| {
                (
                    name.as_str().to_string(),
                    String::from_utf8_lossy(value.as_bytes()).into_owned(),
                )
            })
            .collect();
        Ok(Reply {
            status,
            headers,
            body: response.bytes()?.to_vec(),
        })
    }

    /// GET, of a node that may not be there.
    pub fn try_get(&self, path: &str) -> Result<Reply, String> {
        Self::send(self.client.get(self.url(path)))
            .map_err(|e| format!("GET {path} at {}: {e}", self.address))
    }

    /// GET.
    #[track_caller]
    pub fn get(&self, path: &str) -> Reply {
        self.try_get(path).unwrap_or_else(|e| panic!("{e}"))
    }

    /// GET with one header more.
    #[track_caller]
    pub fn get_with(&self, path: &str, header: (&str, &str)) -> Reply {
        let request = self.client.get(self.url(path)).header(header.0, header.1);
        Self::send(request).unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    /// HEAD.
    #[track_caller]
    pub fn head(&self, path: &str) -> Reply {
        Self::send(self.client.head(self.url(path))).unwrap_or_else(|e| panic!("HEAD {path}: {e}"))
    }

    /// DELETE.
    #[track_caller]
    pub fn delete(&self, path: &str) -> Reply {
        Self::send(self.client.delete(self.url(path))).unwrap_or_else(|e| panic!("DELETE {path}: {e}"))
    }

    /// POST.
    #[track_caller]
    pub fn post(&self, path: &str, body: impl Into<Vec<u8>>) -> Reply {
        self.try_post(path, body).unwrap_or_else(|e| panic!("{e}"))
    }

    /// POST with more headers.
    #[track_caller]
    pub fn post_with(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Reply {
        let mut request = self.client.post(self.url(path)).body(body.into());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Self::send(request).unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    /// POST, to a node that may not be there.
    pub fn try_post(&self, path: &str, body: impl Into<Vec<u8>>) -> Result<Reply, String> {
        let request = self.client.post(self.url(path)).body(body.into());
        Self::send(request).map_err(|e| format!("POST {path} at {}: {e}", self.address))
    }

    /// POST of a body that is made while it is sent; `length` unknown: chunked.
    #[track_caller]
    pub fn post_stream(&self, path: &str, body: impl Read + Send + 'static, length: Option<u64>) -> Reply {
        let body = match length {
            Some(length) => Body::sized(body, length),
            None => Body::new(body),
        };
        let request = self.client.post(self.url(path)).timeout(BULK_TIMEOUT).body(body);
        Self::send(request).unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    /// GET of a body that is read while it comes.
    #[track_caller]
    pub fn get_stream(&self, path: &str) -> impl Read {
        let response = self.client.get(self.url(path)).timeout(BULK_TIMEOUT).send();
        let response = response.unwrap_or_else(|e| panic!("GET {path}: {e}"));
        assert_eq!(response.status().as_u16(), 200, "GET {path}");
        response
    }

    /// A request whose target is sent byte for byte (libraries tidy up `..` before they send). Answers the status
    /// code and the body.
    #[track_caller]
    pub fn raw(&self, method: &str, target: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).expect("connect");
        stream.set_read_timeout(Some(TIMEOUT)).expect("set a time-out");
        let mut request = format!("{method} ").into_bytes();
        request.extend_from_slice(target);
        let rest = format!(
            " HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody",
            self.address
        );
        request.extend_from_slice(rest.as_bytes());
        stream.write_all(&request).expect("send a request");
        let mut answer = Vec::new();
        // A server that refuses the request early may reset the connection after its answer.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer
            .split_whitespace()
            .nth(1)
            .and_then(|code| code.parse().ok());
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (
            status.unwrap_or_else(|| panic!("no HTTP answer to {}: {answer:?}", target.escape_ascii())),
            body.to_string(),
        )
    }
}
