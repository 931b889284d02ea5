//! The response to a failed request: a status and a JSON body `{code, message, hint}`.
//!
//! `code` is for programs and never changes its meaning. `message` describes the problem of this request. `hint` says
//! what to do, or is null.

use axum::Json;
use axum::http::StatusCode;
use axum::http::header::{HeaderName, HeaderValue, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use quorumfs_proto::FsError;
use serde::Serialize;
use utoipa::ToSchema;

/// Value of `Retry-After` of a 503, in seconds: an election and its calls are complete by then.
const RETRY_AFTER_S: u64 = 2;

/// Why a request failed.
#[derive(Debug)]
pub(in crate::api) struct ApiError {
    pub(in crate::api) status: StatusCode,
    pub(in crate::api) code: &'static str,
    message: String,
    hint: Option<String>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl ApiError {
    pub(in crate::api) fn new(
        status: StatusCode,
        code: &'static str,
        message: impl Into<String>,
    ) -> ApiError {
        ApiError {
            status,
            code,
            message: message.into(),
            hint: None,
            headers: Vec::new(),
        }
    }

    pub(in crate::api) fn hint(mut self, hint: impl Into<String>) -> ApiError {
        self.hint = Some(hint.into());
        self
    }

    pub(in crate::api) fn header(mut self, name: HeaderName, value: HeaderValue) -> ApiError {
        self.headers.push((name, value));
        self
    }

    /// Creates a 503: no decision is possible now, because of `reason`.
    pub(in crate::api) fn unavailable(reason: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", reason)
            .hint("try again later; GET /status of this node shows whether it can write and why not")
            .header(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S))
    }

    pub(in crate::api) fn bad_request(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(in crate::api) fn conflict(code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, code, message)
    }

    /// Creates a 500: a fault of this program.
    pub(in crate::api) fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
            .hint("this is a fault of the node; see its log")
    }
}

/// The body of the response to a failed request.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(in crate::api) struct ErrorBody {
    /// The kind of failure, for programs; never changes its meaning.
    #[schema(example = "not_found")]
    code: &'static str,
    /// The problem of this request, for people.
    message: String,
    /// What to do, if anything.
    hint: Option<String>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(code = self.code, message = %self.message, "HTTP request failed");
        }
        let body = ErrorBody {
            code: self.code,
            message: self.message,
            hint: self.hint,
        };
        let mut response = (self.status, Json(body)).into_response();
        response.headers_mut().extend(self.headers);
        response
    }
}

/// Why a call to the cluster has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::api) enum CallError {
    /// The cluster refused it.
    #[error("{0}")]
    Verdict(FsError),
    /// There was no decision in time; with the reason.
    #[error("{0}")]
    Unavailable(String),
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> ApiError {
        match error {
            CallError::Verdict(verdict) => verdict.into(),
            CallError::Unavailable(reason) => ApiError::unavailable(reason),
        }
    }
}

impl From<FsError> for ApiError {
    fn from(error: FsError) -> ApiError {
        let (status, code) = match error {
            FsError::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            FsError::Exists => (StatusCode::CONFLICT, "exists"),
            FsError::NotDirectory => (StatusCode::CONFLICT, "not_a_directory"),
            FsError::IsDirectory => (StatusCode::CONFLICT, "is_a_directory"),
            FsError::NotEmpty => (StatusCode::CONFLICT, "directory_not_empty"),
            FsError::TooManyLinks => (StatusCode::CONFLICT, "too_many_links"),
            FsError::InvalidArgument | FsError::Range => (StatusCode::BAD_REQUEST, "invalid_argument"),
            FsError::NameTooLong => (StatusCode::BAD_REQUEST, "name_too_long"),
            FsError::NotPermitted | FsError::AccessDenied => (StatusCode::FORBIDDEN, "not_permitted"),
            FsError::ReadOnly => (StatusCode::FORBIDDEN, "read_only"),
            FsError::FileTooLarge | FsError::TooBig => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            FsError::NoSpace => {
                return ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", error.to_string())
                    .hint("delete files or give the nodes more disk; deleting works on a full cluster");
            }
            FsError::NotSupported => (StatusCode::NOT_IMPLEMENTED, "not_supported"),
            FsError::TimedOut => return ApiError::unavailable(error.to_string()),
            // The inode or chunk no longer exists although this node had it open: the session of the node was lost, or
            // the file changed during each attempt.
            FsError::Stale | FsError::ChunkDead => {
                return ApiError::unavailable("the file was changed or removed during the request");
            }
            FsError::NoAttribute | FsError::Io => (StatusCode::INTERNAL_SERVER_ERROR, "io_error"),
        };
        ApiError::new(status, code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_is_json_with_its_headers() {
        let response = ApiError::unavailable("no leader since 12 s").into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[RETRY_AFTER], "2");
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["code"], "unavailable");
        assert_eq!(body["message"], "no leader since 12 s");
        assert!(body["hint"].as_str().unwrap().contains("/status"));
    }

    #[test]
    fn verdicts_have_fitting_statuses() {
        for (verdict, status) in [
            (FsError::NotFound, 404),
            (FsError::NotEmpty, 409),
            (FsError::NameTooLong, 400),
            (FsError::NoSpace, 507),
            (FsError::TimedOut, 503),
            (FsError::FileTooLarge, 413),
        ] {
            assert_eq!(ApiError::from(verdict).status.as_u16(), status, "{verdict:?}");
        }
    }
}
