//! Exported files: named and written; and read back, checked against their manifest, and row by row.

use std::io::{BufRead as _, BufReader, Cursor};
use std::path::Path;

use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::config::Format;
use crate::database::cell::Cell;
use crate::database::shape::Field;
use crate::export::manifest::{Content, ExportFile, Series};
use crate::export::names::Folders;
use crate::export::spool::{Finished, SpoolError};
use crate::export::{ExportError, columnar, ndjson};
use crate::ids::ContentHash;
use crate::repository::{Repository, RepositoryError, paths};

/// Rows that are read at once.
const PIECE: usize = 1_000;

/// The file of a part in one format, before its bytes are known.
pub(super) fn file(
    repository: &Repository,
    series: &Series<'_>,
    (content, names): (&Content, &Folders),
    part: &Finished,
    format: Format,
) -> ExportFile {
    let mut folders = format!("{}={}", names.date, part.date);
    if let Content::Capture { captured, .. } = content {
        folders += &format!("/{}={captured:020}", names.captured);
    }
    let sealed = if repository.keys.seals() { ".age" } else { "" };
    let name = format!("{:020}-{:020}.{}{sealed}", part.first, part.last, format.suffix());
    let key = paths::export_file(&series.database, format.name(), &series.name(), &folders, &name);
    ExportFile {
        object: key.to_string(),
        format,
        date: part.date,
        first: part.first,
        last: part.last,
        rows: part.rows,
        bytes: 0,
        hash: ContentHash::of(&[]),
    }
}

/// Writes a finished file, over what a broken export may have left under its name, and notes its bytes.
pub(super) async fn upload(repository: &Repository, file: &mut ExportFile, path: &Path) -> Result<(), ExportError> {
    let bytes = tokio::fs::read(path).await;
    let bytes = bytes.map_err(|source| SpoolError::File { path: path.display().to_string(), source })?;
    let bytes = Bytes::from(repository.keys.seal(bytes).map_err(RepositoryError::from)?);
    (file.bytes, file.hash) = (bytes.len() as u64, ContentHash::of(&bytes));
    let key = file.object.as_str().into();
    match repository.put(&key, bytes.clone()).await {
        Err(RepositoryError::Conflict { .. }) => {
            repository.delete(&key).await?;
            Ok(repository.put(&key, bytes).await?)
        }
        result => Ok(result?),
    }
}

/// Fetches a file's object and checks it.
///
/// # Errors
/// When it is missing or damaged, or the store fails.
pub async fn fetch(repository: &Repository, file: &ExportFile) -> Result<Bytes, RepositoryError> {
    let key = file.object.as_str().into();
    let bytes = repository.get(&key).await?;
    if bytes.len() as u64 != file.bytes || ContentHash::of(&bytes) != file.hash {
        return Err(RepositoryError::damaged(&key, "it is not what its manifest says"));
    }
    if !file.object.ends_with(".age") {
        return Ok(bytes);
    }
    Ok(repository.keys.open(&bytes)?.into())
}

/// Proves that a file is in the repository as it was written. A sealed one is not opened: no key is needed for that.
pub(super) async fn read_back(repository: &Repository, file: &ExportFile) -> Result<(), ExportError> {
    let failed = |reason: String| ExportError::ReadBack { object: file.object.clone(), reason };
    let bytes = repository.get(&file.object.as_str().into()).await.map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 != file.bytes || ContentHash::of(&bytes) != file.hash {
        return Err(failed("its bytes differ".into()));
    }
    Ok(())
}

/// Gives the rows of a fetched file to `each`, in order, a piece at a time. Blocks.
///
/// # Errors
/// What about the file is not understood, or what `each` says.
pub fn rows(
    file: &ExportFile,
    columns: &[Field],
    bytes: Bytes,
    mut each: impl FnMut(Vec<Vec<Cell>>) -> Result<(), String>,
) -> Result<(), String> {
    let mut count = 0;
    let mut give = |rows: Vec<Vec<Cell>>| {
        count += rows.len() as u64;
        each(rows)
    };
    match file.format {
        Format::Ndjson => {
            let decoder = zstd::Decoder::new(Cursor::new(bytes)).map_err(|error| error.to_string())?;
            let mut reader = BufReader::new(decoder);
            let (mut line, mut piece) = (Vec::new(), Vec::new());
            loop {
                line.clear();
                if reader.read_until(b'\n', &mut line).map_err(|error| error.to_string())? == 0 {
                    break;
                }
                piece.push(ndjson::read_row(columns, &line)?);
                if piece.len() == PIECE {
                    give(std::mem::take(&mut piece))?;
                }
            }
            give(piece)?;
        }
        Format::Parquet => {
            let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|error| error.to_string())?;
            let reader = reader.with_batch_size(PIECE).build().map_err(|error| error.to_string())?;
            for batch in reader {
                give(columnar::rows(columns, &batch.map_err(|error| error.to_string())?)?)?;
            }
        }
    }
    if count == file.rows { Ok(()) } else { Err(format!("it holds {count} rows and not {}", file.rows)) }
}
