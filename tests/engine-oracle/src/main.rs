//! What the engine of a newer SpacetimeDB makes of a replica's files: the judge of what was restored, and a writer to
//! follow.

mod history;
mod schema;
mod state;
mod writer;

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use spacetimedb_lib::Identity;

const USAGE: &str = "\
engine-oracle DATA-DIR REPLICA IDENTITY OWNER states OFFSET...  the tables after each offset, by the log from its start
engine-oracle DATA-DIR REPLICA IDENTITY OWNER open              the tables after opening it as a server does
engine-oracle DATA-DIR REPLICA IDENTITY OWNER write SEED        write until standard input ends; print the last offset";

/// A replica and whose it is.
pub struct Place {
    pub data_dir: PathBuf,
    pub replica: u64,
    pub identity: Identity,
    pub owner: Identity,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let [data_dir, replica, identity, owner, what @ ..] = arguments.as_slice() else { bail!("{USAGE}") };
    let place = Place {
        data_dir: data_dir.into(),
        replica: replica.parse()?,
        identity: Identity::from_hex(identity).context("the identity")?,
        owner: Identity::from_hex(owner).context("the owner")?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match what {
        ["states", offsets @ ..] => {
            for offset in offsets {
                println!("{}", state::of(&history::replayed(&place, offset.parse()?)?)?);
            }
            Ok(())
        }
        ["open"] => runtime.block_on(async {
            let database = writer::open(&place).await?;
            println!("{}", state::of(&database)?);
            database.shutdown().await;
            Ok(())
        }),
        ["write", seed] => runtime.block_on(writer::write_until_told(&place, seed.parse()?)),
        _ => bail!("{USAGE}"),
    }
}
