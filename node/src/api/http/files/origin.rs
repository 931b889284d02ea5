//! Protection against cross-site requests of browsers.
//!
//! A page of another site that an administrator visits can send requests to this node, some without a preflight (for
//! example, a POST of text). A browser declares the origin of such a request; other programs do not, and are not
//! affected. The rules are those of Go's `http.CrossOriginProtection`: `Sec-Fetch-Site` if present, otherwise `Origin`
//! compared with `Host`; GET and HEAD are allowed because they change nothing.
//!
//! Does not know the meaning of requests.

use axum::extract::Request;
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::error::ApiError;

/// Refuses requests of pages of other sites that could change something.
pub(super) async fn reject_cross_site(request: Request, next: Next) -> Response {
    if is_cross_site(request.method(), request.headers()) {
        return ApiError::new(
            StatusCode::FORBIDDEN,
            "cross_site",
            "pages of other sites may not send this request",
        )
        .hint("send it from the dashboard of this node, or with a program that is not a browser")
        .into_response();
    }
    next.run(request).await
}

fn is_cross_site(method: &Method, headers: &HeaderMap) -> bool {
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return false;
    }
    if let Some(site) = headers.get("sec-fetch-site") {
        // "none": the user entered the URL.
        return site != "same-origin" && site != "none";
    }
    let Some(origin) = headers.get(ORIGIN) else {
        return false;
    };
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let authority = origin.as_ref().and_then(Uri::authority).map(|from| from.as_str());
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    authority.is_none() || authority != host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(method: Method, named: &[(&'static str, &'static str)]) -> bool {
        let headers = named
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        is_cross_site(&method, &headers)
    }

    #[test]
    fn only_what_a_page_of_another_site_would_change_is_refused() {
        let here = ("host", "10.0.0.1:8081");
        assert!(!refused(Method::POST, &[here]), "curl");
        assert!(!refused(
            Method::POST,
            &[here, ("origin", "http://10.0.0.1:8081")]
        ));
        assert!(!refused(Method::POST, &[here, ("sec-fetch-site", "same-origin")]));
        assert!(!refused(Method::DELETE, &[here, ("sec-fetch-site", "none")]));
        assert!(!refused(Method::GET, &[here, ("sec-fetch-site", "cross-site")]));
        assert!(refused(Method::POST, &[here, ("sec-fetch-site", "cross-site")]));
        assert!(refused(Method::POST, &[here, ("sec-fetch-site", "same-site")]));
        assert!(refused(Method::PUT, &[here, ("origin", "http://10.0.0.1:8082")]));
        assert!(refused(Method::POST, &[here, ("origin", "https://example.org")]));
        assert!(refused(Method::DELETE, &[here, ("origin", "null")]));
    }
}
