//! Determines the leader from the answers of the nodes.
//!
//! A node may be wrong about the leader (it has not noticed that the leader failed, or it is partitioned and still
//! believes that it leads), so answers are votes, counted by node and not by address. A wrong result only costs time:
//! a node that does not lead refuses calls and is reported.
//!
//! Pure: no sockets, no clock.

use std::collections::BTreeMap;

use quorumfs_proto::{Member, NodeId};

/// The purpose of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// There is no leader, its connection broke, or it answered that it does not lead.
    AnyLeader,
    /// The leader does not answer: only another node with at least the same number of votes replaces it.
    OtherLeader,
}

/// The suspected leader, as far as it is known.
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

/// The answer of one node.
#[derive(Clone, Debug)]
struct Vote {
    leader: Option<Member>,
}

/// The answers of one round of a search.
#[derive(Debug)]
pub(crate) struct Answers {
    search: Search,
    suspect: Suspect,
    /// Known number of nodes of the cluster.
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

    /// Adds the answer of `node`, which names `leader`.
    pub(crate) fn add(&mut self, node: NodeId, leader: Option<Member>) {
        self.votes.insert(node, Vote { leader });
    }

    /// Returns the leader if the missing answers are unlikely to change the result.
    pub(crate) fn early_leader(&self) -> Option<Member> {
        let (leader, votes) = self.most_named()?;
        let majority = votes > self.nodes / 2;
        let claims_leadership = self.claims_leadership(&leader);
        let decided = match (self.search, self.suspect.is(&leader)) {
            (Search::AnyLeader, false) => majority || claims_leadership,
            (Search::AnyLeader, true) => majority && claims_leadership,
            (Search::OtherLeader, false) => majority,
            (Search::OtherLeader, true) => false,
        };
        decided.then_some(leader)
    }

    /// Whether a majority of the nodes has answered.
    pub(crate) fn has_majority(&self) -> bool {
        self.votes.len() > self.nodes / 2
    }

    /// Returns the leader after the last answer.
    pub(crate) fn final_leader(&self) -> Option<Member> {
        let (leader, votes) = self.most_named()?;
        match self.search {
            // A node that does not answer now will not answer calls either.
            Search::AnyLeader => {
                (!self.suspect.is(&leader) || self.claims_leadership(&leader)).then_some(leader)
            }
            Search::OtherLeader => {
                (!self.suspect.is(&leader) && votes >= self.votes_for_suspect()).then_some(leader)
            }
        }
    }

    /// Returns the node with the most votes; on a tie, one that is not suspected, then one that names itself. In a
    /// search for any leader, a suspected node that does not name itself comes last, because followers name a failed
    /// leader until they elect another.
    fn most_named(&self) -> Option<(Member, usize)> {
        let mut counts: BTreeMap<NodeId, (Member, usize)> = BTreeMap::new();
        for leader in self.votes.values().filter_map(|vote| vote.leader.as_ref()) {
            counts.entry(leader.id).or_insert_with(|| (leader.clone(), 0)).1 += 1;
        }
        counts.into_values().max_by_key(|(leader, votes)| {
            let in_question = self.suspect.is(leader);
            let claims = self.claims_leadership(leader);
            let only_named_by_others = self.search == Search::AnyLeader && in_question && !claims;
            (!only_named_by_others, *votes, !in_question, claims)
        })
    }

    fn claims_leadership(&self, leader: &Member) -> bool {
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

    fn answers(search: Search, suspect: u16, votes: &[(u16, u16)]) -> Answers {
        let suspect = Suspect {
            id: (suspect > 0).then(|| member(suspect).id),
            address: None,
        };
        let mut answers = Answers::new(search, suspect, 3);
        for (node, leader) in votes {
            answers.add(member(*node).id, (*leader > 0).then(|| member(*leader)));
        }
        answers
    }

    fn early(search: Search, suspect: u16, votes: &[(u16, u16)]) -> Option<u16> {
        answers(search, suspect, votes)
            .early_leader()
            .map(|leader| leader.id.slot)
    }

    fn last(search: Search, suspect: u16, votes: &[(u16, u16)]) -> Option<u16> {
        answers(search, suspect, votes)
            .final_leader()
            .map(|leader| leader.id.slot)
    }

    #[test]
    fn a_node_that_names_itself_or_a_majority_decides_at_the_start() {
        assert_eq!(early(Search::AnyLeader, 0, &[]), None);
        assert_eq!(early(Search::AnyLeader, 0, &[(1, 0)]), None);
        assert_eq!(early(Search::AnyLeader, 0, &[(2, 1)]), None);
        assert_eq!(early(Search::AnyLeader, 0, &[(1, 1)]), Some(1));
        assert_eq!(early(Search::AnyLeader, 0, &[(2, 1), (3, 1)]), Some(1));
        assert_eq!(last(Search::AnyLeader, 0, &[(2, 1), (3, 0)]), Some(1));
    }

    #[test]
    fn followers_that_still_name_the_dead_leader_do_not_decide_early() {
        assert_eq!(early(Search::AnyLeader, 1, &[(2, 1), (3, 1)]), None);
        assert_eq!(early(Search::AnyLeader, 1, &[(2, 1), (3, 3)]), Some(3));
        assert_eq!(early(Search::AnyLeader, 1, &[(2, 1), (4, 1), (3, 3)]), Some(3));
        assert_eq!(last(Search::AnyLeader, 1, &[(2, 1), (3, 1)]), None);
        // The suspected leader answers and a majority names it: it still leads.
        assert_eq!(early(Search::AnyLeader, 1, &[(1, 1), (2, 1)]), Some(1));
    }

    #[test]
    fn a_silent_leader_is_replaced_only_by_one_with_as_many_votes() {
        assert_eq!(early(Search::OtherLeader, 1, &[(2, 2)]), None);
        assert_eq!(early(Search::OtherLeader, 1, &[(2, 2), (3, 2)]), Some(2));
        assert_eq!(early(Search::OtherLeader, 1, &[(1, 1), (2, 1), (3, 1)]), None);
        assert_eq!(last(Search::OtherLeader, 1, &[(1, 1), (2, 1), (3, 3)]), None);
        assert_eq!(last(Search::OtherLeader, 1, &[(2, 1), (3, 3)]), Some(3));
        assert_eq!(last(Search::OtherLeader, 1, &[(2, 0), (3, 0)]), None);
    }

    #[test]
    fn a_suspect_known_by_address_only_is_recognised() {
        let suspect = Suspect {
            id: None,
            address: Some(member(1).addresses.grpc),
        };
        let mut answers = Answers::new(Search::OtherLeader, suspect, 3);
        answers.add(member(2).id, Some(member(1)));
        answers.add(member(3).id, Some(member(1)));
        assert_eq!(answers.final_leader(), None);
    }
}
