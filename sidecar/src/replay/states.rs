//! Entities and relations as they were: folded from their versions.

use std::collections::BTreeMap;

use crate::database::cell::Cell;
use crate::database::shape::{Field, Shape};
use crate::export::ndjson;
use crate::replay::Until;

/// What versions leave.
#[derive(Default)]
pub struct States {
    alive: BTreeMap<(String, String), State>,
}

struct State {
    subject_type: Cell,
    ends: Option<(Cell, Cell)>,
    data: Cell,
    version: Cell,
    created_at: Cell,
    updated_at: Cell,
    updated_by: Cell,
}

type Made = (Vec<Field>, Vec<Vec<Cell>>);

impl States {
    /// Takes rows of `state_version` in order, and leaves of them those up to `until`.
    pub fn take(&mut self, rows: &mut Vec<Vec<Cell>>, columns: &[Field], until: Until) -> Result<(), String> {
        let place = |name: &str| {
            columns.iter().position(|column| column.name == name).ok_or_else(|| format!("it has no column `{name}`"))
        };
        let (id, time) = (place("version_id")?, place("timestamp")?);
        rows.retain(|row| match (until, &row[id], &row[time]) {
            (Until::Version(last), Cell::Int(version), _) => *version <= i128::from(last),
            (Until::Time(last), _, Cell::Int(time)) => *time <= i128::from(last.as_microsecond()),
            _ => false,
        });
        let [subject, subject_id, subject_type] = [place("subject")?, place("subject_id")?, place("subject_type")?];
        let [from, to, version] = [place("from_entity")?, place("to_entity")?, place("version")?];
        let [operation, data, by] = [place("operation")?, place("data")?, place("changed_by")?];
        for row in rows.iter() {
            let text = |index: usize| ndjson::text(&columns[index].shape, &row[index]).unwrap_or_default();
            let key = (text(subject), text(subject_id));
            if text(operation) == "Delete" {
                self.alive.remove(&key);
                continue;
            }
            let ends = match (&row[from], &row[to]) {
                (Cell::Some(from), Cell::Some(to)) => Some(((**from).clone(), (**to).clone())),
                _ => None,
            };
            let created_at = self.alive.get(&key).map_or_else(|| row[time].clone(), |before| before.created_at.clone());
            let state = State {
                subject_type: row[subject_type].clone(),
                ends,
                data: row[data].clone(),
                version: row[version].clone(),
                created_at,
                updated_at: row[time].clone(),
                updated_by: row[by].clone(),
            };
            self.alive.insert(key, state);
        }
        Ok(())
    }

    pub fn entities(&self) -> Made {
        let columns = columns(&["entity_id"], "entity_type");
        let rows = self.of("Entity").map(|(id, state)| state.row(vec![id, state.subject_type.clone()]));
        (columns, rows.collect())
    }

    pub fn relations(&self) -> Made {
        let columns = columns(&["relation_id", "from_entity", "to_entity"], "relation_type");
        let rows = self.of("Relation").filter_map(|(id, state)| {
            let (from, to) = state.ends.clone()?;
            Some(state.row(vec![id, from, to, state.subject_type.clone()]))
        });
        (columns, rows.collect())
    }

    fn of(&self, subject: &str) -> impl Iterator<Item = (Cell, &State)> {
        let found = self.alive.iter().filter(move |((of, _), _)| of == subject);
        found.map(|((_, id), state)| (Cell::Text(id.as_str().into()), state))
    }
}

impl State {
    fn row(&self, mut start: Vec<Cell>) -> Vec<Cell> {
        start.extend(
            [&self.data, &self.version, &self.created_at, &self.updated_at, &self.updated_by].map(Clone::clone),
        );
        start
    }
}

fn columns(texts: &[&str], kind: &str) -> Vec<Field> {
    let field = |name: &str, shape| Field { name: name.into(), shape };
    let mut columns: Vec<_> = texts.iter().map(|name| field(name, Shape::String)).collect();
    columns.extend([
        field(kind, Shape::String),
        field("data", Shape::String),
        field("version", Shape::U64),
        field("created_at", Shape::Timestamp),
        field("updated_at", Shape::Timestamp),
        field("updated_by", Shape::Identity),
    ]);
    columns
}
