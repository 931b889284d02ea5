//! Silences that end a session, and silences that are only recorded.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn heard(silent_ms: u64, connection: Option<Connection>) -> Heard {
    let (nudges, _) = mpsc::channel(1);
    Heard {
        at: Instant::now() - ms(silent_ms),
        is_direct: connection.is_some(),
        connection,
        ended_at: None,
        nudges: nudges.downgrade(),
        asked: InodeNumber(0),
    }
}

fn noted(ms: u64) -> Noted {
    Noted {
        now_ms: ms,
        carried_ms: ms,
    }
}

#[test]
fn a_silence_goes_on_under_the_next_leader() {
    // The client is dead, and none of these leaders, each of which leads for 25 s, has heard from it.
    let (mut now_ms, mut past_ms) = (0, 0);
    let ended_after_ms = 'over: loop {
        let carried_ms = now_ms;
        for leading_ms in (0..25_000).step_by(500) {
            match judge(None, Noted { now_ms, carried_ms }, ms(leading_ms)) {
                Silence::Over(_) => break 'over past_ms + leading_ms,
                Silence::Note(silent_ms) => now_ms = silent_ms,
                Silence::Bearable => {}
            }
        }
        past_ms += 25_000;
        assert!(past_ms < 200_000, "it is never ended");
    };
    assert!((60_000..100_000).contains(&ended_after_ms), "{ended_after_ms}");
}

#[test]
fn nobody_is_ended_right_after_a_change_of_leader() {
    let leading = ms(NEW_LEADER_GRACE_MS - 500);
    assert!(!matches!(
        judge(None, noted(3_600_000), leading),
        Silence::Over(_)
    ));
    assert_eq!(judge(None, noted(0), ms(59_000)), Silence::Note(59_000));
    assert!(matches!(judge(None, noted(0), ms(61_000)), Silence::Over(_)));
}

#[test]
fn a_session_that_is_heard_again_is_silent_no_more() {
    let leading = ms(600_000);
    assert_eq!(
        judge(Some(&mut heard(100, None)), noted(0), leading),
        Silence::Bearable
    );
    assert_eq!(
        judge(Some(&mut heard(100, None)), noted(40_000), leading),
        Silence::Note(0)
    );
    let silent = judge(Some(&mut heard(12_000, None)), noted(0), leading);
    assert!(matches!(silent, Silence::Note(12_000..13_000)), "{silent:?}");
}

#[test]
fn a_process_that_is_gone_is_not_waited_for() {
    let leading = ms(600_000);
    let ended = Arc::new(AtomicBool::new(false));
    let mut session = heard(1_000, Some(Connection::for_tests(ended.clone())));
    assert_eq!(judge(Some(&mut session), noted(0), leading), Silence::Bearable);
    ended.store(true, Ordering::Relaxed);
    assert_eq!(
        judge(Some(&mut session), noted(0), leading),
        Silence::Bearable,
        "it may come back"
    );
    session.ended_at = Some(Instant::now() - ms(GONE_MS + 1_000));
    assert!(matches!(
        judge(Some(&mut session), noted(0), leading),
        Silence::Over(_)
    ));
    // Behind a proxy it is unknown which side closed the connection.
    session.is_direct = false;
    assert_eq!(judge(Some(&mut session), noted(0), leading), Silence::Bearable);
}
