//! Names as query engines read them: without regard to case, and folders `NAME=VALUE` as columns that hide those in files.
//!
//! Invariant: a new series has folders that no column of its table is named like, and no two columns that differ by case
//! alone.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::database::schema::Table;
use crate::database::shape::{Field, Shape, tag_of};
use crate::export::manifest::{Content, ExportManifest};
use crate::export::{ExportError, Exporter};

/// The names of the folders that files are in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folders {
    pub date: String,
    /// Of captures only.
    pub captured: String,
}

impl Default for Folders {
    /// As they always were before a table could have others.
    fn default() -> Self {
        Self { date: "date".into(), captured: "captured".into() }
    }
}

impl Folders {
    /// Names that none of the columns has.
    pub fn beside(columns: &[Field]) -> Self {
        let usual = Self::default();
        Self { date: free(columns, &usual.date), captured: free(columns, &usual.captured) }
    }

    pub fn are_usual(&self) -> bool {
        *self == Self::default()
    }

    /// The column that a folder hides, if there is one.
    pub fn hidden<'c>(&self, columns: &'c [Field], are_captured: bool) -> Option<&'c Field> {
        let hides = |folder: &str, column: &Field| alike(folder, &column.name);
        columns.iter().find(|column| hides(&self.date, column) || are_captured && hides(&self.captured, column))
    }
}

fn free(columns: &[Field], usual: &str) -> String {
    let others = (2..).map(|n| format!("export_{usual}_{n}"));
    let mut names = [usual.to_owned(), format!("export_{usual}")].into_iter().chain(others);
    let is_free = |name: &String| !columns.iter().any(|column| alike(name, &column.name));
    names.find(is_free).unwrap_or_default()
}

fn alike(one: &str, other: &str) -> bool {
    one.to_lowercase() == other.to_lowercase()
}

impl Exporter<'_> {
    /// Why a new series is needed where a folder has the name of a column. A series that always was so continues with a
    /// warning, until a new one is asked for.
    pub(super) fn hidden_column(&self, last: &ExportManifest, table: &Table) -> Option<String> {
        let captured = matches!(last.content, Content::Capture { .. });
        let column = &last.folders.hidden(&table.columns, captured)?.name;
        let reason = format!("query engines read the folder `{column}=` in place of its column `{column}`");
        let is_new = !last.columns.iter().any(|known| known.name == *column);
        if is_new || self.options.new_series {
            return Some(reason);
        }
        tracing::warn!(
            event = "export_column_hidden",
            table = table.name,
            column,
            "query engines read a folder's value in place of this column; a new series (--new-series) has another folder"
        );
        None
    }
}

/// Refuses a new series whose columns query engines would take for one another.
pub(super) fn check_names(table: &Table) -> Result<(), ExportError> {
    let Some((one, other)) = differ_by_case(&table.columns) else { return Ok(()) };
    let reason =
        format!("`{one}` and `{other}` differ by case alone, and query engines take them for one; rename one of them");
    Err(ExportError::NotExportable { table: table.name.clone(), reason })
}

/// Two columns, or members of one, that differ by case alone.
fn differ_by_case(columns: &[Field]) -> Option<(String, String)> {
    let names = columns.iter().map(|column| column.name.as_str());
    pair(names).or_else(|| columns.iter().find_map(|column| within(&column.shape)))
}

fn within(shape: &Shape) -> Option<(String, String)> {
    match shape {
        Shape::Option(of) | Shape::List(of) => within(of),
        Shape::Struct(parts) => differ_by_case(parts),
        Shape::Sum(variants) => {
            let carrying = || variants.iter().filter(|variant| variant.shape != Shape::Unit);
            let names = std::iter::once(tag_of(variants)).chain(carrying().map(|variant| variant.name.as_str()));
            pair(names).or_else(|| carrying().find_map(|variant| within(&variant.shape)))
        }
        _ => None,
    }
}

fn pair<'n>(names: impl Iterator<Item = &'n str>) -> Option<(String, String)> {
    let mut seen = HashMap::new();
    for name in names {
        if let Some(other) = seen.insert(name.to_lowercase(), name) {
            return Some((other.to_owned(), name.to_owned()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(names: &[&str]) -> Vec<Field> {
        names.iter().map(|name| Field { name: (*name).into(), shape: Shape::String }).collect()
    }

    #[test]
    fn folders_have_names_of_no_column() {
        assert!(Folders::beside(&columns(&["id", "dated"])).are_usual());
        let found = Folders::beside(&columns(&["Date", "export_date", "EXPORT_DATE_2", "captured"]));
        assert_eq!((found.date.as_str(), found.captured.as_str()), ("export_date_3", "export_captured"));
        let hidden = |names: &[&str], are_captured| {
            Folders::default().hidden(&columns(names), are_captured).map(|column| column.name.clone())
        };
        assert_eq!(hidden(&["id", "DATE"], false), Some("DATE".into()));
        assert_eq!((hidden(&["captured"], false), hidden(&["captured"], true)), (None, Some("captured".into())));
    }

    #[test]
    fn names_that_differ_by_case_are_found_at_any_depth() {
        let both = Some(("Name".to_owned(), "name".to_owned()));
        assert_eq!(differ_by_case(&columns(&["Name", "id", "name"])), both);
        assert_eq!(differ_by_case(&columns(&["name", "names"])), None);
        let deep = Shape::List(Box::new(Shape::Option(Box::new(Shape::Struct(columns(&["Name", "name"]))))));
        assert_eq!(differ_by_case(&[Field { name: "a".into(), shape: deep }]), both);
        let sum = Shape::Sum(columns(&["Tag", "Other"]));
        assert_eq!(differ_by_case(&[Field { name: "a".into(), shape: sum }]), Some(("tag".into(), "Tag".into())));
    }
}
