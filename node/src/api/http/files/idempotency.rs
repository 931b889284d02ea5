//! `Idempotency-Key`: an upload that is sent again with the same key is answered as the first one was.
//!
//! The memory is this node's alone and is lost with the process; it spares a client that repeats a request after a
//! lost answer a second upload, it does not replace `If-None-Match: *`. Only successes are remembered.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use axum::http::StatusCode;
use parking_lot::Mutex;

use super::error::ApiError;

/// Most bytes of a key: a UUID has 36, a SHA-256 in hexadecimal 64.
pub(super) const KEY_BYTES_MAX: usize = 255;

/// Most answers remembered; the oldest goes first. With paths of usual length a few MiB.
const ANSWERS_MAX: usize = 10_000;

/// What an upload was about; a key names one upload, so a second one under it must be about the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    /// Decoded.
    pub(super) path: Vec<u8>,
    /// As `Content-Length` says it; `None` for a body of unknown length.
    pub(super) size_bytes: Option<u64>,
}

/// The memory.
#[derive(Debug)]
pub(super) struct Idempotency<Answer>(Mutex<Memory<Answer>>);

#[derive(Debug)]
struct Memory<Answer> {
    known: HashMap<String, (Subject, Option<Answer>)>,
    /// Keys with an answer, oldest first.
    answered: VecDeque<String>,
    answers_max: usize,
}

/// What is known of a key.
pub(super) enum Lookup<Answer> {
    /// Nothing: do it, and say how it went.
    Fresh(UnderWay<Answer>),
    /// The first answer.
    Known(Answer),
}

impl<Answer: Clone> Idempotency<Answer> {
    pub(super) fn new() -> Idempotency<Answer> {
        Idempotency::with_capacity(ANSWERS_MAX)
    }

    fn with_capacity(answers_max: usize) -> Idempotency<Answer> {
        Idempotency(Mutex::new(Memory {
            known: HashMap::new(),
            answered: VecDeque::new(),
            answers_max,
        }))
    }

    /// Looks `key` up and, where it is new, takes it until the returned guard is dropped or has an answer.
    pub(super) fn begin(
        self: &Arc<Idempotency<Answer>>,
        key: &str,
        subject: Subject,
    ) -> Result<Lookup<Answer>, ApiError> {
        let mut memory = self.0.lock();
        match memory.known.get(key) {
            None => {
                memory.known.insert(key.to_string(), (subject, None));
                Ok(Lookup::Fresh(UnderWay {
                    memory: Arc::clone(self),
                    key: key.to_string(),
                }))
            }
            Some((first, _)) if *first != subject => Err(ApiError::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_key_reused",
                "this Idempotency-Key belongs to an upload of another path or size",
            )
            .hint("use a new key for each upload, and the same key only to repeat one")),
            Some((_, None)) => Err(ApiError::conflict(
                "upload_under_way",
                "an upload with this Idempotency-Key is under way",
            )
            .hint("repeat the request when the first one has ended")),
            Some((_, Some(answer))) => Ok(Lookup::Known(answer.clone())),
        }
    }
}

/// The first upload of a key. Dropped without an answer (it failed): the key is free again.
#[derive(Debug)]
pub(super) struct UnderWay<Answer> {
    memory: Arc<Idempotency<Answer>>,
    key: String,
}

impl<Answer> UnderWay<Answer> {
    /// It succeeded so.
    pub(super) fn answered(self, answer: Answer) {
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

impl<Answer> Drop for UnderWay<Answer> {
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

    fn fresh(memory: &Arc<Idempotency<u32>>, key: &str) -> UnderWay<u32> {
        match memory.begin(key, subject(1)) {
            Ok(Lookup::Fresh(under_way)) => under_way,
            _ => panic!("{key} is not fresh"),
        }
    }

    fn refusal(memory: &Arc<Idempotency<u32>>, key: &str, size_bytes: u64) -> u16 {
        match memory.begin(key, subject(size_bytes)) {
            Err(error) => error.status.as_u16(),
            Ok(_) => panic!("{key} was not refused"),
        }
    }

    #[test]
    fn the_first_answer_is_the_answer() {
        let memory = Arc::new(Idempotency::with_capacity(10));
        let first = fresh(&memory, "k");
        assert_eq!(refusal(&memory, "k", 1), 409, "under way");
        first.answered(42);
        assert!(matches!(memory.begin("k", subject(1)), Ok(Lookup::Known(42))));
        assert_eq!(refusal(&memory, "k", 2), 422, "another size");
    }

    #[test]
    fn a_failure_frees_the_key() {
        let memory = Arc::new(Idempotency::with_capacity(10));
        drop(fresh(&memory, "k"));
        fresh(&memory, "k");
    }

    #[test]
    fn the_oldest_answer_is_forgotten_first() {
        let memory = Arc::new(Idempotency::with_capacity(2));
        for (answer, key) in ["a", "b", "c"].into_iter().enumerate() {
            fresh(&memory, key).answered(answer as u32);
        }
        assert!(matches!(memory.begin("b", subject(1)), Ok(Lookup::Known(1))));
        assert!(matches!(memory.begin("c", subject(1)), Ok(Lookup::Known(2))));
        fresh(&memory, "a");
    }
}
