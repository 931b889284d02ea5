//! Which requests of a browser are carried out: those of this node's own pages.
//!
//! A page from anywhere that an administrator looks at can send requests to this node, some of them without asking
//! first (a POST of text, to take one). A browser says where such a request comes from; curl and other programs say
//! nothing, and are not meant. The rules are those of Go's `http.CrossOriginProtection`: `Sec-Fetch-Site` where there is
//! one, else `Origin` against `Host`; nothing is asked of GET and HEAD, which change nothing.
//!
//! Knows nothing of what is asked for.

use axum::extract::Request;
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::error::ApiError;

/// Refuses what the page of another site asks a browser to change.
pub(super) async fn refuse_other_sites(request: Request, next: Next) -> Response {
    if is_of_another_site(request.method(), request.headers()) {
        return ApiError::new(
            StatusCode::FORBIDDEN,
            "cross_site",
            "a page of another site may not change anything here",
        )
        .hint("send it from this node's own page, or with a program that is no browser")
        .into_response();
    }
    next.run(request).await
}

fn is_of_another_site(method: &Method, headers: &HeaderMap) -> bool {
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return false;
    }
    if let Some(site) = headers.get("sec-fetch-site") {
        // "none": the person typed it.
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
        is_of_another_site(&method, &headers)
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
