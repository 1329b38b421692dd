//! What a store's errors mean to the one who has to fix them.

use object_store::Error;

use crate::repository::RepositoryError;
use crate::repository::store::http::NoConditions;

/// The server's own words, without the layers around them.
pub(in crate::repository) fn said(error: &Error) -> String {
    let text = error.to_string();
    match (code(&text), element(&text, "Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        _ => text.chars().take(300).collect(),
    }
}

/// The code of an S3 error.
pub(super) fn code(text: &str) -> Option<&str> {
    element(text, "Code")
}

fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let from = text.find(&open)? + open.len();
    Some(text[from..].split_once(&close)?.0)
}

/// Codes by which servers of S3 say that they do not know a header of conditional writes.
pub(super) fn is_of_condition(code: &str) -> bool {
    matches!(
        code,
        "NotImplemented"
            | "InvalidArgument"
            | "InvalidRequest"
            | "InvalidHeader"
            | "UnsupportedHeader"
            | "UnsupportedOperation"
            | "OperationNotSupported"
            | "NotSupported"
            | "MethodNotAllowed"
            | "BadRequest"
    )
}

/// Returns true if the store does not implement the condition of a write.
pub(super) fn lacks_conditions(error: &RepositoryError) -> bool {
    let RepositoryError::Store { source, .. } = error else { return false };
    if matches!(source, Error::NotImplemented { .. }) {
        return true;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(source);
    while let Some(error) = cause {
        if error.is::<NoConditions>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// What an S3 server's error means to the one who has to fix it; `None` where its own text says enough.
pub(in crate::repository) fn hint(error: &Error) -> Option<&'static str> {
    const HINTS: [(&str, &str); 14] = [
        ("NotSignedUp", "the access key is not known to the store; check access_key_id"),
        ("InvalidAccessKeyId", "the access key is not known to the store; check access_key_id"),
        ("SignatureDoesNotMatch", "the secret key does not fit the access key; check secret_access_key"),
        ("RequestTimeTooSkewed", "this machine's clock is wrong; set it (chrony, ntpd) and try again"),
        ("ExpiredToken", "the credentials have expired; renew them"),
        ("InvalidToken", "the session token is not valid; renew the credentials"),
        ("AuthorizationHeaderMalformed", "the bucket is in another region; set region"),
        ("PermanentRedirect", "the bucket is in another region or behind another endpoint; set region and endpoint"),
        ("IllegalLocationConstraint", "the bucket is in another region; set region"),
        ("NoSuchBucket", "there is no such bucket; create it or correct the address"),
        ("AccessDenied", "the credentials may not do this; grant read, write and list on the prefix"),
        ("InvalidObjectState", "the object is in an archive tier, which is not read directly; restore it there first"),
        ("AccountProblem", "the account is suspended; ask the provider"),
        ("QuotaExceeded", "the store is full; make room or raise its quota"),
    ];
    let text = error.to_string();
    let known = HINTS.iter().find(|(code, _)| text.contains(&format!("<Code>{code}</Code>"))).map(|(_, hint)| *hint);
    known.or(match error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            Some("it does not accept the credentials; check the access keys and what they may do")
        }
        _ => None,
    })
}
