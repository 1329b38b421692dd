//! The keys that a server signs and checks tokens with, and one identity at two servers that have keys of their own.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use openssl::ec::{EcGroup, EcKey};
use openssl::ecdsa::EcdsaSig;
use openssl::nid::Nid;
use openssl::pkey::PKey;

/// Bytes of each half of an ES256 signature.
const HALF: i32 = 32;

/// Makes new keys in `dir`, in the form that servers make them.
///
/// # Errors
/// When they cannot be made or written.
pub fn make(dir: &Path) -> Result<(), String> {
    let make = || -> Result<(Vec<u8>, Vec<u8>), openssl::error::ErrorStack> {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
        let key = PKey::from_ec_key(EcKey::generate(&group)?)?;
        Ok((key.private_key_to_pem_pkcs8()?, key.public_key_to_pem()?))
    };
    let (private, public) = make().map_err(|error| format!("make keys: {error}"))?;
    crate::durable::owner::make_private_dir(dir).map_err(|error| error.to_string())?;
    write_new(&dir.join("id_ecdsa"), &private)?;
    write_new(&dir.join("id_ecdsa.pub"), &public)
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(bytes));
    written.map_err(|error| format!("write {}: {error}", path.display()))
}

/// Signs the claims of the token in `live` with the private key of another server, into `own`.
///
/// # Errors
/// What about token or key is not as it should be.
pub fn sign_again(live: &Path, key: &Path, own: &Path) -> Result<(), String> {
    let token = std::fs::read_to_string(live).map_err(|error| format!("read {}: {error}", live.display()))?;
    let claims = token.trim().split('.').nth(1).ok_or("the token has no claims")?;
    let pem = std::fs::read(key).map_err(|error| format!("read {}: {error}", key.display()))?;
    let signed = sign(claims, &pem).map_err(|error| format!("sign with {}: {error}", key.display()))?;
    write_new(own, signed.as_bytes())
}

fn sign(claims: &str, pem: &[u8]) -> Result<String, openssl::error::ErrorStack> {
    let key = EcKey::private_key_from_pem(pem)?;
    let head = URL_SAFE_NO_PAD.encode(br#"{"typ":"JWT","alg":"ES256"}"#);
    let message = format!("{head}.{claims}");
    let signature = EcdsaSig::sign(&openssl::sha::sha256(message.as_bytes()), &key)?;
    let mut bytes = signature.r().to_vec_padded(HALF)?;
    bytes.extend(signature.s().to_vec_padded(HALF)?);
    Ok(format!("{message}.{}", URL_SAFE_NO_PAD.encode(bytes)))
}
