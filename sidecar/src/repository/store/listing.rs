//! Answers that a store's client would take for less than there is: a listing that is cut off, a page of another service.
//!
//! Invariants: a listing that is used is complete, or an error that passes; the parser behind this module takes any XML for an
//! empty listing, so nothing reaches it that is not one.

use bytes::Bytes;
use futures::TryStreamExt as _;
use http::{Method, StatusCode};
use object_store::client::{HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody};
use quick_xml::Reader;
use quick_xml::escape::unescape;
use quick_xml::events::Event;

/// The longest listing that is read: a thousand names of a kilobyte, each byte escaped.
const LISTING_BYTES_MAX: usize = 16 << 20;
/// The longest error that is read.
const ERROR_BYTES_MAX: usize = 1 << 20;

/// An answer that no store gives.
#[derive(Debug, thiserror::Error)]
#[error("the store's answer cannot be trusted: {0}")]
struct Untrusted(String);

/// What a request expects of its answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// A page of names, which does not continue at the token that it was asked for.
    Page {
        root: &'static str,
        asked: Option<String>,
    },
    /// An object, or an error that says that there is none.
    Object,
    Anything,
}

impl Expected {
    pub(super) fn of(request: &HttpRequest) -> Self {
        let query = request.uri().query().unwrap_or_default();
        let find = |name: &str| {
            let mut pairs = url::form_urlencoded::parse(query.as_bytes());
            pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
        };
        match *request.method() {
            Method::GET if find("list-type").as_deref() == Some("2") => {
                Self::Page { root: "ListBucketResult", asked: find("continuation-token") }
            }
            Method::GET if find("comp").as_deref() == Some("list") => {
                Self::Page { root: "EnumerationResults", asked: find("marker") }
            }
            Method::GET => Self::Object,
            _ => Self::Anything,
        }
    }

    /// Passes the answer on if it is one to this request.
    pub(super) async fn check(self, answer: HttpResponse) -> Result<HttpResponse, HttpError> {
        let success = answer.status().is_success();
        match self {
            Self::Page { root, asked } if success => {
                let (answer, body) = read(answer, LISTING_BYTES_MAX).await?;
                let page = Page::parse(&body, root).map_err(refuse)?;
                page.check(asked.as_deref()).map_err(refuse)?;
                Ok(answer)
            }
            Self::Object if success => {
                let kind = answer.headers().get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
                // Nothing that is stored here is a web page.
                match kind.is_some_and(|kind| kind.trim_start().starts_with("text/html")) {
                    true => Err(refuse(web_page())),
                    false => Ok(answer),
                }
            }
            Self::Object if answer.status() == StatusCode::NOT_FOUND => {
                let (answer, body) = read(answer, ERROR_BYTES_MAX).await?;
                if is_web_page(&body) { Err(refuse(web_page())) } else { Ok(answer) }
            }
            _ => Ok(answer),
        }
    }
}

fn web_page() -> String {
    "it is a web page; check repository.endpoint, and what answers there in the store's place".into()
}

/// Interrupted requests that only read are sent again, like those that no answer came to.
fn refuse(reason: String) -> HttpError {
    HttpError::new(HttpErrorKind::Interrupted, Untrusted(reason))
}

/// Reads the body of an answer, which stays as it was.
pub(super) async fn read(answer: HttpResponse, limit: usize) -> Result<(HttpResponse, Bytes), HttpError> {
    let (head, body) = answer.into_parts();
    let mut chunks = body.bytes_stream();
    let mut read = Vec::new();
    while let Some(chunk) = chunks.try_next().await? {
        if read.len() + chunk.len() > limit {
            return Err(refuse(format!("it is longer than {limit} bytes")));
        }
        read.extend_from_slice(&chunk);
    }
    let body = Bytes::from(read);
    Ok((HttpResponse::from_parts(head, HttpResponseBody::from(body.clone())), body))
}

pub(super) fn is_web_page(body: &[u8]) -> bool {
    let start: Vec<u8> = body.trim_ascii_start().iter().take(14).map(u8::to_ascii_lowercase).collect();
    start.starts_with(b"<!doctype html") || start.starts_with(b"<html")
}

/// What a page of a listing says of the next one.
#[derive(Debug, Default, PartialEq, Eq)]
struct Page {
    truncated: Option<bool>,
    next: Option<String>,
}

