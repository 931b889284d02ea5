//! Calls over bidirectional streams: one multiplexer for the side that asks, and its one peer for the side that
//! answers.
//!
//! - [`Multiplexer`]: numbers calls, sends them over a stream and hands out their answers.
//! - [`NodeCalls`]: the calls to one node, over one stream after another.
//! - [`answer_calls`]: answers a stream of calls.
//!
//! The messages of openraft do not go through it: they are answered in order, and openraft itself matches them.
//!
//! This module knows nothing of what is asked, of who leads, or of how connections are made.

mod multiplexer;
mod node_calls;
mod server;

pub use multiplexer::{Limits, Lost, Multiplexer, OnSend, Resend, Waiting, describe, next_answer};
pub use node_calls::{NodeCalls, NodeLimits};
pub use server::{Admission, AnswerStream, answer_calls};

use crate::messages::{
    CallRequest, CallResponse, GetChunkRequest, GetChunkResponse, PutChunkRequest, PutChunkResponse,
};

/// A message that carries the number of its call.
pub trait Numbered {
    /// The number; 0: none yet.
    fn call_id(&self) -> u64;
    /// Replaces the number.
    fn set_call_id(&mut self, call_id: u64);
}

macro_rules! numbered {
    ($($message:ty),*) => {
        $(impl Numbered for $message {
            fn call_id(&self) -> u64 {
                self.call_id
            }

            fn set_call_id(&mut self, call_id: u64) {
                self.call_id = call_id;
            }
        })*
    };
}

numbered!(
    CallRequest,
    CallResponse,
    GetChunkRequest,
    GetChunkResponse,
    PutChunkRequest,
    PutChunkResponse
);
