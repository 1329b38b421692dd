//! Rows on their way into files: written beside each other in every format, cut where a date or a size ends.
//!
//! Invariants: files are on disk, not in memory; the same rows are always cut at the same places.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use jiff::civil::Date;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::config::Format;
use crate::database::cell::Cell;
use crate::database::shape::Field;
use crate::export::{columnar, ndjson};
use crate::scratch::Scratch;

/// A file ends when its rows as text are longer.
pub const FILE_BYTES: u64 = 32 << 20;
/// A group of rows within a Parquet file: what is in memory while it is made.
const GROUP_BYTES: usize = 4 << 20;
/// Rows that become columns at once, for the same reason.
const CHUNK_BYTES: usize = 1 << 20;

/// What can go wrong while files are made.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("write exported rows to {path}: {source}; make room there, or set TMPDIR")]
    File { path: String, source: std::io::Error },
    #[error("write exported rows as Parquet: {0}")]
    Parquet(#[from] parquet::errors::ParquetError),
    #[error("make columns of exported rows: {0}")]
    Arrow(#[from] arrow_schema::ArrowError),
}

/// How files are made.
#[derive(Debug, Clone)]
pub struct Layout {
    pub columns: Vec<Field>,
    pub formats: Vec<Format>,
    pub rows_per_file: u64,
    /// Of the rows as text.
    pub bytes_per_file: u64,
    /// zstd, of both formats.
    pub level: i32,
}

/// Rows of one date in one file for each format.
#[derive(Debug)]
pub struct Finished {
    pub date: Date,
    pub first: u64,
    pub last: u64,
    pub rows: u64,
    pub files: Vec<(Format, PathBuf)>,
}

/// Files that are being made.
pub struct Spool {
    layout: Layout,
    schema: Arc<arrow_schema::Schema>,
    dir: Scratch,
    finished: Vec<Finished>,
    open: Option<Open>,
    rows: u64,
    text_bytes: u64,
}

struct Open {
    date: Date,
    first: u64,
    last: u64,
    rows: u64,
    text_bytes: u64,
    text: Option<(PathBuf, zstd::Encoder<'static, BufWriter<File>>)>,
    columns: Option<(PathBuf, ArrowWriter<File>)>,
    /// Rows that are not columns yet.
    waiting: Vec<Vec<Cell>>,
    waiting_bytes: usize,
}

impl Spool {
    /// # Errors
    /// When there is no room for files.
    pub fn new(layout: Layout) -> Result<Self, SpoolError> {
        let temporary = std::env::temp_dir();
        let dir = Scratch::create_in(&temporary, "inner-universe-export-");
        let dir = dir.map_err(|source| SpoolError::File { path: temporary.display().to_string(), source })?;
        let schema = Arc::new(columnar::schema(&layout.columns));
        Ok(Self { layout, schema, dir, finished: Vec::new(), open: None, rows: 0, text_bytes: 0 })
    }

    /// Rows taken so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// How long they are as text.
    pub fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    /// Adds a row; numbers only rise. `line` is the row as text.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(&mut self, date: Date, number: u64, row: Vec<Cell>, line: &[u8]) -> Result<(), SpoolError> {
        let full =
            |open: &Open| open.rows >= self.layout.rows_per_file || open.text_bytes >= self.layout.bytes_per_file;
        if self.open.as_ref().is_some_and(|open| open.date != date || full(open)) {
            self.cut()?;
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.begin(date, number)?,
        };
        self.rows += 1;
        self.text_bytes += line.len() as u64;
        open.rows += 1;
        open.last = number;
        open.text_bytes += line.len() as u64;
        if let Some((path, encoder)) = &mut open.text {
            encoder.write_all(line).map_err(|source| at(path, source))?;
        }
        if open.columns.is_some() {
            open.waiting.push(row);
            open.waiting_bytes += line.len();
            if open.waiting_bytes >= CHUNK_BYTES {
                open.write_columns(&self.schema, &self.layout.columns)?;
            }
        }
        self.open = Some(open);
        Ok(())
    }

    /// Ends the open file, and gives all that were finished. The files live as long as the spool.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn finish(&mut self) -> Result<Vec<Finished>, SpoolError> {
        self.cut()?;
        Ok(std::mem::take(&mut self.finished))
    }

    fn begin(&self, date: Date, number: u64) -> Result<Open, SpoolError> {
        let path = |suffix: &str| self.dir.path().join(format!("{number:020}.{suffix}"));
        let create = |path: &PathBuf| File::create(path).map_err(|source| at(path, source));
        let mut open = Open {
            date,
            first: number,
            last: number,
            rows: 0,
            text_bytes: 0,
            text: None,
            columns: None,
            waiting: Vec::new(),
            waiting_bytes: 0,
        };
        for format in &self.layout.formats {
            let path = path(format.suffix());
            let file = create(&path)?;
            match format {
                Format::Ndjson => {
                    let encoder = zstd::Encoder::new(BufWriter::new(file), self.layout.level);
                    let mut encoder = encoder.map_err(|source| at(&path, source))?;
                    encoder.include_checksum(true).map_err(|source| at(&path, source))?;
                    open.text = Some((path, encoder));
                }
                Format::Parquet => {
                    let properties = WriterProperties::builder()
                        .set_compression(Compression::ZSTD(ZstdLevel::try_new(self.layout.level)?))
                        .set_created_by(format!("inner-universe {}", env!("CARGO_PKG_VERSION")))
                        .build();
                    open.columns =
                        Some((path, ArrowWriter::try_new(file, Arc::clone(&self.schema), Some(properties))?));
                }
            }
        }
        Ok(open)
    }

    fn cut(&mut self) -> Result<(), SpoolError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        open.write_columns(&self.schema, &self.layout.columns)?;
        let mut files = Vec::new();
        if let Some((path, encoder)) = open.text {
            let flushed = encoder.finish().and_then(|mut file| file.flush());
            flushed.map_err(|source| at(&path, source))?;
            files.push((Format::Ndjson, path));
        }
        if let Some((path, writer)) = open.columns {
            writer.close()?;
            files.push((Format::Parquet, path));
        }
        let (date, first, last, rows) = (open.date, open.first, open.last, open.rows);
        self.finished.push(Finished { date, first, last, rows, files });
        Ok(())
    }
}

impl Open {
    fn write_columns(&mut self, schema: &Arc<arrow_schema::Schema>, columns: &[Field]) -> Result<(), SpoolError> {
        let Some((_, writer)) = &mut self.columns else { return Ok(()) };
        if !self.waiting.is_empty() {
            writer.write(&columnar::batch(schema, columns, &self.waiting)?)?;
            self.waiting.clear();
            self.waiting_bytes = 0;
            if writer.in_progress_size() >= GROUP_BYTES {
                writer.flush()?;
            }
        }
        Ok(())
    }
}

fn at(path: &std::path::Path, source: std::io::Error) -> SpoolError {
    SpoolError::File { path: path.display().to_string(), source }
}

/// A row as a line of text.
pub fn line_of(columns: &[Field], row: &[Cell]) -> Vec<u8> {
    let mut line = Vec::with_capacity(512);
    ndjson::write_row(columns, row, &mut line);
    line
}