impl Page {
    /// Reads a document whose outermost element is `root`, to its end.
    fn parse(body: &[u8], root: &str) -> Result<Self, String> {
        let broken = |error: quick_xml::Error| format!("it is not XML: {error}");
        let mut reader = Reader::from_reader(body);
        loop {
            match reader.read_event().map_err(broken)? {
                Event::Start(element) if element.local_name().as_ref() == root.as_bytes() => break,
                Event::Empty(element) if element.local_name().as_ref() == root.as_bytes() => return Ok(Self::default()),
                Event::Start(element) | Event::Empty(element) => {
                    let found =
                        String::from_utf8_lossy(element.local_name().as_ref()).chars().take(60).collect::<String>();
                    return Err(format!(
                        "it is `{found}` where `{root}` was asked for; check repository.endpoint, path_style and what \
                         answers there in the store's place"
                    ));
                }
                Event::Eof => return Err(format!("it is not the `{root}` that was asked for")),
                _ => {}
            }
        }
        // Another version of S3's listing continues by a marker, which our client would not follow.
        let token: &[u8] = if root == "EnumerationResults" { b"NextMarker" } else { b"NextContinuationToken" };
        let mut page = Self::default();
        loop {
            match reader.read_event().map_err(broken)? {
                Event::Start(element) => {
                    let name = element.name();
                    match name.local_name().as_ref() {
                        b"IsTruncated" => page.truncated = Some(text(&mut reader, name)? == "true"),
                        found if found == token => page.next = Some(text(&mut reader, name)?),
                        _ => reader.read_to_end(name).map(drop).map_err(broken)?,
                    }
                }
                Event::End(_) => return Ok(page),
                Event::Eof => return Err("the listing is cut off".into()),
                _ => {}
            }
        }
    }

    fn check(&self, asked: Option<&str>) -> Result<(), String> {
        match self.next.as_deref().filter(|next| !next.is_empty()) {
            None if self.truncated == Some(true) => {
                Err("the listing goes no further and is not complete: it has no token for the next page".into())
            }
            Some(next) if Some(next) == asked => {
                Err("the listing does not end: the next page has the token of this one".into())
            }
            _ => Ok(()),
        }
    }
}

fn text(reader: &mut Reader<&[u8]>, name: quick_xml::name::QName) -> Result<String, String> {
    let broken = |error: &dyn std::error::Error| format!("it is not XML: {error}");
    let raw = reader.read_text(name).map_err(|error| broken(&error))?;
    let raw = raw.decode().map_err(|error| broken(&error))?;
    Ok(unescape(&raw).map_err(|error| broken(&error))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "ListBucketResult";

    fn page(inner: &str) -> String {
        format!("<?xml version=\"1.0\"?>\n<{ROOT} xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{inner}</{ROOT}>")
    }

    fn judge(body: &str, asked: Option<&str>) -> Result<(), String> {
        Page::parse(body.as_bytes(), ROOT).and_then(|page| page.check(asked))
    }

    #[test]
    fn whole_pages_pass_as_they_are() {
        for body in [
            page("<IsTruncated>false</IsTruncated><Contents><Key>a</Key></Contents>"),
            page("<NextContinuationToken>a&amp;b</NextContinuationToken><IsTruncated>true</IsTruncated>"),
            page("<NextContinuationToken/><IsTruncated>false</IsTruncated>"),
            format!("<{ROOT}/>"),
        ] {
            assert_eq!(judge(&body, Some("a")), Ok(()), "{body}");
        }
    }

    #[test]
    fn other_documents_are_no_listing() {
        for body in [
            "",
            "   ",
            "down for maintenance",
            "<!DOCTYPE html><html><body>Maintenance</body></html>",
            "<html/>",
            "<ListAllMyBucketsResult><Buckets></Buckets></ListAllMyBucketsResult>",
            "{\"ok\": true}",
        ] {
            assert!(judge(body, None).is_err(), "{body}");
        }
    }

    #[test]
    fn truncated_pages_need_another_token() {
        assert!(judge(&page("<IsTruncated>true</IsTruncated>"), None).is_err_and(|reason| reason.contains("no token")));
        assert!(judge(&page("<IsTruncated>true</IsTruncated><NextContinuationToken/>"), None).is_err());
        assert!(judge(&page("<IsTruncated>true</IsTruncated><NextMarker>a</NextMarker>"), None).is_err());
        let same = page("<IsTruncated>true</IsTruncated><NextContinuationToken>a&amp;b</NextContinuationToken>");
        assert!(judge(&same, Some("a&b")).is_err_and(|reason| reason.contains("does not end")));
        let cut = page("<IsTruncated>false</IsTruncated><Contents><Key>a</Key></Contents>");
        for len in 0..cut.len() {
            assert!(judge(&cut[..len], None).is_err(), "{}", &cut[..len]);
        }
    }

    #[test]
    fn requests_say_what_they_expect() {
        let of = |method: Method, uri: &str| {
            let mut request = HttpRequest::new(object_store::client::HttpRequestBody::empty());
            *request.method_mut() = method;
            *request.uri_mut() = uri.parse().expect("a URI");
            Expected::of(&request)
        };
        let asked = Some("a b+".to_owned());
        assert_eq!(
            of(Method::GET, "http://s3/b?continuation-token=a%20b%2B&list-type=2&prefix=p"),
            Expected::Page { root: ROOT, asked }
        );
        assert_eq!(
            of(Method::GET, "http://az/c?restype=container&comp=list&marker=m"),
            Expected::Page { root: "EnumerationResults", asked: Some("m".into()) }
        );
        assert_eq!(of(Method::GET, "http://s3/b/key"), Expected::Object);
        assert_eq!(of(Method::PUT, "http://s3/b/key?partNumber=1"), Expected::Anything);
    }
}
