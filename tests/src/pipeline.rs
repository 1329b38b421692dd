//! Calls of one reducer over one connection, many of them on their way at once: as fast as a server takes them.

use inner_universe::config::Config;
use inner_universe::database::link::Link;

use crate::client::Client;

/// Calls on their way at once.
const WINDOW: usize = 400;

/// Calls `reducer` with each of `arguments` (BSATN), as `client`, at the server at `url`.
///
/// # Panics
/// When a call fails.
pub async fn calls(
    url: &str,
    client: &Client,
    database: &str,
    reducer: &str,
    arguments: impl Iterator<Item = Vec<u8>>,
) {
    let scratch = tempfile::tempdir().expect("a directory");
    let token = scratch.path().join("token");
    std::fs::write(&token, &client.token).expect("write the token");
    let mut config = Config::default();
    config.spacetimedb_config.url = Some(url.to_owned());
    config.spacetimedb_config.token_file = Some(token);
    let mut link = Link::new(&config.spacetimedb_config, &config.server_config, database).expect("a link");
    let mut open = 0;
    for arguments in arguments {
        link.call(reducer, arguments).await.expect("a call");
        open += 1;
        if open == WINDOW {
            link.confirm().await.expect("an answer").expect("success");
            open -= 1;
        }
    }
    for _ in 0..open {
        link.confirm().await.expect("an answer").expect("success");
    }
    link.close().await;
}
