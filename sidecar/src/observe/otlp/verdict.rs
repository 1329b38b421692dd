//! What a collector's answer says about the records that were sent, by the OTLP specification.

use std::error::Error as _;
use std::time::Duration;

use http::StatusCode;
use tonic::{Code, Status};

use crate::outbound;

/// A collector may ask for a rest; a longer one is not kept.
const REST_MAX: Duration = Duration::from_secs(60);
/// Characters of an answer that are repeated.
const ANSWER_CHARS: usize = 200;

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There was no answer.
    Unreachable { reason: String, is_connection: bool },
    /// The same request can be taken later.
    Busy { answer: String, after: Option<Duration> },
    /// Whatever is sent, it is not taken: wrong credentials, a wrong address.
    NotAccepted(String),
    /// The request is too long.
    TooLarge(String),
    /// The records cannot be taken, now or later.
    Refused(String),
    /// The records cannot be taken, or the collector is out of order; what happens to others tells.
    Doubtful(String),
}

impl Verdict {
    /// Returns true if fewer records could be taken.
    pub fn is_about_records(&self) -> bool {
        matches!(self, Self::TooLarge(_) | Self::Refused(_) | Self::Doubtful(_))
    }
}

pub fn of_connection(error: &reqwest::Error) -> Verdict {
    let reason = if error.is_timeout() { "it gave no answer in time".to_owned() } else { outbound::reason(error) };
    Verdict::Unreachable { reason, is_connection: error.is_connect() }
}

pub fn of_status(status: StatusCode, after: Option<Duration>, body: &[u8]) -> Verdict {
    let text: String = String::from_utf8_lossy(body).chars().filter(|c| !c.is_control()).take(ANSWER_CHARS).collect();
    let answer = format!("{status} {text}").trim_end().to_owned();
    match status.as_u16() {
        429 | 502 | 503 | 504 | 408 => Verdict::Busy { answer, after: after.map(|after| after.min(REST_MAX)) },
        413 => Verdict::TooLarge(answer),
        400 | 422 => Verdict::Refused(answer),
        500.. => Verdict::Doubtful(answer),
        _ => Verdict::NotAccepted(answer),
    }
}

pub fn of_grpc(status: &Status) -> Verdict {
    // A status that the collector sent has no cause here.
    if let Some(cause) = status.source() {
        let is_connection = cause.is::<tonic::transport::Error>();
        return Verdict::Unreachable { reason: outbound::root_cause(cause), is_connection };
    }
    let text: String = status.message().chars().filter(|c| !c.is_control()).take(ANSWER_CHARS).collect();
    let answer = format!("{:?} {text}", status.code()).trim_end().to_owned();
    match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => Verdict::Busy { answer, after: None },
        Code::ResourceExhausted if says_retry(status.details()) => Verdict::Busy { answer, after: None },
        // Without that it is the answer to a message that is too long.
        Code::ResourceExhausted => Verdict::TooLarge(answer),
        Code::InvalidArgument => Verdict::Refused(answer),
        Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented | Code::NotFound => {
            Verdict::NotAccepted(answer)
        }
        _ => Verdict::Doubtful(answer),
    }
}

/// Is there a `RetryInfo` among the details? They name their types as text.
fn says_retry(details: &[u8]) -> bool {
    const NAME: &[u8] = b"google.rpc.RetryInfo";
    details.windows(NAME.len()).any(|window| window == NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_sorted_as_the_specification_says() {
        let http = |status: u16| of_status(StatusCode::from_u16(status).expect("a status"), None, b"why\r\n");
        for status in [408, 429, 502, 503, 504] {
            assert!(matches!(http(status), Verdict::Busy { .. }), "{status}");
        }
        assert_eq!(http(400), Verdict::Refused("400 Bad Request why".into()));
        assert!(matches!(http(413), Verdict::TooLarge(_)) && matches!(http(500), Verdict::Doubtful(_)));
        for status in [301, 401, 403, 404, 405, 415] {
            assert!(matches!(http(status), Verdict::NotAccepted(_)), "{status}");
        }
        let grpc = |code| of_grpc(&Status::new(code, "why"));
        for code in [
            Code::Cancelled,
            Code::DeadlineExceeded,
            Code::Aborted,
            Code::OutOfRange,
            Code::Unavailable,
            Code::DataLoss,
        ] {
            assert!(matches!(grpc(code), Verdict::Busy { .. }), "{code:?}");
        }
        assert_eq!(grpc(Code::InvalidArgument), Verdict::Refused("InvalidArgument why".into()));
        assert!(matches!(grpc(Code::ResourceExhausted), Verdict::TooLarge(_)));
        let retry = Status::with_details(Code::ResourceExhausted, "", "x/google.rpc.RetryInfo".into());
        assert!(matches!(of_grpc(&retry), Verdict::Busy { .. }));
        assert!(matches!(grpc(Code::Unauthenticated), Verdict::NotAccepted(_)));
        assert!(matches!(grpc(Code::Internal), Verdict::Doubtful(_)));
    }
}
