//! Who leads, from what the nodes say: the judgement alone.
//!
//! A node may be wrong about the leader (it has not noticed the last one's death; it has been cut off and still
//! believes in itself), so answers are votes, counted by node and not by address. Nothing rests on the judgement
//! but speed: a node that does not lead refuses calls and is complained about.
//!
//! Pure: no sockets, no clock.

use std::collections::BTreeMap;

use quorumfs_proto::{Member, NodeId};

/// Why a leader is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// There is none, or its connection broke, or it said it does not lead.
    Anyone,
    /// The one there is says nothing; only another one, believed in by as many, is of interest.
    Another,
}

/// The leader that is in question, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Suspect {
    pub(crate) id: Option<NodeId>,
    pub(crate) address: Option<String>,
}

impl Suspect {
    fn is(&self, member: &Member) -> bool {
        self.id == Some(member.id) || self.address.as_deref() == Some(member.addresses.grpc.as_str())
    }
}

/// One node's answer.
#[derive(Clone, Debug)]
struct Vote {
    leader: Option<Member>,
}

/// The answers of one round of asking.
#[derive(Debug)]
pub(crate) struct Answers {
    search: Search,
    suspect: Suspect,
    /// How many nodes the cluster is known to have.
    nodes: usize,
    votes: BTreeMap<NodeId, Vote>,
}

impl Answers {
    pub(crate) fn new(search: Search, suspect: Suspect, nodes: usize) -> Answers {
        Answers {
            search,
            suspect,
            nodes,
            votes: BTreeMap::new(),
        }
    }

    /// `node` believes in `leader`.
    pub(crate) fn add(&mut self, node: NodeId, leader: Option<Member>) {
        self.votes.insert(node, Vote { leader });
    }

    /// The leader, if no answer that is still out could change it much.
    pub(crate) fn early(&self) -> Option<Member> {
        let (leader, votes) = self.favourite()?;
        let majority = votes > self.nodes / 2;
        let believes_in_itself = self.believes_in_itself(&leader);
        let decided = match (self.search, self.suspect.is(&leader)) {
            (Search::Anyone, false) => majority || believes_in_itself,
            (Search::Anyone, true) => majority && believes_in_itself,
            (Search::Another, false) => majority,
            (Search::Another, true) => false,
        };
        decided.then_some(leader)
    }

    /// Whether enough nodes have answered that the rest is not worth a long wait.
    pub(crate) fn has_majority(&self) -> bool {
        self.votes.len() > self.nodes / 2
    }

    /// The leader, when no more answers come.
    pub(crate) fn last(&self) -> Option<Member> {
        let (leader, votes) = self.favourite()?;
        match self.search {
            // What does not answer now will not answer calls either.
            Search::Anyone => {
                (!self.suspect.is(&leader) || self.believes_in_itself(&leader)).then_some(leader)
            }
            Search::Another => {
                (!self.suspect.is(&leader) && votes >= self.votes_for_suspect()).then_some(leader)
            }
        }
    }

    /// Most votes; among equals one that is not in question, then one that believes in itself. Where anyone will do,
    /// one in question that does not even say so itself comes last: followers name the dead until they elect.
    fn favourite(&self) -> Option<(Member, usize)> {
        let mut counts: BTreeMap<NodeId, (Member, usize)> = BTreeMap::new();
        for leader in self.votes.values().filter_map(|vote| vote.leader.as_ref()) {
            counts.entry(leader.id).or_insert_with(|| (leader.clone(), 0)).1 += 1;
        }
        counts.into_values().max_by_key(|(leader, votes)| {
            let in_question = self.suspect.is(leader);
            let believes = self.believes_in_itself(leader);
            let hearsay = self.search == Search::Anyone && in_question && !believes;
            (!hearsay, *votes, !in_question, believes)
        })
    }

    fn believes_in_itself(&self, leader: &Member) -> bool {
        let own = self.votes.get(&leader.id).and_then(|vote| vote.leader.as_ref());
        own.is_some_and(|own| own.id == leader.id)
    }

    fn votes_for_suspect(&self) -> usize {
        let named = self.votes.values().filter_map(|vote| vote.leader.as_ref());
        named.filter(|leader| self.suspect.is(leader)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_proto::Addresses;

    fn member(slot: u16) -> Member {
        Member {
            id: NodeId { slot, incarnation: 7 },
            addresses: Addresses {
                grpc: format!("node{slot}:3030"),
                http: String::new(),
            },
        }
    }

    fn tally(search: Search, suspect: u16, votes: &[(u16, u16)]) -> Answers {
        let suspect = Suspect {
            id: (suspect > 0).then(|| member(suspect).id),
            address: None,
        };
        let mut tally = Answers::new(search, suspect, 3);
        for (node, leader) in votes {
            tally.add(member(*node).id, (*leader > 0).then(|| member(*leader)));
        }
        tally
    }

    fn early(search: Search, suspect: u16, votes: &[(u16, u16)]) -> Option<u16> {
        tally(search, suspect, votes).early().map(|leader| leader.id.slot)
    }

    fn last(search: Search, suspect: u16, votes: &[(u16, u16)]) -> Option<u16> {
        tally(search, suspect, votes).last().map(|leader| leader.id.slot)
    }

    #[test]
    fn a_node_that_believes_in_itself_or_a_majority_is_enough_at_the_start() {
        assert_eq!(early(Search::Anyone, 0, &[]), None);
        assert_eq!(early(Search::Anyone, 0, &[(1, 0)]), None);
        assert_eq!(early(Search::Anyone, 0, &[(2, 1)]), None);
        assert_eq!(early(Search::Anyone, 0, &[(1, 1)]), Some(1));
        assert_eq!(early(Search::Anyone, 0, &[(2, 1), (3, 1)]), Some(1));
        assert_eq!(last(Search::Anyone, 0, &[(2, 1), (3, 0)]), Some(1));
    }

    #[test]
    fn followers_that_still_name_the_dead_leader_do_not_decide_early() {
        assert_eq!(early(Search::Anyone, 1, &[(2, 1), (3, 1)]), None);
        assert_eq!(early(Search::Anyone, 1, &[(2, 1), (3, 3)]), Some(3));
        assert_eq!(early(Search::Anyone, 1, &[(2, 1), (4, 1), (3, 3)]), Some(3));
        assert_eq!(last(Search::Anyone, 1, &[(2, 1), (3, 1)]), None);
        // It answers and the others agree: it leads as before.
        assert_eq!(early(Search::Anyone, 1, &[(1, 1), (2, 1)]), Some(1));
    }

    #[test]
    fn a_silent_leader_is_left_only_for_one_that_as_many_believe_in() {
        assert_eq!(early(Search::Another, 1, &[(2, 2)]), None);
        assert_eq!(early(Search::Another, 1, &[(2, 2), (3, 2)]), Some(2));
        assert_eq!(early(Search::Another, 1, &[(1, 1), (2, 1), (3, 1)]), None);
        assert_eq!(last(Search::Another, 1, &[(1, 1), (2, 1), (3, 3)]), None);
        assert_eq!(last(Search::Another, 1, &[(2, 1), (3, 3)]), Some(3));
        assert_eq!(last(Search::Another, 1, &[(2, 0), (3, 0)]), None);
    }

    #[test]
    fn a_suspect_known_by_address_only_is_recognised() {
        let suspect = Suspect {
            id: None,
            address: Some(member(1).addresses.grpc),
        };
        let mut tally = Answers::new(Search::Another, suspect, 3);
        tally.add(member(2).id, Some(member(1)));
        tally.add(member(3).id, Some(member(1)));
        assert_eq!(tally.last(), None);
    }
}
