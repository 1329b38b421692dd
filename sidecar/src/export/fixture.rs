//! What tests export: rows in memory, and an exporter that reaches no server.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::clock::SystemClock;
use crate::config::{Config, Format};
use crate::database::cell::Cell;
use crate::database::link::Link;
use crate::database::schema::Table;
use crate::database::shape::{Field, Shape};
use crate::export::archive::Archive;
use crate::export::manifest::{Content, Series};
use crate::export::spool::{Spool, line_of};
use crate::export::{Cursor, ExportOptions, Exporter, Step};
use crate::ids::{ContentHash, Identity};
use crate::repository::Repository;
use crate::repository::crypto::Keyring;
use crate::repository::store::Store;

pub const DATABASE: Identity = Identity([7; 32]);

pub async fn repository(keys: Keyring) -> Repository {
    let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
    Repository::open_or_create_in(store, "memory://", keys, &SystemClock).await.expect("a repository")
}

/// A table `event_log` of numbers and texts, by default; `names` are further columns of text.
pub fn table(names: &[&str]) -> Table {
    let column = |name: &str, shape: Shape| Field { name: name.into(), shape };
    let mut columns = vec![column("sequence", Shape::U64), column("event_id", Shape::String)];
    columns.extend(names.iter().map(|name| column(name, Shape::String)));
    Table {
        name: "event_log".into(),
        columns,
        sequence: Some(0),
        primary_key: Some(0),
        private: false,
        is_event: false,
    }
}

pub fn row(number: u64, text: &str) -> Vec<Cell> {
    vec![Cell::Int(number.into()), Cell::Text(text.into())]
}

pub fn exporter<'a>(repository: &'a Repository, config: &'a Config, formats: &[Format]) -> Exporter<'a> {
    let options = ExportOptions {
        tables: Vec::new(),
        configuration: false,
        formats: formats.to_vec(),
        new_series: false,
        since: None,
    };
    let link = Link::new(&config.spacetimedb_config, &config.server_config, "iu").expect("a link");
    Exporter { repository, config, options, clock: Arc::new(SystemClock), link, database: DATABASE }
}

impl Exporter<'_> {
    /// Exports one step of rows, of which the odd ones are of another day.
    pub async fn commit_rows(&mut self, rows: &[(u64, &str)]) {
        let table = table(&[]);
        let series = Series { database: DATABASE, table: "event_log", number: 1 };
        let mut spool = Spool::new(self.layout(&table.columns)).expect("a spool");
        let mut last_row = ContentHash::of(&[]);
        for (number, text) in rows {
            let row = row(*number, text);
            let line = line_of(&table.columns, &row);
            last_row = ContentHash::of(&line);
            let day = jiff::civil::date(2026, 5, if number % 2 == 0 { 1 } else { 2 });
            spool.push(day, *number, row, &line).expect("a row");
        }
        let (first, last) = (rows[0].0, rows[rows.len() - 1].0);
        let step = Step::of(spool, first, last, last_row).await.expect("a step");
        let content = Content::Range { key: "sequence".into(), first, last, last_row };
        let cursor = Cursor::first(&table, None, None);
        self.commit(&series, &table, &cursor, content, step, None).await.expect("a manifest");
    }
}

/// The rows in all files of a format, whatever manifests say, by number; and how often each is there.
pub async fn rows_by_glob(repository: &Repository, format: Format) -> BTreeMap<u64, usize> {
    let folder = format!("databases/{DATABASE}/exports/{}", format.name());
    let mut found = BTreeMap::new();
    for (key, _) in repository.list(&folder.as_str().into()).await.expect("files") {
        let bytes = repository.get(&key).await.expect("a file");
        let file = crate::export::ExportFile {
            object: key.to_string(),
            format,
            date: jiff::civil::date(2026, 5, 1),
            first: 0,
            last: 0,
            // Only what follows is asked of it.
            rows: u64::MAX,
            bytes: bytes.len() as u64,
            hash: ContentHash::of(&bytes),
        };
        let each = |rows: Vec<Vec<Cell>>| {
            rows.iter().filter_map(|row| row[0].as_u64()).for_each(|number| *found.entry(number).or_default() += 1);
            Ok(())
        };
        let _ = crate::export::files::rows(&file, &table(&[]).columns, bytes, each);
    }
    found
}

/// The rows that a replay of a format reads.
pub async fn rows_by_archive(repository: &Repository, format: Option<Format>) -> Vec<Vec<Cell>> {
    let archive = Archive::open(repository, Some(DATABASE), format).await.expect("an archive");
    let mut found = Vec::new();
    for part in archive.parts("event_log").await.expect("parts") {
        let mut pieces = archive.read(&part).await.expect("a part");
        while let Some(piece) = pieces.next().await.expect("rows") {
            found.extend(piece);
        }
    }
    found
}
