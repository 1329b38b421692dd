//! The tables and reducers of a module, from the server's description.

use std::collections::BTreeMap;

use spacetimedb_lib::db::raw_def::v9::{RawConstraintDataV9, RawModuleDefV9, RawTableDefV9, TableAccess};
use spacetimedb_sats::AlgebraicType;
use spacetimedb_sats::serde::SerdeWrapper;

use crate::database::shape::{self, Field, Shape};

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
}

impl Schema {
    /// # Errors
    /// When the text is no description of a module.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let SerdeWrapper(module): SerdeWrapper<RawModuleDefV9> =
            serde_json::from_slice(json).map_err(|error| format!("the module's schema: {error}"))?;
        let tables = module.tables.iter().map(|raw| (raw.name.to_string(), table(raw, &module))).collect();
        let parameters = |params| shape::fields(params, &module.typespace);
        let reducers = module.reducers.iter().map(|raw| (raw.name.to_string(), parameters(&raw.params))).collect();
        Ok(Self { tables, reducers })
    }

    /// `None` when the module has no such table.
    pub fn table(&self, name: &str) -> Option<Result<&Table, &str>> {
        self.tables.get(name).map(|table| table.as_ref().map_err(String::as_str))
    }

    pub fn table_names(&self) -> impl Iterator<Item = &str> {
        self.tables.keys().map(String::as_str)
    }

    /// The parameters of a reducer; `None` when the module has no such one.
    pub fn reducer(&self, name: &str) -> Option<Result<&[Field], &str>> {
        self.reducers.get(name).map(|parameters| parameters.as_deref().map_err(String::as_str))
    }
}

fn table(raw: &RawTableDefV9, module: &RawModuleDefV9) -> Result<Table, String> {
    let Some(AlgebraicType::Product(row)) = module.typespace.get(raw.product_type_ref) else {
        return Err("its rows are not described".into());
    };
    let columns = shape::fields(row, &module.typespace)?;
    let unique = raw.constraints.iter().filter_map(|constraint| match &constraint.data {
        RawConstraintDataV9::Unique(unique) => unique.columns.as_singleton(),
        _ => None,
    });
    let unique = unique.map(|column| usize::from(column.0));
    let sequence = unique.filter(|column| columns.get(*column).is_some_and(|column| column.shape == Shape::U64)).min();
    let primary_key = raw.primary_key.as_singleton().map(|column| usize::from(column.0));
    let private = matches!(raw.table_access, TableAccess::Private);
    Ok(Table { name: raw.name.to_string(), columns, sequence, primary_key, private })
}
