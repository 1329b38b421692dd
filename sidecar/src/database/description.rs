//! A module's description: of version 9 or 10, as a server serves it or as its `extract-schema` prints it.
//!
//! Invariants: what a later release adds is never an error; its name is kept in [`Description::unknown`]. A part that is
//! known and not as expected is an error that names it. Names are those by which SQL and calls know a thing.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use spacetimedb_lib::db::raw_def::v9::RawModuleDefV9;
use spacetimedb_sats::serde::SerdeWrapper;
use spacetimedb_sats::typespace::Typespace;
use spacetimedb_sats::{AlgebraicType, AlgebraicTypeRef, ProductType};

use crate::database::shape::{self, Field};

/// No module nests submodules deeper.
const DEEPEST: usize = 16;

/// What a module declares.
#[derive(Debug, Clone, Default)]
pub struct Description {
    pub tables: BTreeMap<String, TableDescription>,
    /// Parameters by the reducer's name, or why they cannot be read.
    pub reducers: BTreeMap<String, Result<Vec<Field>, String>>,
    pub procedures: BTreeSet<String>,
    pub views: BTreeSet<String>,
    /// Functions of the module that answer HTTP requests.
    pub http_handlers: BTreeSet<String>,
    /// Namespaces of submodules. Their tables and functions are called `namespace.name`.
    pub submodules: BTreeSet<String>,
    /// Names of parts that are not known here.
    pub unknown: BTreeSet<String>,
    /// As the 1.2.0 family has it, where it can express all of it: for its migration rules.
    pub version_9: Option<Box<RawModuleDefV9>>,
}

/// A table of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableDescription {
    /// Or why its rows cannot be read.
    pub columns: Result<Vec<Field>, String>,
    pub primary_key: Option<usize>,
    /// Columns that are unique together.
    pub unique: BTreeSet<Vec<usize>>,
    /// Algorithms and columns, as the server writes them.
    pub indexes: BTreeSet<String>,
    /// Columns that count by themselves.
    pub sequences: BTreeSet<usize>,
    /// The function that its rows call at their times.
    pub schedule: Option<String>,
    /// Only the owner may read it.
    pub private: bool,
    /// Its rows are in the log only: no table holds them.
    pub is_event: bool,
}

impl Description {
    /// # Errors
    /// When the text does not describe a module, or is of a version before 9.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(json).map_err(|error| format!("the module's schema: {error}"))?;
        Self::of(value).map_err(|reason| format!("the module's schema: {reason}"))
    }

    fn of(value: Value) -> Result<Self, String> {
        let Value::Object(mut parts) = value else { return Err("it is not a JSON object".into()) };
        let mut of_version = |name: &str| parts.remove(name);
        if let Some(module) = of_version("V9") {
            return version_9(module);
        }
        if let Some(module) = of_version("V10") {
            return version_10(module);
        }
        if of_version("V8BackCompat").is_some() {
            return Err("it is of version 8; build the module with spacetimedb 1.0 or later".into());
        }
        match parts.contains_key("sections") {
            true => version_10(Value::Object(parts)),
            false => version_9(Value::Object(parts)),
        }
    }

    /// How the tables of `other`, which a server has, differ from these, in words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let names: BTreeSet<_> = self.tables.keys().chain(other.tables.keys()).collect();
        for name in names {
            match (self.tables.get(name), other.tables.get(name)) {
                (Some(ours), Some(theirs)) => {
                    found.extend(
                        ours.differences(theirs).into_iter().map(|part| format!("table {name}: another {part}")),
                    );
                }
                (Some(_), None) => found.push(format!("table {name} is missing")),
                (None, _) => found.push(format!("table {name} is not in the module")),
            }
        }
        found
    }
}

impl TableDescription {
    fn differences(&self, other: &Self) -> Vec<&'static str> {
        let parts = [
            ("set of columns", self.columns == other.columns),
            ("primary key", self.primary_key == other.primary_key),
            ("set of unique constraints", self.unique == other.unique),
            ("set of indexes", self.indexes == other.indexes),
            ("set of sequences", self.sequences == other.sequences),
            ("schedule", self.schedule == other.schedule),
            ("access", self.private == other.private),
            ("kind", self.is_event == other.is_event),
        ];
        parts.into_iter().filter(|(_, is_same)| !is_same).map(|(part, _)| part).collect()
    }
}

