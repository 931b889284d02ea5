//! `Idempotency-Key`: an upload that is repeated with the same key gets the response of the first one.
//!
//! The cache is local to this node and lost with the process. It saves a client a second upload after a lost response;
//! it does not replace `If-None-Match: *`. Only successful uploads are cached.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use axum::http::StatusCode;
use parking_lot::Mutex;

use super::error::ApiError;

/// Most bytes of a key: a UUID has 36, a SHA-256 in hexadecimal 64.
pub(super) const KEY_BYTES_MAX: usize = 255;

/// Most cached responses, a few MiB with usual paths; the oldest is dropped first.
const ANSWERS_MAX: usize = 10_000;

/// The path and size of an upload. A key identifies one upload, so a repetition must have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    /// The path, decoded.
    pub(super) path: Vec<u8>,
    /// The value of `Content-Length`; `None` for a body of unknown length.
    pub(super) size_bytes: Option<u64>,
}

/// The cached responses of a node.
#[derive(Debug)]
pub(super) struct IdempotencyCache<Answer>(Mutex<State<Answer>>);

#[derive(Debug)]
struct State<Answer> {
    known: HashMap<String, (Subject, Option<Answer>)>,
    /// Keys with a response, oldest first.
    answered: VecDeque<String>,
    answers_max: usize,
}

/// The state of a key.
pub(super) enum Lookup<Answer> {
    /// The key is new: the caller performs the upload and reports its result.
    New(PendingUpload<Answer>),
    /// The response to the first upload.
    Done(Answer),
}

impl<Answer: Clone> IdempotencyCache<Answer> {
    pub(super) fn new() -> IdempotencyCache<Answer> {
        IdempotencyCache::with_capacity(ANSWERS_MAX)
    }

    fn with_capacity(answers_max: usize) -> IdempotencyCache<Answer> {
        IdempotencyCache(Mutex::new(State {
            known: HashMap::new(),
            answered: VecDeque::new(),
            answers_max,
        }))
    }

    /// Looks up `key` and, if it is new, reserves it until the returned guard is completed or dropped.
    ///
    /// # Errors
    /// 422 if the key belongs to another path or size, 409 if the first upload is in progress.
    pub(super) fn begin(
        self: &Arc<IdempotencyCache<Answer>>,
        key: &str,
        subject: Subject,
    ) -> Result<Lookup<Answer>, ApiError> {
        let mut memory = self.0.lock();
        match memory.known.get(key) {
            None => {
                memory.known.insert(key.to_string(), (subject, None));
                Ok(Lookup::New(PendingUpload {
                    memory: Arc::clone(self),
                    key: key.to_string(),
                }))
            }
            Some((first, _)) if *first != subject => Err(ApiError::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_key_reused",
                "this Idempotency-Key was used for an upload with another path or size",
            )
            .hint("use a new key for each upload, and the same key only to repeat one")),
            Some((_, None)) => Err(ApiError::conflict(
                "upload_under_way",
                "an upload with this Idempotency-Key is in progress",
            )
            .hint("repeat the request when the first one has ended")),
            Some((_, Some(answer))) => Ok(Lookup::Done(answer.clone())),
        }
    }
}

/// The first upload of a key. Dropping it without a response, because the upload failed, frees the key.
#[derive(Debug)]
pub(super) struct PendingUpload<Answer> {
    memory: Arc<IdempotencyCache<Answer>>,
    key: String,
}

impl<Answer> PendingUpload<Answer> {
    /// Stores the response of a successful upload.
    pub(super) fn complete(self, answer: Answer) {
        let mut memory = self.memory.0.lock();
        if let Some((_, slot)) = memory.known.get_mut(&self.key) {
            *slot = Some(answer);
        }
        memory.answered.push_back(self.key.clone());
        while memory.answered.len() > memory.answers_max {
            if let Some(oldest) = memory.answered.pop_front() {
                memory.known.remove(&oldest);
            }
        }
    }
}

impl<Answer> Drop for PendingUpload<Answer> {
    fn drop(&mut self) {
        let mut memory = self.memory.0.lock();
        if matches!(memory.known.get(&self.key), Some((_, None))) {
            memory.known.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(size_bytes: u64) -> Subject {
        Subject {
            path: b"a".to_vec(),
            size_bytes: Some(size_bytes),
        }
    }

    fn fresh(memory: &Arc<IdempotencyCache<u32>>, key: &str) -> PendingUpload<u32> {
        match memory.begin(key, subject(1)) {
            Ok(Lookup::New(pending)) => pending,
            _ => panic!("{key} is not fresh"),
        }
    }

    fn refusal(memory: &Arc<IdempotencyCache<u32>>, key: &str, size_bytes: u64) -> u16 {
        match memory.begin(key, subject(size_bytes)) {
            Err(error) => error.status.as_u16(),
            Ok(_) => panic!("{key} was not refused"),
        }
    }

    #[test]
    fn the_first_answer_is_the_answer() {
        let memory = Arc::new(IdempotencyCache::with_capacity(10));
        let first = fresh(&memory, "k");
        assert_eq!(refusal(&memory, "k", 1), 409, "under way");
        first.complete(42);
        assert!(matches!(memory.begin("k", subject(1)), Ok(Lookup::Done(42))));
        assert_eq!(refusal(&memory, "k", 2), 422, "another size");
    }

    #[test]
    fn a_failure_frees_the_key() {
        let memory = Arc::new(IdempotencyCache::with_capacity(10));
        drop(fresh(&memory, "k"));
        fresh(&memory, "k");
    }

    #[test]
    fn the_oldest_answer_is_forgotten_first() {
        let memory = Arc::new(IdempotencyCache::with_capacity(2));
        for (answer, key) in ["a", "b", "c"].into_iter().enumerate() {
            fresh(&memory, key).complete(answer as u32);
        }
        assert!(matches!(memory.begin("b", subject(1)), Ok(Lookup::Done(1))));
        assert!(matches!(memory.begin("c", subject(1)), Ok(Lookup::Done(2))));
        fresh(&memory, "a");
    }
}
