//! The addresses of the nodes of the cluster.
//!
//! Invariants: contains the configured addresses and the latest members that a node reported, at most
//! [`ADDRESSES_MAX`]; one address for each node; answers of nodes of another cluster are ignored.
//!
//! Pure: no sockets, no clock.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use quorumfs_proto::{ClusterId, Member, NodeId};
use quorumfs_wire::DiscoverResponse;

/// Most addresses that are used. A cluster has at most seven voters and few learners.
const ADDRESSES_MAX: usize = 64;

/// The addresses at which nodes are reached.
#[derive(Debug)]
pub(crate) struct NodeAddresses {
    configured: Vec<String>,
    cluster: Option<ClusterId>,
    members: Vec<Member>,
    /// The address at which a node last answered; it may differ from the address of the node in the cluster.
    reached: HashMap<NodeId, String>,
}

impl NodeAddresses {
    /// Creates the list from the configured addresses, in this order, without duplicates.
    pub(crate) fn new(addresses: Vec<String>) -> NodeAddresses {
        let mut configured: Vec<String> = Vec::with_capacity(addresses.len());
        for address in addresses {
            if !configured.contains(&address) {
                configured.push(address);
            }
        }
        NodeAddresses {
            configured,
            cluster: None,
            members: Vec::new(),
            reached: HashMap::new(),
        }
    }

    /// Returns the id of the cluster; `None` before one of its nodes has answered.
    pub(crate) fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// Returns all known addresses without duplicates, the configured ones first.
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

    /// Returns the address at which `member` last answered, or its address in the cluster.
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

    pub(crate) fn count(&self) -> usize {
        match self.members.len() {
            0 => self.configured.len(),
            known => known,
        }
    }

    /// Forgets that a node answered at `address`, because nothing answers there now.
    pub(crate) fn mark_unreachable(&mut self, address: &str) {
        self.reached.retain(|_, at| at != address);
    }

    /// Updates the addresses from the answer of the node at `address`. Returns the node and the leader that it
    /// reports.
    ///
    /// # Errors
    /// Why the answer is not used.
    pub(crate) fn learn(
        &mut self,
        address: &str,
        answer: DiscoverResponse,
    ) -> Result<(NodeId, Option<Member>), String> {
        if answer.cluster_id.is_empty() {
            return Err(String::from("the node belongs to no cluster yet"));
        }
        let cluster = ClusterId::from_bytes(&answer.cluster_id)
            .ok_or_else(|| String::from("the node answered with a malformed cluster id"))?;
        let node = answer
            .node
            .ok_or_else(|| String::from("the node answered without its identity"))?;
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
                return Err(format!(
                    "the node belongs to another cluster ({cluster}, not {ours})"
                ));
            }
            Some(_) => {}
        }
        // The address may have belonged to another node before.
        self.reached.retain(|id, at| at != address || *id == node.id);
        // One address for each node, a configured one if possible, so that the client does not switch between two
        // addresses of a node.
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
        let mut nodes = NodeAddresses::new(given.map(String::from).to_vec());
        assert_eq!(nodes.addresses(), ["alias:3030", "node2:3030"]);
        assert_eq!(nodes.count(), 2);
        let (node, leader) = nodes.learn("alias:3030", answer(1, 1, &[1, 2, 3])).unwrap();
        assert_eq!((node, leader), (member(1).id, Some(member(1))));
        // The alias is an address of node 1.
        assert_eq!(nodes.addresses(), ["alias:3030", "node2:3030", "node3:3030"]);
        assert_eq!(nodes.count(), 3);
        assert_eq!(nodes.address_of(&member(1)), "alias:3030");
        assert_eq!(nodes.member_at("node1:3030"), Some(&member(1)));
        // An address from the cluster does not replace a configured one.
        nodes.learn("node1:3030", answer(1, 1, &[1, 2, 3])).unwrap();
        assert_eq!(nodes.address_of(&member(1)), "alias:3030");
        // After the alias fails, the address from the cluster is used.
        nodes.mark_unreachable("alias:3030");
        assert_eq!(nodes.address_of(&member(1)), "node1:3030");
        // Node 3 has left the cluster.
        nodes.learn("node2:3030", answer(1, 2, &[1, 2])).unwrap();
        assert!(!nodes.addresses().contains(&String::from("node3:3030")));
    }

    #[test]
    fn an_address_that_was_reassigned_names_the_new_node() {
        let mut nodes = NodeAddresses::new(vec![String::from("a:1")]);
        nodes.learn("a:1", answer(1, 1, &[1, 2])).unwrap();
        nodes.learn("a:1", answer(1, 2, &[1, 2])).unwrap();
        assert_eq!(nodes.address_of(&member(2)), "a:1");
        assert_eq!(nodes.address_of(&member(1)), "node1:3030");
    }

    #[test]
    fn answers_of_another_or_no_cluster_are_refused() {
        let mut nodes = NodeAddresses::new(vec![String::from("a:1")]);
        let unmade = DiscoverResponse {
            cluster_id: Default::default(),
            ..answer(1, 1, &[1])
        };
        assert!(nodes.learn("a:1", unmade).is_err());
        assert_eq!(nodes.cluster(), None);
        nodes.learn("a:1", answer(1, 1, &[1])).unwrap();
        let error = nodes.learn("b:1", answer(2, 2, &[2])).unwrap_err();
        assert!(error.contains("another cluster"), "{error}");
        assert_eq!(nodes.addresses(), ["a:1"]);
        assert_eq!(nodes.cluster(), Some(ClusterId([1; 16])));
    }
}