/// Of version 9, an element of a sum type is an object of one member, and an option one of `some` or `none`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Maybe<T> {
    Some(T),
    None(#[allow(dead_code, reason = "an empty list")] Value),
}

impl<T> Maybe<T> {
    fn into_option(self) -> Option<T> {
        match self {
            Self::Some(value) => Some(value),
            Self::None(_) => None,
        }
    }
}

/// A table, in the parts that both versions share.
#[derive(Deserialize)]
struct RawTable {
    #[serde(alias = "source_name")]
    name: String,
    product_type_ref: u32,
    primary_key: Vec<usize>,
    indexes: Vec<RawIndex>,
    constraints: Vec<RawConstraint>,
    sequences: Vec<RawSequence>,
    schedule: Option<Maybe<RawSchedule>>,
    table_access: Value,
    #[serde(default)]
    is_event: bool,
}

#[derive(Deserialize)]
struct RawIndex {
    algorithm: Value,
}

#[derive(Deserialize)]
struct RawConstraint {
    data: Value,
}

#[derive(Deserialize)]
struct RawSequence {
    column: usize,
}

#[derive(Deserialize)]
struct RawSchedule {
    reducer_name: String,
}

#[derive(Deserialize)]
struct RawReducer {
    #[serde(alias = "source_name")]
    name: String,
    params: SerdeWrapper<ProductType>,
}

/// What has a name, and for the rest is of no use here.
#[derive(Deserialize)]
struct Named {
    #[serde(alias = "source_name")]
    name: String,
}

impl RawTable {
    fn describe(self, types: &Typespace) -> TableDescription {
        let columns = match types.get(AlgebraicTypeRef(self.product_type_ref)) {
            Some(AlgebraicType::Product(row)) => shape::fields(row, types),
            _ => Err("its rows are not described".into()),
        };
        let columns_of = |constraint: &RawConstraint| {
            let columns = constraint.data.get("Unique")?.get("columns")?.as_array()?;
            columns.iter().map(|column| usize::try_from(column.as_u64()?).ok()).collect::<Option<Vec<_>>>()
        };
        TableDescription {
            columns,
            primary_key: match self.primary_key[..] {
                [column] => Some(column),
                _ => None,
            },
            unique: self.constraints.iter().filter_map(columns_of).collect(),
            indexes: self.indexes.iter().map(|index| index.algorithm.to_string()).collect(),
            sequences: self.sequences.iter().map(|sequence| sequence.column).collect(),
            schedule: self.schedule.and_then(Maybe::into_option).map(|schedule| schedule.reducer_name),
            private: self.table_access.get("Private").is_some(),
            is_event: self.is_event,
        }
    }
}

fn part<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| format!("its {name}: {error}"))
}

/// The one member of a variant: its name, and what it carries.
fn variant(value: Value) -> Option<(String, Value)> {
    match value {
        Value::Object(members) if members.len() == 1 => members.into_iter().next(),
        _ => None,
    }
}

fn version_9(module: Value) -> Result<Description, String> {
    #[derive(Deserialize)]
    struct Raw {
        typespace: SerdeWrapper<Typespace>,
        tables: Vec<RawTable>,
        reducers: Vec<RawReducer>,
        #[serde(default)]
        misc_exports: Vec<Value>,
    }
    // The 1.2.0 family knows no miscellaneous exports, and compares only what stands beside them.
    let mut plain = module.clone();
    if let Some(exports) = plain.get_mut("misc_exports") {
        *exports = Value::Array(Vec::new());
    }
    let version_9 = serde_json::from_value::<SerdeWrapper<RawModuleDefV9>>(plain).ok().map(|raw| Box::new(raw.0));
    let Raw { typespace, tables, reducers, misc_exports } = part("parts", module)?;
    let types = typespace.0;
    let mut description = Description { version_9, ..Description::default() };
    for table in tables {
        description.tables.insert(table.name.clone(), table.describe(&types));
    }
    for reducer in reducers {
        description.reducers.insert(reducer.name, shape::fields(&reducer.params.0, &types));
    }
    for export in misc_exports {
        let Some((kind, export)) = variant(export) else { continue };
        match kind.as_str() {
            "Procedure" => drop(description.procedures.insert(part::<Named>("procedures", export)?.name)),
            "View" => drop(description.views.insert(part::<Named>("views", export)?.name)),
            // A value for rows that were there before the column.
            "ColumnDefaultValue" => description.version_9 = None,
            _ => {
                description.version_9 = None;
                description.unknown.insert(kind);
            }
        }
    }
    Ok(description)
}

