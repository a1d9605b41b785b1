use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{Endpoint, EndpointError};

/// What a process of the cluster tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The group that a worker is; a router's own name.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Where others reach it.
    pub address: Endpoint,
    /// The served name of a worker's model.
    #[serde(default)]
    pub model: String,
    /// Rises with every start of a worker's engine.
    #[serde(default)]
    pub epoch: u64,
    /// How far it has come.
    #[serde(default)]
    pub state: State,
    /// What a worker can do; known once its model is loaded.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// Hex; workers of equal ids give equal tokens. Known once the model is loaded.
    #[serde(default)]
    pub numerics_id: String,
}

impl Member {
    /// A worker of which nothing but its address is known.
    pub fn at(address: Endpoint) -> Self {
        Self::new(Role::Worker, address.to_string(), address)
    }

    /// This process, which listens at `listening`: others reach it there unless it advertises
    /// another address, and it is named by that unless it has a name.
    ///
    /// # Errors
    /// When it listens at port 0.
    pub fn own(
        role: Role,
        name: Option<&str>,
        advertise: Option<&Endpoint>,
        listening: SocketAddr,
    ) -> Result<Self, EndpointError> {
        let address = match advertise {
            Some(address) => address.clone(),
            None => listening.try_into()?,
        };
        let name = name.map_or_else(|| address.to_string(), str::to_owned);
        Ok(Self::new(role, name, address))
    }

    /// Whether a member can have this name: one or more ASCII letters, digits and `-_.:[]`.
    pub fn is_name(name: &str) -> bool {
        let fit = |c: char| c.is_ascii_alphanumeric() || "-_.:[]".contains(c);
        !name.is_empty() && name.chars().all(fit)
    }

    /// A process that has said nothing of its state yet.
    pub fn new(role: Role, name: String, address: Endpoint) -> Self {
        Self {
            name,
            role,
            address,
            model: String::new(),
            epoch: 0,
            state: State::Unknown,
            capabilities: Capabilities::default(),
            numerics_id: String::new(),
        }
    }
}

/// What a process does in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs a model.
    Worker,
    /// Runs a model that drafts for those of workers.
    Draft,
    /// Takes requests.
    Router,
}

/// How far a process has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// It has not said.
    #[default]
    Unknown,
    /// It takes no work yet.
    Starting,
    /// It takes work.
    Ready,
    /// It finishes what it has.
    Draining,
}

/// What a worker can do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Ranks that share the model.
    pub tensor_parallel: u32,
    /// What runs it.
    pub backend: String,
    /// Weight type.
    pub quantization: String,
    /// Longest prompt and output together, in tokens.
    pub context_length: u32,
    /// KV pages of the pool.
    pub pages: u32,
}

/// What operators want of a worker group, for as long as the intent stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "UPPERCASE", deny_unknown_fields)]
pub enum Intent {
    /// Take no new sequences.
    Drain {
        /// Unix milliseconds; unfinished sequences are given up then, and go on elsewhere.
        /// Without it, they all finish.
        #[serde(default)]
        deadline: Option<u64>,
    },
}

/// The members that a router knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// In a fixed order.
    pub workers: Vec<Member>,
    /// In a fixed order; where the membership does not tell, none.
    pub routers: Vec<Member>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_needs_its_identity_only() {
        let text = r#"{"name":"g","role":"worker","address":"h:1","novel":true}"#;
        let member: Member = serde_json::from_str(text).unwrap();
        let mut expected = Member::at("h:1".parse().unwrap());
        expected.name = "g".into();
        assert_eq!(member, expected);
        let again = serde_json::to_string(&member).unwrap();
        assert_eq!(serde_json::from_str::<Member>(&again).unwrap(), member);
        for bad in [
            "",
            r#"{"name":"g","role":"worker","address":"nowhere"}"#,
            r#"{"name":"g","address":"h:1"}"#,
        ] {
            assert!(serde_json::from_str::<Member>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn intents_are_written_plainly() {
        let drain = Intent::Drain {
            deadline: Some(1_800_000_000_000),
        };
        let text = r#"{"action":"DRAIN","deadline":1800000000000}"#;
        assert_eq!(serde_json::to_string(&drain).unwrap(), text);
        assert_eq!(serde_json::from_str::<Intent>(text).unwrap(), drain);
        let open = serde_json::from_str::<Intent>(r#"{"action":"DRAIN"}"#).unwrap();
        assert_eq!(open, Intent::Drain { deadline: None });
        assert!(serde_json::from_str::<Intent>(r#"{"action":"EXPLODE"}"#).is_err());
    }
}
