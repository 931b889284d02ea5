//! Silences that end a session, and silences that are only recorded.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn contact(silent_ms: u64, connection: Option<Connection>) -> Contact {
    let (nudges, _) = mpsc::channel(1);
    Contact {
        at: Instant::now() - ms(silent_ms),
        is_direct: connection.is_some(),
        connection,
        ended_at: None,
        nudges: nudges.downgrade(),
        asked: InodeNumber(0),
    }
}

fn noted(ms: u64) -> RecordedSilence {
    RecordedSilence {
        now_ms: ms,
        carried_ms: ms,
    }
}

#[test]
fn a_silence_continues_under_the_next_leader() {
    // The client is dead, and none of these leaders, each of which leads for 25 s, has heard from it.
    let (mut now_ms, mut past_ms) = (0, 0);
    let ended_after_ms = 'over: loop {
        let carried_ms = now_ms;
        for leading_ms in (0..25_000).step_by(500) {
            match silence_action(None, RecordedSilence { now_ms, carried_ms }, ms(leading_ms)) {
                SilenceAction::End(_) => break 'over past_ms + leading_ms,
                SilenceAction::Record(silent_ms) => now_ms = silent_ms,
                SilenceAction::Ignore => {}
            }
        }
        past_ms += 25_000;
        assert!(past_ms < 200_000, "it is never ended");
    };
    assert!((60_000..100_000).contains(&ended_after_ms), "{ended_after_ms}");
}

#[test]
fn no_session_is_ended_right_after_a_change_of_leader() {
    let leading = ms(NEW_LEADER_GRACE_MS - 500);
    assert!(!matches!(
        silence_action(None, noted(3_600_000), leading),
        SilenceAction::End(_)
    ));
    assert_eq!(
        silence_action(None, noted(0), ms(59_000)),
        SilenceAction::Record(59_000)
    );
    assert!(matches!(
        silence_action(None, noted(0), ms(61_000)),
        SilenceAction::End(_)
    ));
}

#[test]
fn a_session_that_calls_again_is_no_longer_silent() {
    let leading = ms(600_000);
    assert_eq!(
        silence_action(Some(&mut contact(100, None)), noted(0), leading),
        SilenceAction::Ignore
    );
    assert_eq!(
        silence_action(Some(&mut contact(100, None)), noted(40_000), leading),
        SilenceAction::Record(0)
    );
    let silent = silence_action(Some(&mut contact(12_000, None)), noted(0), leading);
    assert!(
        matches!(silent, SilenceAction::Record(12_000..13_000)),
        "{silent:?}"
    );
}

#[test]
fn a_session_of_an_ended_process_is_ended_early() {
    let leading = ms(600_000);
    let ended = Arc::new(AtomicBool::new(false));
    let mut session = contact(1_000, Some(Connection::for_tests(ended.clone())));
    assert_eq!(
        silence_action(Some(&mut session), noted(0), leading),
        SilenceAction::Ignore
    );
    ended.store(true, Ordering::Relaxed);
    assert_eq!(
        silence_action(Some(&mut session), noted(0), leading),
        SilenceAction::Ignore,
        "it may come back"
    );
    session.ended_at = Some(Instant::now() - ms(RECONNECT_MS_MAX + 1_000));
    assert!(matches!(
        silence_action(Some(&mut session), noted(0), leading),
        SilenceAction::End(_)
    ));
    // Behind a proxy it is unknown which side closed the connection.
    session.is_direct = false;
    assert_eq!(
        silence_action(Some(&mut session), noted(0), leading),
        SilenceAction::Ignore
    );
}
