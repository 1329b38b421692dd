//! What becomes of an exported row: compared with the row that the module has in its place.

use std::collections::BTreeMap;

use crate::database::cell::{self, Cell};
use crate::database::link::Link;
use crate::database::schema::{Schema, Table};
use crate::database::shape::Field;
use crate::export::ndjson;
use crate::export::rows::{self, Rows, Texts, Whole};
use crate::replay::ReplayError;

/// Which of two rows in one place wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The one that is there; another in its place is refused.
    Keep,
    /// The one with the higher `version`.
    Newer,
    /// The exported one.
    Overwrite,
}

/// What becomes of a row.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    Apply,
    Skip,
    Refuse(String),
}

/// The rows that a module has, as far as they matter.
pub struct Decider {
    policy: Policy,
    /// By the binary form of the primary key.
    here: BTreeMap<Vec<u8>, Vec<Cell>>,
    key: usize,
    /// Are there rows at all?
    empty: bool,
    /// All rows are in `here`.
    complete: bool,
}

impl Decider {
    pub async fn new(link: &mut Link, table: &Table, policy: Policy, cleared: bool) -> Result<Self, ReplayError> {
        let count = link.database().count(&table.name).await.map_err(crate::database::link::LinkError::from)?;
        let Some(key) = table.primary_key.or(table.sequence) else {
            let reason = "it has no primary key, so no row is known again".into();
            return Err(ReplayError::Columns { table: table.name.clone(), reason });
        };
        let empty = cleared || count == 0;
        let mut decider = Self { policy, here: BTreeMap::new(), key, empty, complete: false };
        let in_ranges = table.sequence == Some(key) || table.text_key() == Some(key);
        if !empty && !in_ranges {
            decider.read(link, table, Whole::of(link, table).await?).await?;
            decider.complete = true;
        }
        Ok(decider)
    }

    /// Does [`Self::look_up`] ask the module?
    pub fn asks(&self) -> bool {
        !self.empty && !self.complete
    }

    /// Reads what the module has in the places of some rows.
    pub async fn look_up<'r>(
        &mut self,
        link: &mut Link,
        table: &Table,
        rows: impl Iterator<Item = &'r [Cell]>,
    ) -> Result<(), ReplayError> {
        if !self.asks() {
            return Ok(());
        }
        self.here.clear();
        let key = self.key;
        let reading = if table.text_key() == Some(key) {
            let texts = rows.filter_map(|row| rows::text_of(row, key));
            let ends = texts.fold(None, |ends, text| match ends {
                None => Some((text, text)),
                Some((first, last)) => Some((text.min(first), text.max(last))),
            });
            ends.map(|(first, last)| Whole::Texts(Texts::between(first, last)))
        } else {
            let numbers = rows.filter_map(|row| row.get(key)?.as_u64());
            let (first, last) = numbers.fold((u64::MAX, 0), |(first, last), n| (first.min(n), last.max(n)));
            (first <= last).then(|| Whole::Numbers(Rows::between(first, last)))
        };
        match reading {
            Some(reading) => self.read(link, table, reading).await,
            None => Ok(()),
        }
    }

    async fn read(&mut self, link: &mut Link, table: &Table, mut reading: Whole) -> Result<(), ReplayError> {
        loop {
            let found = reading.next(link, table).await?;
            if found.is_empty() {
                return Ok(());
            }
            for row in found {
                self.add(table, row);
            }
        }
    }

    fn add(&mut self, table: &Table, row: Vec<Cell>) {
        let key = self.key_of(table, &row);
        self.here.insert(key, row);
    }

    fn key_of(&self, table: &Table, row: &[Cell]) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A row that has no such column has no key either, and then nothing is like it.
        let _ = cell::encode_row(&table.columns[self.key..=self.key], &row[self.key..=self.key], &mut bytes);
        bytes
    }

    /// `row` is in the module's columns; `exported` are those that the export knows.
    pub fn decide(&mut self, table: &Table, exported: &[Field], row: &[Cell]) -> Decision {
        let Some(here) = self.here.get(&self.key_of(table, row)) else { return Decision::Apply };
        let known = |column: &Field| exported.iter().any(|exported| exported.name == column.name);
        let mut pairs = table.columns.iter().zip(here.iter().zip(row)).filter(|(column, _)| known(column));
        if pairs.all(|(_, (here, row))| here == row) {
            return Decision::Skip;
        }
        let index = |name: &str| table.columns.iter().position(|column| column.name == name);
        match self.policy {
            Policy::Overwrite => Decision::Apply,
            Policy::Newer => {
                let version = |row: &[Cell]| index("version").and_then(|index| row.get(index)?.as_u64());
                if version(here) >= version(row) { Decision::Skip } else { Decision::Apply }
            }
            Policy::Keep => {
                let id = index("event_id");
                if id.is_some_and(|id| here.get(id) == row.get(id)) {
                    return Decision::Skip;
                }
                let text = name_of(&table.columns[self.key..=self.key], &row[self.key..=self.key]);
                Decision::Refuse(format!("another row has {text} here; replay into a fresh module"))
            }
        }
    }
}

/// How a row is told from others: its first column.
pub fn name_of(columns: &[Field], row: &[Cell]) -> String {
    let mut text = Vec::new();
    if let (Some(column), Some(cell)) = (columns.first(), row.first()) {
        ndjson::write_row(std::slice::from_ref(column), std::slice::from_ref(cell), &mut text);
    }
    String::from_utf8_lossy(&text).trim_end().trim_matches(['{', '}']).chars().take(200).collect()
}

/// Will `begin_import` clear the event log? As the module decides it.
pub async fn would_clear(link: &mut Link, schema: &Schema) -> Result<bool, ReplayError> {
    const OWN: &[&str] = &include!("../../../module/src/own_events.in");
    for name in ["import_run", "entity", "relation", "state_version", "metric"] {
        if link.database().count(name).await.map_err(crate::database::link::LinkError::from)? > 0 {
            return Ok(false);
        }
    }
    let Some(Ok(events)) = schema.table("event_log") else { return Ok(false) };
    let index = events.columns.iter().position(|column| column.name == "event_type").unwrap_or_default();
    let mut reading = Rows::between(0, u64::MAX);
    loop {
        let read = reading.next(link, events).await?;
        let own = |row: &[Cell]| matches!(row.get(index), Some(Cell::Text(name)) if OWN.contains(&&**name));
        if !read.iter().all(|(_, row)| own(row)) {
            return Ok(false);
        }
        if read.is_empty() {
            return Ok(true);
        }
    }
}
