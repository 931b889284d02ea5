//! What the lanes of an ended session report about its mutations.

use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::*;
use super::support::*;

#[test]
fn what_an_ended_session_did_not_decide_it_never_will_as_long_as_it_is_remembered() {
    let mut node = Node::with_sessions(1);
    let session = SessionId(1);
    let make = |node: &mut Node, name: &str| {
        let create = create(InodeNumber::ROOT, name, NewKind::File);
        node.mutation(session, Command::single(create))
    };
    let decided = make(&mut node, "decided");
    let outcome = node.apply(LogBody::Call(decided.clone())).result;
    let undecided = make(&mut node, "undecided");
    let later = make(&mut node, "later");
    node.apply(LogBody::EndSession { session });
    let mut told = |mutation: &call::Mutation| node.apply(LogBody::Call(mutation.clone())).result;
    for _ in 0..2 {
        assert_eq!(told(&undecided), ApplyResult::NeverDecided, "the lane shows it");
        assert_eq!(told(&decided), outcome);
        assert_eq!(
            told(&later),
            ApplyResult::UnknownSession,
            "the lane does not get there"
        );
    }
    node.apply(LogBody::ForgetSession { session });
    for mutation in [decided, undecided] {
        let told = node.apply(LogBody::Call(mutation)).result;
        assert_eq!(told, ApplyResult::UnknownSession, "nobody remembers its lanes");
    }
}
