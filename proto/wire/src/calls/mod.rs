//! Calls over bidirectional streams: the client side and the server side, shared by all protocols.
//!
//! - [`Multiplexer`]: numbers calls, sends them over a stream and delivers the answers.
//! - [`NodeCalls`]: the calls to one node, over consecutive streams.
//! - [`answer_calls`]: answers a stream of calls.
//!
//! The messages of openraft do not use it: they are answered in order, and openraft itself matches them.
//!
//! This module does not know the meaning of messages, the leader, or how connections are made.

mod multiplexer;
mod node_calls;
mod server;

pub use multiplexer::{CallError, Limits, Multiplexer, OnSend, PendingCall, Resend, describe, next_answer};
pub use node_calls::{NodeCalls, NodeLimits};
pub use server::{Admission, AnswerStream, answer_calls};

use crate::messages::{
    CallRequest, CallResponse, GetChunkRequest, GetChunkResponse, PutChunkRequest, PutChunkResponse,
};

/// A message that carries a call id.
pub trait Numbered {
    /// Returns the call id; 0 means none.
    fn call_id(&self) -> u64;
    /// Sets the call id.
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
