//! Where the nodes of the cluster are reached.
//!
//! Invariants: holds what the user gave and what the nodes told last, at most [`ADDRESSES_MAX`]; one address for each
//! node; nothing that a node of another cluster says is believed.
//!
//! Pure: no sockets, no clock.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use quorumfs_proto::{ClusterId, Member, NodeId};
use quorumfs_wire::DiscoverResponse;

/// A cluster has at most seven voters and few learners; more addresses than this are not asked.
const ADDRESSES_MAX: usize = 64;

/// Where nodes are reached.
#[derive(Debug)]
pub(crate) struct AddressBook {
    configured: Vec<String>,
    cluster: Option<ClusterId>,
    members: Vec<Member>,
    /// An address at which a node has answered; it may differ from the one it is known by within the cluster.
    reached: HashMap<NodeId, String>,
}

impl AddressBook {
    /// What the user gave, in that order.
    pub(crate) fn new(addresses: Vec<String>) -> AddressBook {
        let mut configured: Vec<String> = Vec::with_capacity(addresses.len());
        for address in addresses {
            if !configured.contains(&address) {
                configured.push(address);
            }
        }
        AddressBook {
            configured,
            cluster: None,
            members: Vec::new(),
            reached: HashMap::new(),
        }
    }

    /// Which cluster answers; `None` before any of its nodes has.
    pub(crate) fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// Every address worth asking, each once, the user's first.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let mut addresses = self.configured.clone();
        for member in &self.members {
            let address = self.address_of(member);
            if !address.is_empty() && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses.truncate(ADDRESSES_MAX);
        addresses
    }

    /// Where `member` is reached: where it was, or else where the cluster says.
    pub(crate) fn address_of(&self, member: &Member) -> String {
        let known = self.reached.get(&member.id);
        known.unwrap_or(&member.addresses.grpc).clone()
    }

    pub(crate) fn member_at(&self, address: &str) -> Option<&Member> {
        let named = self
            .members
            .iter()
            .find(|member| member.addresses.grpc == address);
        named.or_else(|| {
            let mut reached = self.members.iter();
            reached.find(|member| self.reached.get(&member.id).is_some_and(|at| at == address))
        })
    }

    pub(crate) fn nodes(&self) -> usize {
        match self.members.len() {
            0 => self.configured.len(),
            known => known,
        }
    }

    /// Nothing answers at `address`: the cluster may know a better one.
    pub(crate) fn lost(&mut self, address: &str) {
        self.reached.retain(|_, at| at != address);
    }

    /// Takes note of what a node said; who it is and whom it follows.
    pub(crate) fn learn(
        &mut self,
        address: &str,
        answer: DiscoverResponse,
    ) -> Result<(NodeId, Option<Member>), String> {
        if answer.cluster_id.is_empty() {
            return Err(String::from("answers, but its cluster has not been made yet"));
        }
        let cluster = ClusterId::from_bytes(&answer.cluster_id)
            .ok_or_else(|| String::from("answers with a malformed cluster id"))?;
        let node = answer
            .node
            .ok_or_else(|| String::from("does not say who it is"))?;
        let node = Member::try_from(node).map_err(|error| error.to_string())?;
        let leader = answer
            .leader
            .map(Member::try_from)
            .transpose()
            .map_err(|error| error.to_string())?;
        let members: Vec<Member> = answer
            .members
            .into_iter()
            .filter_map(|member| Member::try_from(member).ok())
            .take(ADDRESSES_MAX)
            .collect();

        match self.cluster {
            None => self.cluster = Some(cluster),
            Some(ours) if ours != cluster => {
                return Err(format!("belongs to another cluster ({cluster}, not {ours})"));
            }
            Some(_) => {}
        }
        // An old address may by now belong to another node.
        self.reached.retain(|id, at| at != address || *id == node.id);
        // One address for each node, the user's before others, so that nobody moves between two names of one node.
        let better = self.configured.iter().any(|configured| configured == address);
        match self.reached.entry(node.id) {
            Entry::Occupied(mut known) if better => drop(known.insert(address.to_string())),
            Entry::Occupied(_) => {}
            Entry::Vacant(unknown) => drop(unknown.insert(address.to_string())),
        }
        if !members.is_empty() {
            self.reached
                .retain(|id, _| *id == node.id || members.iter().any(|member| member.id == *id));
            self.members = members;
        }
        Ok((node.id, leader))
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

    fn answer(cluster: u8, node: u16, members: &[u16]) -> DiscoverResponse {
        DiscoverResponse {
            cluster_id: vec![cluster; 16].into(),
            node: Some(member(node).into()),
            leader: Some(member(1).into()),
            members: members.iter().map(|slot| member(*slot).into()).collect(),
        }
    }

    #[test]
    fn members_are_learned_and_each_has_one_address() {
        let given = ["alias:3030", "alias:3030", "node2:3030"];
        let mut book = AddressBook::new(given.map(String::from).to_vec());
        assert_eq!(book.addresses(), ["alias:3030", "node2:3030"]);
        assert_eq!(book.nodes(), 2);
        let (node, leader) = book.learn("alias:3030", answer(1, 1, &[1, 2, 3])).unwrap();
        assert_eq!((node, leader), (member(1).id, Some(member(1))));
        // Node 1 is the alias.
        assert_eq!(book.addresses(), ["alias:3030", "node2:3030", "node3:3030"]);
        assert_eq!(book.nodes(), 3);
        assert_eq!(book.address_of(&member(1)), "alias:3030");
        assert_eq!(book.member_at("node1:3030"), Some(&member(1)));
        // Another name of a node that the user named is not preferred.
        book.learn("node1:3030", answer(1, 1, &[1, 2, 3])).unwrap();
        assert_eq!(book.address_of(&member(1)), "alias:3030");
        // The alias is gone; the cluster's own name remains.
        book.lost("alias:3030");
        assert_eq!(book.address_of(&member(1)), "node1:3030");
        // Node 3 has left the cluster.
        book.learn("node2:3030", answer(1, 2, &[1, 2])).unwrap();
        assert!(!book.addresses().contains(&String::from("node3:3030")));
    }

    #[test]
    fn an_address_that_changes_hands_names_the_new_node() {
        let mut book = AddressBook::new(vec![String::from("a:1")]);
        book.learn("a:1", answer(1, 1, &[1, 2])).unwrap();
        book.learn("a:1", answer(1, 2, &[1, 2])).unwrap();
        assert_eq!(book.address_of(&member(2)), "a:1");
        assert_eq!(book.address_of(&member(1)), "node1:3030");
    }

    #[test]
    fn another_cluster_and_no_cluster_are_not_believed() {
        let mut book = AddressBook::new(vec![String::from("a:1")]);
        let unmade = DiscoverResponse {
            cluster_id: Default::default(),
            ..answer(1, 1, &[1])
        };
        assert!(book.learn("a:1", unmade).is_err());
        assert_eq!(book.cluster(), None);
        book.learn("a:1", answer(1, 1, &[1])).unwrap();
        let error = book.learn("b:1", answer(2, 2, &[2])).unwrap_err();
        assert!(error.contains("another cluster"), "{error}");
        assert_eq!(book.addresses(), ["a:1"]);
        assert_eq!(book.cluster(), Some(ClusterId([1; 16])));
    }
}
