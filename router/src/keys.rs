//! Who calls, and how much they may ask for.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use shoal_proto::inference::Priority;
use tokio::time::Instant;

use crate::error::{RequestError, RouterError};

/// The API keys of a router, by their SHA-256: the file holds no secret, and a lookup by hash
/// tells nothing about a key by its time.
///
/// ```toml
/// [[tenants]]                  # only for those with limits; all of them optional
/// name = "acme"
/// requests_per_minute = 600
/// tokens_per_minute = 200000   # prompt and output
/// max_concurrent = 32
/// max_priority = "default"     # bulk, default or interactive
/// remember = false             # answers draft for their own conversation only
///
/// [[keys]]
/// sha256 = "2bb80d53…"         # printf %s KEY | sha256sum
/// tenant = "acme"
/// user = "alice"               # optional
/// admin = true                 # optional: may also see the cluster and drain its groups
/// router = true                # optional: may also follow the text that drafts, of all tenants
/// ```
#[derive(Clone, Debug)]
pub struct ApiKeys {
    by_hash: Arc<HashMap<[u8; 32], Caller>>,
}

/// Who sent a request.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) tenant: Arc<Tenant>,
    pub(crate) user: Arc<str>,
    /// May see and change the cluster.
    pub(crate) operator: bool,
    /// May follow the logs of text that drafts: a router of the cluster.
    pub(crate) router: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    tenants: Vec<RawTenant>,
    keys: Vec<RawKey>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTenant {
    name: String,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    max_concurrent: Option<u32>,
    max_priority: Option<RawPriority>,
    remember: Option<bool>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawPriority {
    Bulk,
    Default,
    Interactive,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKey {
    sha256: String,
    tenant: String,
    #[serde(default)]
    user: String,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    router: bool,
}

impl ApiKeys {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, does not parse, or repeats a tenant or a key.
    pub fn load(path: &Path) -> Result<Self, RouterError> {
        let text = std::fs::read_to_string(path).map_err(|source| RouterError::KeysFile {
            path: path.into(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, RouterError> {
        let file: File = toml::from_str(text).map_err(|source| RouterError::KeysSyntax {
            path: path.into(),
            source: Box::new(source),
        })?;
        let problem = |problem: String| RouterError::Keys {
            path: path.into(),
            problem,
        };
        let mut tenants = HashMap::new();
        for raw in file.tenants {
            let name = raw.name.clone();
            if tenants
                .insert(name.clone(), Arc::new(Tenant::from(raw)))
                .is_some()
            {
                return Err(problem(format!("tenant {name:?} stands there twice")));
            }
        }
        let mut by_hash = HashMap::new();
        for key in file.keys {
            let hash = parse_hash(&key.sha256)
                .ok_or_else(|| problem(format!("{:?} is no SHA-256 in hex", key.sha256)))?;
            let tenant = tenants
                .entry(key.tenant)
                .or_insert_with_key(|name| Arc::new(Tenant::unlimited(name)));
            let caller = Caller {
                tenant: tenant.clone(),
                user: key.user.into(),
                operator: key.admin,
                router: key.router,
            };
            if by_hash.insert(hash, caller).is_some() {
                return Err(problem(format!("key {} stands there twice", key.sha256)));
            }
        }
        Ok(Self {
            by_hash: Arc::new(by_hash),
        })
    }

    /// Whose key it is.
    pub(crate) fn caller(&self, key: &str) -> Option<Caller> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        self.by_hash.get(&hash).cloned()
    }
}

fn parse_hash(hex: &str) -> Option<[u8; 32]> {
    let digits: Option<Vec<u8>> = hex
        .chars()
        .map(|c| c.to_digit(16).map(|d| d as u8))
        .collect();
    let bytes: Vec<u8> = digits?
        .chunks(2)
        .map(|d| d[0] << 4 | d.get(1).unwrap_or(&0))
        .collect();
    (hex.len() == 64).then(|| bytes.try_into().ok()).flatten()
}

/// A party whose cache, quotas and priority are its own.
#[derive(Debug)]
pub(crate) struct Tenant {
    pub(crate) name: Arc<str>,
    /// Whether answers draft for later ones.
    pub(crate) remembers: bool,
    max_priority: Priority,
    max_concurrent: u32,
    usage: Mutex<Usage>,
}

#[derive(Debug)]
struct Usage {
    concurrent: u32,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// A token bucket that holds one minute's allowance and may go into debt, since the output of
/// a request is known only at its end.
#[derive(Debug)]
struct Bucket {
    per_minute: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_minute: u32) -> Self {
        let level = f64::from(per_minute);
        Self {
            per_minute: level,
            level,
            at: Instant::now(),
        }
    }

    fn refill(&mut self, now: Instant) {
        let minutes = now.duration_since(self.at).as_secs_f64() / 60.0;
        self.level = (self.level + minutes * self.per_minute).min(self.per_minute);
        self.at = now;
    }

    /// `Err`: the time until the level is `amount`.
    fn check(&mut self, amount: f64, now: Instant) -> Result<(), Duration> {
        self.refill(now);
        let missing = amount - self.level;
        if missing <= 0.0 {
            return Ok(());
        }
        // A limit of zero never refills.
        let minutes = missing / self.per_minute.max(1e-3);
        Err(Duration::from_secs_f64(minutes * 60.0))
    }
}

impl From<RawTenant> for Tenant {
    fn from(raw: RawTenant) -> Self {
        Self {
            name: raw.name.into(),
            remembers: raw.remember.unwrap_or(true),
            max_priority: match raw.max_priority {
                Some(RawPriority::Bulk) => Priority::Bulk,
                Some(RawPriority::Default) => Priority::Default,
                Some(RawPriority::Interactive) | None => Priority::Interactive,
            },
            max_concurrent: raw.max_concurrent.unwrap_or(u32::MAX),
            usage: Mutex::new(Usage {
                concurrent: 0,
                requests: raw.requests_per_minute.map(Bucket::new),
                tokens: raw.tokens_per_minute.map(Bucket::new),
            }),
        }
    }
}

impl Tenant {
    /// A tenant without limits.
    pub(crate) fn unlimited(name: &str) -> Self {
        Self::from(RawTenant {
            name: name.into(),
            ..RawTenant::default()
        })
    }

    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The priority that a request gets.
    pub(crate) fn clamp(&self, asked: Priority) -> Priority {
        match asked {
            Priority::Unspecified => Priority::Default.min(self.max_priority),
            asked => asked.min(self.max_priority),
        }
    }

    /// Counts a request in, until the guard is dropped.
    pub(crate) fn begin(self: &Arc<Self>) -> Result<TenantGuard, RequestError> {
        let refused = |what, retry_after| RequestError::Quota {
            tenant: self.name.to_string(),
            what,
            retry_after,
        };
        let now = Instant::now();
        let mut usage = self.usage();
        if usage.concurrent >= self.max_concurrent {
            return Err(refused("concurrent requests", Duration::from_secs(1)));
        }
        if let Some(tokens) = &mut usage.tokens {
            tokens
                .check(1.0, now)
                .map_err(|time| refused("tokens per minute", time))?;
        }
        if let Some(requests) = &mut usage.requests {
            requests
                .check(1.0, now)
                .map_err(|time| refused("requests per minute", time))?;
            requests.level -= 1.0;
        }
        usage.concurrent += 1;
        drop(usage);
        Ok(TenantGuard(self.clone()))
    }
}

/// A request that counts against its tenant.
#[derive(Debug)]
pub(crate) struct TenantGuard(Arc<Tenant>);

impl TenantGuard {
    /// Charges tokens of the prompt or of the output.
    pub(crate) fn charge(&self, tokens: u32) {
        if let Some(bucket) = &mut self.0.usage().tokens {
            bucket.refill(Instant::now());
            bucket.level -= f64::from(tokens);
        }
    }
}

impl Drop for TenantGuard {
    fn drop(&mut self) {
        self.0.usage().concurrent -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of "secret".
    const SECRET: &str = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

    fn parse(text: &str) -> Result<ApiKeys, RouterError> {
        ApiKeys::parse(text, Path::new("keys.toml"))
    }

    fn tenant(limits: RawTenant) -> Arc<Tenant> {
        Arc::new(Tenant::from(limits))
    }

    fn retry_after(tenant: &Arc<Tenant>) -> Duration {
        tenant.begin().unwrap_err().retry_after().unwrap()
    }

    #[tokio::test]
    async fn a_key_names_its_caller() {
        let keys = parse(&format!(
            "[[keys]]\nsha256 = \"{SECRET}\"\ntenant = \"acme\"\nuser = \"alice\"\n"
        ))
        .unwrap();
        let caller = keys.caller("secret").unwrap();
        assert_eq!((&*caller.tenant.name, &*caller.user), ("acme", "alice"));
        assert!(!caller.operator);
        assert!(keys.caller("Secret").is_none());
        assert!(keys.caller("").is_none());
    }

    #[tokio::test]
    async fn mistakes_in_the_file_are_named() {
        let key = format!("[[keys]]\nsha256 = \"{SECRET}\"\ntenant = \"a\"\n");
        for (text, problem) in [
            (
                "[[keys]]\nsha256 = \"ab\"\ntenant = \"a\"\n".to_owned(),
                "no SHA-256",
            ),
            (format!("{key}{key}"), "twice"),
            (
                format!("[[tenants]]\nname=\"a\"\n[[tenants]]\nname=\"a\"\n{key}"),
                "twice",
            ),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.to_string().contains(problem), "{error}");
        }
        let error = parse(&format!("{key}colour = 1\n")).unwrap_err();
        assert!(matches!(error, RouterError::KeysSyntax { .. }));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_per_minute_refill() {
        let tenant = tenant(RawTenant {
            requests_per_minute: Some(2),
            ..RawTenant::default()
        });
        drop((tenant.begin().unwrap(), tenant.begin().unwrap()));
        assert_eq!(retry_after(&tenant), Duration::from_secs(30));
        tokio::time::advance(Duration::from_secs(30)).await;
        tenant.begin().unwrap();
        assert!(tenant.begin().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_go_into_debt_and_come_back() {
        let tenant = tenant(RawTenant {
            tokens_per_minute: Some(60),
            ..RawTenant::default()
        });
        let guard = tenant.begin().unwrap();
        guard.charge(100);
        assert_eq!(retry_after(&tenant), Duration::from_secs(41));
        tokio::time::advance(Duration::from_secs(41)).await;
        tenant.begin().unwrap();
    }

    #[tokio::test]
    async fn concurrency_ends_with_the_guard() {
        let tenant = tenant(RawTenant {
            max_concurrent: Some(1),
            ..RawTenant::default()
        });
        let guard = tenant.begin().unwrap();
        assert!(tenant.begin().is_err());
        drop(guard);
        tenant.begin().unwrap();
    }

    #[tokio::test]
    async fn priority_is_clamped() {
        let tenant = tenant(RawTenant {
            max_priority: Some(RawPriority::Bulk),
            ..RawTenant::default()
        });
        assert_eq!(tenant.clamp(Priority::Interactive), Priority::Bulk);
        assert_eq!(tenant.clamp(Priority::Unspecified), Priority::Bulk);
        let free = Tenant::unlimited("t");
        assert_eq!(free.clamp(Priority::Unspecified), Priority::Default);
        assert_eq!(free.clamp(Priority::Interactive), Priority::Interactive);
    }
}
