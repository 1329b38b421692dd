//! Who may do what over HTTP, and how often.
//!
//! Invariants: nothing is triggered without the token; tokens are compared in constant time and never logged; a request that
//! a web page of another origin can make a browser send changes nothing and reads nothing.

use std::num::NonZeroU32;

use axum::http::{HeaderMap, StatusCode, header};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use crate::config::HttpConfig;
use crate::http::answer::Refusal;
use crate::ids::ContentHash;

/// What a request is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Says nothing about data: health and metrics.
    Open,
    Read,
    Trigger,
}

pub(super) struct Guard {
    /// The hash of the token: hashes are compared in constant time.
    token: Option<ContentHash>,
    requests: DefaultDirectRateLimiter,
    triggers: DefaultDirectRateLimiter,
}

const fn times(n: u32) -> NonZeroU32 {
    match NonZeroU32::new(n) {
        Some(n) => n,
        None => NonZeroU32::MIN,
    }
}

impl Guard {
    pub fn new(config: &HttpConfig) -> Self {
        Self {
            token: config.token.as_ref().map(|token| ContentHash::of(token.reveal().as_bytes())),
            requests: RateLimiter::direct(Quota::per_second(times(50)).allow_burst(times(100))),
            triggers: RateLimiter::direct(Quota::per_minute(times(6)).allow_burst(times(3))),
        }
    }

    /// May whoever sends these headers read? Asking counts for nothing.
    pub fn may_read(&self, headers: &HeaderMap) -> bool {
        self.token.as_ref().map_or_else(|| names_this_machine(headers), |expected| fits(expected, headers))
    }

    /// # Errors
    /// The answer to a request that may not pass.
    pub fn check(&self, access: Access, headers: &HeaderMap) -> Result<(), Refusal> {
        if self.requests.check().is_err() {
            return Err(Refusal::too_many("too many requests; ask at most 50 times a second", 1));
        }
        if access == Access::Open {
            return Ok(());
        }
        let Some(expected) = &self.token else {
            if access == Access::Trigger {
                return Err(Refusal::new(
                    StatusCode::FORBIDDEN,
                    "nothing can be triggered without a token; set http.token in the configuration",
                ));
            }
            // Without a token a name that somebody else points at this machine must not read what is here.
            return if names_this_machine(headers) {
                Ok(())
            } else {
                Err(Refusal::new(
                    StatusCode::FORBIDDEN,
                    "without a token use 127.0.0.1 or localhost, or set http.token",
                ))
            };
        };
        if !fits(expected, headers) {
            return Err(Refusal::unauthorized());
        }
        Ok(())
    }

    /// Counts a trigger that is about to be pulled.
    ///
    /// # Errors
    /// When it is too often.
    pub fn pull(&self) -> Result<(), Refusal> {
        let refuse = |_| Refusal::too_many("at most six triggers a minute; wait", 10);
        self.triggers.check().map_err(refuse)
    }
}

fn fits(expected: &ContentHash, headers: &HeaderMap) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).map(|token| token.trim().as_bytes());
    // `blake3::Hash` compares in constant time.
    given.is_some_and(|token| blake3::hash(token) == blake3::Hash::from_bytes(expected.0))
}

fn names_this_machine(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok()
}