fn version_10(module: Value) -> Result<Description, String> {
    let mut description = Description::default();
    read_10(&mut description, "", module, 0)?;
    Ok(description)
}

/// What a section of version 10 says of a name: the one in the module's source, and the one that the server goes by.
#[derive(Deserialize)]
struct Naming {
    source_name: String,
    canonical_name: String,
}

/// Names that differ from those in the module's source.
#[derive(Default)]
struct Names {
    tables: BTreeMap<String, String>,
    functions: BTreeMap<String, String>,
    prefix: String,
}

impl Names {
    fn add(&mut self, section: Value) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Explicit {
            entries: Vec<Value>,
        }
        for entry in part::<Explicit>("ExplicitNames", section)?.entries {
            let Some((kind, naming)) = variant(entry) else { continue };
            let names = match kind.as_str() {
                "Table" => &mut self.tables,
                "Function" => &mut self.functions,
                _ => continue,
            };
            let Naming { source_name, canonical_name } = part("ExplicitNames", naming)?;
            names.insert(source_name, canonical_name);
        }
        Ok(())
    }

    fn called(&self, names: &BTreeMap<String, String>, source: &str) -> String {
        format!("{}{}", self.prefix, names.get(source).map_or(source, String::as_str))
    }

    fn table(&self, source: &str) -> String {
        self.called(&self.tables, source)
    }

    fn function(&self, source: &str) -> String {
        self.called(&self.functions, source)
    }
}

fn read_10(description: &mut Description, prefix: &str, module: Value, depth: usize) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Raw {
        sections: Vec<Value>,
    }
    #[derive(Deserialize)]
    struct Schedule {
        table_name: String,
        function_name: String,
    }
    #[derive(Deserialize)]
    struct Submodule {
        namespace: String,
        module: Value,
    }
    if depth > DEEPEST {
        return Err("its submodules nest too deep".into());
    }
    let sections = part::<Raw>("sections", module)?.sections;
    let mut by_kind: BTreeMap<String, Value> = sections.into_iter().filter_map(variant).collect();
    let mut take = |kind: &str| by_kind.remove(kind);
    let types = match take("Typespace") {
        Some(section) => part::<SerdeWrapper<Typespace>>("Typespace", section)?.0,
        None => Typespace::default(),
    };
    let mut names = Names { prefix: prefix.to_owned(), ..Names::default() };
    if let Some(section) = take("ExplicitNames") {
        names.add(section)?;
    }
    fn listed<T: DeserializeOwned>(kind: &str, section: Option<Value>) -> Result<Vec<T>, String> {
        section.map_or_else(|| Ok(Vec::new()), |section| part(kind, section))
    }
    for table in listed::<RawTable>("Tables", take("Tables"))? {
        description.tables.insert(names.table(&table.name), table.describe(&types));
    }
    for reducer in listed::<RawReducer>("Reducers", take("Reducers"))? {
        let parameters = shape::fields(&reducer.params.0, &types);
        description.reducers.insert(names.function(&reducer.name), parameters);
    }
    for schedule in listed::<Schedule>("Schedules", take("Schedules"))? {
        if let Some(table) = description.tables.get_mut(&names.table(&schedule.table_name)) {
            table.schedule = Some(names.function(&schedule.function_name));
        }
    }
    let functions = [
        ("Procedures", &mut description.procedures),
        ("Views", &mut description.views),
        ("HttpHandlers", &mut description.http_handlers),
    ];
    for (kind, into) in functions {
        into.extend(listed::<Named>(kind, take(kind))?.iter().map(|named| names.function(&named.name)));
    }
    let submodules = listed::<Submodule>("Submodules", take("Submodules"))?;
    // Of no use here.
    for kind in
        ["Types", "LifeCycleReducers", "RowLevelSecurity", "CaseConversionPolicy", "HttpRoutes", "ViewPrimaryKeys"]
    {
        take(kind);
    }
    description.unknown.extend(by_kind.into_keys());
    for submodule in submodules {
        let namespace = format!("{prefix}{}", submodule.namespace);
        read_10(description, &format!("{namespace}."), submodule.module, depth + 1)?;
        description.submodules.insert(namespace);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
