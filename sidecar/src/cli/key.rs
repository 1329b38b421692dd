//! `key generate`

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use age::secrecy::ExposeSecret;
use clap::Subcommand;
use serde::Serialize;

use crate::cli::Context;
use crate::cli::failure::{ExitStatus, Failure};

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make an age identity: the file opens backups, the printed recipient seals them
    Generate {
        /// The identity file to make; keep it away from the machine that is backed up
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
    },
}

#[derive(Serialize)]
struct Generated {
    #[serde(serialize_with = "crate::lossy::path")]
    identity_file: PathBuf,
    recipient: String,
}

pub fn run(context: &Context<'_>, command: KeyCommand) -> Result<ExitStatus, Failure> {
    let KeyCommand::Generate { output } = command;
    let identity = age::x25519::Identity::generate();
    let recipient = identity.to_public().to_string();
    let text = format!("# recipient: {recipient}\n{}\n", identity.to_string().expose_secret());
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&output);
    let written = file.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| {
        let status = match error.kind() {
            std::io::ErrorKind::AlreadyExists => ExitStatus::Refused,
            _ => ExitStatus::Failed,
        };
        Failure::new(status, format!("write {}: {error}", output.display()))
    })?;
    let generated = Generated { identity_file: output, recipient };
    context.output.result(&generated, |generated| {
        format!("recipient {}\nidentity  {}", generated.recipient, generated.identity_file.display())
    });
    Ok(ExitStatus::Ok)
}
