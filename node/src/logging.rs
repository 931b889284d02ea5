//! Limits repeated messages in the node's log to one a minute.
//!
//! The consensus library logs a warning for every failed attempt: two lines a second while another node is away, more
//! while there is no leader. [`Limited`] passes each of its warnings once a minute, and for each place in its source a
//! few different ones. Errors always pass, and so do levels below warnings, if they are enabled. Other code that logs
//! why it waits uses [`RecentMessages`] itself.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::hash::{DefaultHasher, Hasher as _};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, callsite};
use tracing_subscriber::layer::{Context, Layer};

/// Time for which a repeated message is suppressed.
const SILENCE: Duration = Duration::from_secs(60);
/// Most different messages within that time.
const DIFFERENT_MAX: usize = 8;
/// The library whose warnings are limited.
const LIMITED_TARGET: &str = "openraft";

/// The messages of the last minute.
#[derive(Debug, Default)]
pub struct RecentMessages {
    since: Option<Instant>,
    said: Vec<u64>,
}

impl RecentMessages {
    /// Whether `text` should be logged: it was not in the last minute, and there were not too many others.
    pub fn is_new(&mut self, text: &str) -> bool {
        self.is_new_at(text, Instant::now())
    }

    fn is_new_at(&mut self, text: &str, now: Instant) -> bool {
        if self
            .since
            .is_none_or(|since| now.duration_since(since) >= SILENCE)
        {
            self.since = Some(now);
            self.said.clear();
        }
        let mut hasher = DefaultHasher::new();
        hasher.write(text.as_bytes());
        let hash = hasher.finish();
        let is_new = self.said.len() < DIFFERENT_MAX && !self.said.contains(&hash);
        if is_new {
            self.said.push(hash);
        }
        is_new
    }
}

/// A layer that suppresses repeated messages. It has one entry for each place in the library that logs a warning.
#[derive(Debug, Default)]
pub struct Limited(Mutex<HashMap<callsite::Identifier, RecentMessages>>);

impl Limited {
    fn concerns(metadata: &Metadata<'_>) -> bool {
        let crate_name = metadata.target().split("::").next();
        *metadata.level() == Level::WARN && crate_name == Some(LIMITED_TARGET)
    }
}

impl<S: Subscriber> Layer<S> for Limited {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if !Limited::concerns(metadata) {
            return true;
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        let mut recent = self.0.lock();
        recent.entry(metadata.callsite()).or_default().is_new(&text.0)
    }
}

/// The fields of an event, one after the other.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = write!(self.0, "{}={value:?} ", field.name());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn the_same_is_said_once_a_minute_and_not_too_much_else() {
        let mut recent = RecentMessages::default();
        let start = Instant::now();
        assert!(recent.is_new_at("node 2 does not answer", start));
        assert!(recent.is_new_at("node 3 does not answer", start));
        assert!(!recent.is_new_at("node 2 does not answer", start + SILENCE / 2));
        let others = (0..100).filter(|number| recent.is_new_at(&format!("{number}"), start));
        assert_eq!(others.count(), DIFFERENT_MAX - 2);
        assert!(recent.is_new_at("node 2 does not answer", start + SILENCE));
    }

    #[test]
    fn the_librarys_warnings_are_limited_and_nothing_else_is() {
        #[derive(Clone, Default)]
        struct Count(Arc<Mutex<Vec<String>>>);
        impl<S: Subscriber> Layer<S> for Count {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                self.0.lock().push(event.metadata().target().to_string());
            }
        }
        let count = Count::default();
        let subscriber = tracing_subscriber::registry()
            .with(Limited::default())
            .with(count.clone());
        tracing::subscriber::with_default(subscriber, || {
            for attempt in 0..100 {
                for peer in 2..4 {
                    tracing::warn!(target: "openraft::replication", "cannot reach node {peer}");
                }
                tracing::error!(target: "openraft::core", "broken");
                tracing::warn!(target: "quorumfs_node::consensus", attempt, "ours");
            }
        });
        let heard = count.0.lock();
        let of = |target: &str| heard.iter().filter(|said| *said == target).count();
        assert_eq!(of("openraft::replication"), 2, "once for each peer");
        assert_eq!((of("openraft::core"), of("quorumfs_node::consensus")), (100, 100));
    }
}
