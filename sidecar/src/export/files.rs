//! Exported files, read back: checked against their manifest, and row by row.

use std::io::{BufRead as _, BufReader, Cursor};

use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::config::Format;
use crate::database::cell::Cell;
use crate::database::shape::Field;
use crate::export::manifest::ExportFile;
use crate::export::{ExportError, columnar, ndjson};
use crate::ids::ContentHash;
use crate::repository::{Repository, RepositoryError};

/// Rows that are read at once.
const PIECE: usize = 1_000;

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
