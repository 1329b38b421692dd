//! Rows of a live table, in the order of their numbers, a bounded piece at a time.

use bytes::Bytes;

use crate::database::cell::{self, Cell};
use crate::database::link::{Link, LinkError};
use crate::database::schema::Table;
use crate::export::ExportError;

/// What one read should bring.
const READ_BYTES: usize = 4 << 20;
const WIDEST: u64 = 20_000;
/// Numbers from row to row, from which on a table is taken for one with gaps all over.
const FAR: u64 = 8;
/// Rows that one read of a table with text keys should bring.
const TEXT_ROWS: usize = 2_000;

/// Where the reading of a table is.
pub struct Rows {
    next: u64,
    last: u64,
    /// Numbers that one read asks for.
    width: u64,
    done: bool,
}

/// Rows with their numbers.
pub type Numbered = Vec<(u64, Vec<Cell>)>;

impl Rows {
    /// Those from `first` to `last`, both ends included.
    pub fn between(first: u64, last: u64) -> Self {
        Self { next: first, last, width: 500, done: first > last }
    }

    /// The next rows; none at the end of the table, or of the range.
    ///
    /// # Errors
    /// When the server cannot be asked, or a row is not understood.
    pub async fn next(&mut self, link: &mut Link, table: &Table) -> Result<Numbered, ExportError> {
        while !self.done {
            let last = self.next.saturating_add(self.width - 1).min(self.last);
            let key = table.sequence_column().unwrap_or_default();
            let condition = format!("{key} >= {} AND {key} <= {last}", self.next);
            let rows = match link.query(&format!("SELECT * FROM {} WHERE {condition}", table.name)).await {
                Ok(rows) => rows,
                Err(LinkError::TooLarge) if last > self.next => {
                    self.width = ((last - self.next) / 8).max(1);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let bytes: usize = rows.iter().map(Bytes::len).sum();
            let (count, span) = (rows.len() as u64, last - self.next);
            let complete = count > span;
            let read = sorted(rows, table).await?;
            if last == self.last {
                self.done = true;
            } else if complete {
                self.next = last + 1;
            } else {
                // The end, or a gap. Rows may have come meanwhile: the look begins behind the last row that was read.
                let from = read.last().map_or(self.next, |(number, _)| number + 1);
                match first_from(link, table, from).await? {
                    Some(next) if next <= self.last => self.next = next,
                    _ => self.done = true,
                }
            }
            if count > 0 {
                self.width = wider(self.width, Read { count, bytes: bytes as u64, span });
                return Ok(read);
            }
        }
        Ok(Vec::new())
    }
}

/// What a read has brought.
struct Read {
    count: u64,
    bytes: u64,
    /// The numbers that it asked for, less one.
    span: u64,
}

/// How many numbers to ask for next. Where they lie far apart, a range of as many numbers as rows would bring hardly any, and
/// each gap has to be searched for its end.
fn wider(width: u64, read: Read) -> u64 {
    let fitting = (READ_BYTES as u64 * read.count / read.bytes.max(1)).clamp(1, WIDEST);
    let apart = (read.span / read.count).max(1);
    let growth = if apart < FAR { 4 } else { 64 };
    fitting.saturating_mul(apart).min(width.saturating_mul(growth))
}

/// The lowest number of a row that is at least `from`.
///
/// # Errors
/// When the server cannot be asked.
pub async fn first_from(link: &Link, table: &Table, from: u64) -> Result<Option<u64>, ExportError> {
    let key = table.sequence_column().unwrap_or_default();
    Ok(link.database().first_number(&table.name, key, from).await?)
}

/// The row with a number.
///
/// # Errors
/// When the server cannot be asked, or the row is not understood.
pub async fn at(link: &mut Link, table: &Table, number: u64) -> Result<Option<Vec<Cell>>, ExportError> {
    let key = table.sequence_column().unwrap_or_default();
    let rows = link.query(&format!("SELECT * FROM {} WHERE {key} = {number}", table.name)).await?;
    Ok(sorted(rows, table).await?.pop().map(|(_, row)| row))
}

/// Every row of a table, a bounded piece at a time, in an order that depends on the rows alone.
pub enum Whole {
    Numbers(Rows),
    Texts(Texts),
    /// A table without a key to read it by: all of it in one answer.
    Once,
    Done,
}

impl Whole {
    /// # Errors
    /// When the server cannot be asked for the keys.
    pub async fn of(link: &Link, table: &Table) -> Result<Self, ExportError> {
        Ok(match (table.sequence, table.text_key()) {
            (Some(_), _) => Self::Numbers(Rows::between(0, u64::MAX)),
            (None, Some(_)) => Self::Texts(Texts::all(link, table).await?),
            (None, None) => Self::Once,
        })
    }

    /// The next rows; none at the end.
    ///
    /// # Errors
    /// When the server cannot be asked, a row is not understood, or an answer is too large.
    pub async fn next(&mut self, link: &mut Link, table: &Table) -> Result<Vec<Vec<Cell>>, ExportError> {
        match self {
            Self::Numbers(rows) => Ok(rows.next(link, table).await?.into_iter().map(|(_, row)| row).collect()),
            Self::Texts(texts) => texts.next(link, table).await,
            Self::Once => {
                *self = Self::Done;
                once(link, table).await
            }
            Self::Done => Ok(Vec::new()),
        }
    }
}

/// Every row of a table that is not read in ranges, in the order of their bytes.
async fn once(link: &mut Link, table: &Table) -> Result<Vec<Vec<Cell>>, ExportError> {
    let mut rows = match link.query(&format!("SELECT * FROM {}", table.name)).await {
        Err(LinkError::TooLarge) => return Err(ExportError::TooLarge { table: table.name.clone() }),
        rows => rows?,
    };
    rows.sort();
    rows.iter().map(|row| decode(table, row)).collect()
}

/// Rows of a table whose primary key is text, in the order of their keys.
pub struct Texts {
    /// What is left to read, the first range last.
    ranges: Vec<TextRange>,
}

/// Keys from `low`, by its comparison, up to and including `through`.
#[derive(Debug, Clone, Default)]
struct TextRange {
    low: Option<(&'static str, String)>,
    through: Option<String>,
}

impl Texts {
    /// All of a table. Its keys, and nothing else, are in memory for a moment.
    async fn all(link: &Link, table: &Table) -> Result<Self, ExportError> {
        let mut keys = keys(link, table, &TextRange::default()).await?;
        keys.sort_unstable();
        let cuts = keys.iter().skip(TEXT_ROWS).step_by(TEXT_ROWS).map(ToString::to_string);
        let mut ranges = Vec::new();
        let mut low = None;
        for through in cuts.map(Some).chain([None]) {
            ranges.push(TextRange { low: low.take(), through: through.clone() });
            low = through.map(|through| (">", through));
        }
        ranges.reverse();
        Ok(Self { ranges })
    }

    /// Those from `first` to `last`, both ends included.
    pub fn between(first: &str, last: &str) -> Self {
        Self { ranges: vec![TextRange { low: Some((">=", first.to_owned())), through: Some(last.to_owned()) }] }
    }

    /// The next rows; none at the end.
    ///
    /// # Errors
    /// When the server cannot be asked, a row is not understood, or one row alone is too large.
    pub async fn next(&mut self, link: &mut Link, table: &Table) -> Result<Vec<Vec<Cell>>, ExportError> {
        while let Some(range) = self.ranges.pop() {
            let condition = range.condition(table);
            let rows = match link.query(&format!("SELECT * FROM {}{condition}", table.name)).await {
                Ok(rows) => rows,
                Err(LinkError::TooLarge) => {
                    let mut keys = keys(link, table, &range).await?;
                    keys.sort_unstable();
                    if keys.len() < 2 {
                        return Err(ExportError::TooLarge { table: table.name.clone() });
                    }
                    let middle = keys.swap_remove((keys.len() - 1) / 2).to_string();
                    self.ranges.push(TextRange { low: Some((">", middle.clone())), through: range.through });
                    self.ranges.push(TextRange { low: range.low, through: Some(middle) });
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if rows.is_empty() {
                continue;
            }
            let table = table.clone();
            let decoding = tokio::task::spawn_blocking(move || {
                let key = table.text_key().unwrap_or_default();
                let mut rows = rows.iter().map(|row| decode(&table, row)).collect::<Result<Vec<_>, _>>()?;
                rows.sort_by(|a, b| text_of(a, key).cmp(&text_of(b, key)));
                Ok(rows)
            });
            return decoding.await.map_err(|error| ExportError::Worker(error.to_string()))?;
        }
        Ok(Vec::new())
    }
}

impl TextRange {
    fn condition(&self, table: &Table) -> String {
        let name = table.text_key().map_or("", |key| table.columns[key].name.as_str());
        let low = self.low.iter().map(|(sign, text)| (*sign, text));
        let bounds = low.chain(self.through.iter().map(|text| ("<=", text)));
        let bounds: Vec<_> =
            bounds.map(|(sign, text)| format!("{name} {sign} '{}'", text.replace('\'', "''"))).collect();
        if bounds.is_empty() { String::new() } else { format!(" WHERE {}", bounds.join(" AND ")) }
    }
}

async fn keys(link: &Link, table: &Table, range: &TextRange) -> Result<Vec<Box<str>>, ExportError> {
    let name = table.text_key().map_or("", |key| table.columns[key].name.as_str());
    let statement = format!("SELECT {name} FROM {}{}", table.name, range.condition(table));
    Ok(link.database().texts(statement).await?)
}

/// The text in a column of a row.
pub fn text_of(row: &[Cell], column: usize) -> Option<&str> {
    match row.get(column) {
        Some(Cell::Text(text)) => Some(text),
        _ => None,
    }
}

async fn sorted(rows: Vec<Bytes>, table: &Table) -> Result<Numbered, ExportError> {
    let table = table.clone();
    // Thousands of rows take a moment that others should not have to wait for.
    let decoding = tokio::task::spawn_blocking(move || {
        let index = table.sequence.unwrap_or_default();
        let numbered = |row: &Bytes| {
            let row = decode(&table, row)?;
            Ok((row.get(index).and_then(Cell::as_u64).unwrap_or_default(), row))
        };
        let mut rows: Numbered = rows.iter().map(numbered).collect::<Result<_, ExportError>>()?;
        rows.sort_by_key(|(number, _)| *number);
        Ok(rows)
    });
    decoding.await.map_err(|error| ExportError::Worker(error.to_string()))?
}

fn decode(table: &Table, row: &[u8]) -> Result<Vec<Cell>, ExportError> {
    cell::decode_row(&table.columns, row)
        .map_err(|error| ExportError::Row { table: table.name.clone(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_with_what_fits_and_with_what_lies_between_rows() {
        let read = |count, bytes, span| Read { count, bytes, span };
        assert_eq!(wider(500, read(500, 50_000, 499)), 2_000, "dense: four times as many");
        assert_eq!(wider(16_000, read(16_000, 1_600_000, 15_999)), WIDEST, "and no more rows than that");
        assert_eq!(wider(500, read(500, 8 << 20, 499)), 250, "large rows");
        // One row each million: after few reads a range brings as many rows as elsewhere.
        let (mut width, mut reads) = (500, 0);
        while width < 1_000_000 * 1_000 {
            let count = (width / 1_000_000).max(1);
            width = wider(width, read(count, count * 100, width - 1));
            reads += 1;
        }
        assert!(reads <= 4, "{reads} reads");
        assert_eq!(wider(u64::MAX, read(1, 100, u64::MAX)), u64::MAX);
    }
}
