//! The tables and reducers of a module, from the server's description.

use std::collections::{BTreeMap, BTreeSet};

use crate::database::description::{Description, TableDescription};
use crate::database::shape::{Field, Shape};

/// A table that can be exported.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    pub name: String,
    pub columns: Vec<Field>,
    /// The first column of unique `u64`, by which rows are read in ranges.
    pub sequence: Option<usize>,
    pub primary_key: Option<usize>,
    /// Only the owner may read it.
    pub private: bool,
    /// Its rows are in the log only.
    pub is_event: bool,
}

impl Table {
    /// The primary key, where it is text and no unique `u64` is there to read rows in ranges.
    pub fn text_key(&self) -> Option<usize> {
        self.primary_key.filter(|key| self.sequence.is_none() && self.columns[*key].shape == Shape::String)
    }

    pub fn sequence_column(&self) -> Option<&str> {
        self.sequence.map(|index| self.columns[index].name.as_str())
    }
}

/// What a module declares.
#[derive(Debug, Default)]
pub struct Schema {
    tables: BTreeMap<String, Result<Table, String>>,
    reducers: BTreeMap<String, Result<Vec<Field>, String>>,
    views: BTreeSet<String>,
}

impl Schema {
    /// `None` when the module has no such table.
    pub fn table(&self, name: &str) -> Option<Result<&Table, &str>> {
        self.tables.get(name).map(|table| table.as_ref().map_err(String::as_str))
    }

    /// Is this a view, whose rows the module computes?
    pub fn is_view(&self, name: &str) -> bool {
        self.views.contains(name)
    }

    pub fn table_names(&self) -> impl Iterator<Item = &str> {
        self.tables.keys().map(String::as_str)
    }

    /// Is it the bundled module, or one made of it? A module of somebody else's may have some of its names, not all.
    pub fn is_bundled(&self) -> bool {
        let tables = ["admin", "config", "event_log", "member", "sequence_counter", "system_status"];
        let reducers = ["add_member", "get_system_status", "grant_admin", "record_event", "set_config"];
        tables.iter().all(|name| self.tables.contains_key(*name))
            && reducers.iter().all(|name| self.reducers.contains_key(*name))
    }

    /// The parameters of a reducer; `None` when the module has no such one.
    pub fn reducer(&self, name: &str) -> Option<Result<&[Field], &str>> {
        self.reducers.get(name).map(|parameters| parameters.as_deref().map_err(String::as_str))
    }
}

impl From<Description> for Schema {
    fn from(module: Description) -> Self {
        let tables = module.tables.into_iter().map(|(name, table)| (name.clone(), Table::of(name, table))).collect();
        Self { tables, reducers: module.reducers, views: module.views }
    }
}

impl Table {
    fn of(name: String, described: TableDescription) -> Result<Self, String> {
        let columns = described.columns?;
        let unique = described.unique.iter().filter_map(|columns| match columns[..] {
            [column] => Some(column),
            _ => None,
        });
        let sequence =
            unique.filter(|column| columns.get(*column).is_some_and(|column| column.shape == Shape::U64)).min();
        let TableDescription { primary_key, private, is_event, .. } = described;
        Ok(Self { name, columns, sequence, primary_key, private, is_event })
    }
}
