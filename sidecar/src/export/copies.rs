//! Copies: the rows of earlier steps in a format that those steps lack, so that each format holds every row.
//!
//! Invariants: a copy holds the rows of one step, cut at the same places, in one format; its names follow from the step's
//! manifest alone. So an interrupted copy is written again under the same names and needs no plan, and a glob over
//! the files of a format finds every row once.

use crate::config::Format;
use crate::database::cell::{Cell, convert_row};
use crate::database::schema::Table;
use crate::database::shape::Field;
use crate::export::archive::ArchiveError;
use crate::export::files::{file, upload};
use crate::export::manifest::{Content, ExportFile, ExportManifest, Names, Series};
use crate::export::rows::Rows;
use crate::export::spool::{Layout, Spool, SpoolError, line_of};
use crate::export::{ExportError, Exporter, Step, TableReport, files};
use crate::ids::ContentHash;
use crate::repository::{Repository, paths};

impl Exporter<'_> {
    /// Copies what was exported of a table that only grows into the formats of this export that lack it.
    pub(super) async fn complete(
        &mut self,
        table: &Table,
        mut report: TableReport,
    ) -> Result<TableReport, ExportError> {
        let newest = Series::newest(self.repository, self.database, &table.name).await?;
        for number in 1..=newest.number {
            let series = Series { number, ..newest };
            let Some(behind) = Behind::of(self.repository, &series, &self.options.formats).await? else { continue };
            for (numbers, formats) in &behind.steps {
                let manifest = series.read(self.repository, &series.step_key(*numbers)).await?;
                if matches!(manifest.content, Content::Capture { .. }) {
                    break;
                }
                for format in formats.iter().filter(|format| !manifest.holds(**format)) {
                    let files = self.copy(&series, table, &manifest, *format).await?;
                    report.add(&files);
                }
            }
            behind.done(self.repository, &series, &self.options.formats).await?;
        }
        Ok(report)
    }

    /// Writes the rows of a step in a format that it lacks.
    async fn copy(
        &mut self,
        series: &Series<'_>,
        table: &Table,
        step: &ExportManifest,
        format: Format,
    ) -> Result<Vec<ExportFile>, ExportError> {
        let held = step.files.first().map(|file| file.format);
        let mut copied = Vec::new();
        for source in step.files.iter().filter(|file| Some(file.format) == held) {
            let layout = Layout {
                columns: step.columns.clone(),
                formats: vec![format],
                rows_per_file: u64::MAX,
                bytes_per_file: u64::MAX,
                level: self.config.repository.compression_level,
            };
            let spool = Spool::new(layout)?;
            let sealed = source.object.ends_with(".age") && !self.repository.keys.can_open();
            let spool = match sealed {
                false => read_file(self.repository, step, source, spool).await?,
                true => self.read_database(table, step, source, spool, format).await?,
            };
            let finished = Step::of(spool, source.first, source.last, ContentHash::of(&[])).await?;
            for part in &finished.finished {
                let mut file = file(self.repository, series, (&step.content, &step.folders), part, format);
                for (_, path) in &part.files {
                    upload(self.repository, &mut file, path).await?;
                }
                copied.push(file);
            }
        }
        let manifest = ExportManifest { files: copied.clone(), exported_at: self.clock.now(), ..step.clone() };
        let key = series.copy_key(step.content.numbers(), format);
        self.repository.put_document(&key, &manifest).await?;
        Ok(copied)
    }

    /// Reads a file's rows from the database, where the file is encrypted and its key is elsewhere.
    async fn read_database(
        &mut self,
        table: &Table,
        step: &ExportManifest,
        source: &ExportFile,
        mut spool: Spool,
        format: Format,
    ) -> Result<Spool, ExportError> {
        let (first, last) = (source.first, source.last);
        let changed = || ExportError::NotToBeCopied { table: table.name.clone(), first, last, format };
        let mut rows = Rows::between(first, last);
        let (mut hash, hashing) = (ContentHash::of(&[]), self.repository.hashing()?);
        loop {
            let read = rows.next(&mut self.link, table).await?;
            if read.is_empty() {
                break;
            }
            for (number, row) in read {
                let row = convert_row(row, &table.columns, &step.columns).map_err(|_| changed())?;
                let line = line_of(&step.columns, &row);
                hash = hashing.name_of(&line);
                spool.push(source.date, number, row, &line)?;
            }
        }
        let (_, end) = step.content.numbers();
        let ends_elsewhere =
            matches!(&step.content, Content::Range { last_row, .. } if last == end && hash != *last_row);
        if spool.rows() != source.rows || ends_elsewhere { Err(changed()) } else { Ok(spool) }
    }
}

/// What formats lack of a series.
struct Behind {
    /// The numbers of steps, and the formats that may lack them.
    steps: Vec<((u64, u64), Vec<Format>)>,
    end: u64,
}

impl Behind {
    /// `None` when every one of `formats` is known to hold all of the series.
    async fn of(repository: &Repository, series: &Series<'_>, formats: &[Format]) -> Result<Option<Self>, ExportError> {
        let names = series.names(repository).await?;
        let Some((_, end)) = names.steps.last().and_then(paths::parse_export_manifest) else { return Ok(None) };
        let positions = series.positions(repository).await?;
        if formats.iter().all(|format| positions.reach(*format, end)) {
            return Ok(None);
        }
        let Names { steps, copies } = names;
        let lack = |numbers: (u64, u64)| {
            let lacks =
                |format: &&Format| !positions.reach(**format, numbers.1) && !copies.contains(&(numbers, **format));
            (numbers, formats.iter().filter(lacks).copied().collect::<Vec<_>>())
        };
        let steps = steps.iter().filter_map(paths::parse_export_manifest).map(lack);
        let steps = steps.filter(|(_, formats)| !formats.is_empty()).collect();
        Ok(Some(Self { steps, end }))
    }

    /// Notes that `formats` hold all of the series.
    async fn done(&self, repository: &Repository, series: &Series<'_>, formats: &[Format]) -> Result<(), ExportError> {
        let mut positions = series.positions(repository).await?;
        positions.through.extend(formats.iter().map(|format| (format.name().to_owned(), self.end)));
        Ok(series.note_positions(repository, &positions).await?)
    }
}

/// Reads a file's rows from the repository.
async fn read_file(
    repository: &Repository,
    step: &ExportManifest,
    source: &ExportFile,
    mut spool: Spool,
) -> Result<Spool, ExportError> {
    let bytes = files::fetch(repository, source).await?;
    let Content::Range { key, .. } = &step.content else { return Ok(spool) };
    let (file, columns, key) = (source.clone(), step.columns.clone(), key.clone());
    let reading = tokio::task::spawn_blocking(move || {
        let key = columns.iter().position(|column| column.name == key);
        let write =
            |rows: Vec<Vec<Cell>>| write(&mut spool, &file, &columns, key, rows).map_err(|error| error.to_string());
        files::rows(&file, &columns, bytes, write)
            .map(|()| spool)
            .map_err(|reason| ArchiveError::File { object: file.object, reason })
    });
    Ok(reading.await.map_err(|error| ExportError::Worker(error.to_string()))??)
}

fn write(
    spool: &mut Spool,
    file: &ExportFile,
    columns: &[Field],
    key: Option<usize>,
    rows: Vec<Vec<Cell>>,
) -> Result<(), SpoolError> {
    for row in rows {
        let number = key.and_then(|key| row.get(key)?.as_u64()).unwrap_or_default();
        let line = line_of(columns, &row);
        spool.push(file.date, number, row, &line)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::export::fixture::{DATABASE, exporter, repository, row, rows_by_archive, rows_by_glob, table};
    use crate::repository::crypto::Keyring;

    const BOTH: [Format; 2] = [Format::Ndjson, Format::Parquet];

    fn report() -> TableReport {
        let (table, series) = ("event_log".to_owned(), "event_log".to_owned());
        TableReport { table, series, rows: 0, objects: 0, bytes: 0, through: None }
    }

    #[tokio::test]
    async fn each_format_has_its_own_position() {
        let (repository, config) = (repository(Keyring::default()).await, Config::default());
        let numbers = [2, 4, 5, 7, 8].map(|number| (number, "a"));
        exporter(&repository, &config, &[Format::Ndjson]).commit_rows(&numbers).await;
        let mut parquet = exporter(&repository, &config, &[Format::Parquet]);
        let report_of = |report: TableReport| (report.rows, report.objects);
        assert_eq!(report_of(parquet.complete(&table(&[]), report()).await.expect("a copy")), (5, 3));
        assert_eq!(report_of(parquet.complete(&table(&[]), report()).await.expect("no copy")), (0, 0));
        // On in one format alone, and the other follows.
        parquet.commit_rows(&[(9, "b"), (10, "b")]).await;
        let mut both = exporter(&repository, &config, &BOTH);
        assert_eq!(report_of(both.complete(&table(&[]), report()).await.expect("a copy")), (2, 2));
        both.commit_rows(&[(11, "c")]).await;
        assert_eq!(report_of(both.complete(&table(&[]), report()).await.expect("no copy")), (0, 0));
        let texts = [(2, "a"), (4, "a"), (5, "a"), (7, "a"), (8, "a"), (9, "b"), (10, "b"), (11, "c")];
        let rows: Vec<_> = texts.iter().map(|(number, text)| row(*number, text)).collect();
        for format in BOTH {
            assert_eq!(rows_by_archive(&repository, Some(format)).await, rows, "{format:?}");
            let once = texts.iter().map(|(number, _)| (*number, 1)).collect();
            assert_eq!(rows_by_glob(&repository, format).await, once, "{format:?}");
        }
        assert_eq!(rows_by_archive(&repository, None).await, rows);
    }

    #[tokio::test]
    async fn a_copy_that_was_killed_is_finished() {
        let (repository, config) = (repository(Keyring::default()).await, Config::default());
        exporter(&repository, &config, &[Format::Ndjson]).commit_rows(&[(1, "a"), (2, "a"), (3, "a")]).await;
        let mut parquet = exporter(&repository, &config, &[Format::Parquet]);
        parquet.complete(&table(&[]), report()).await.expect("a copy");
        let series = Series { database: DATABASE, table: "event_log", number: 1 };
        // As after a kill: files of other bytes, one of them missing, and nothing that says so.
        let files =
            repository.list(&format!("databases/{DATABASE}/exports/parquet").as_str().into()).await.expect("files");
        repository.delete(&files[0].0).await.expect("delete");
        repository.delete(&files[1].0).await.expect("delete");
        repository.put(&files[1].0, "half of a file".into()).await.expect("put");
        repository.delete(&series.copy_key((1, 3), Format::Parquet)).await.expect("delete");
        repository.delete(&paths::export_positions(&DATABASE, "event_log")).await.expect("delete");
        let again = parquet.complete(&table(&[]), report()).await.expect("a copy");
        assert_eq!((again.rows, again.objects), (3, 3));
        let once = [1, 2, 3].into_iter().map(|number| (number, 1)).collect();
        assert_eq!(rows_by_glob(&repository, Format::Parquet).await, once);
    }

    #[tokio::test]
    async fn encrypted_rows_are_copied_with_their_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let identity = age::x25519::Identity::generate();
        let file = dir.path().join("identity");
        let text = age::secrecy::ExposeSecret::expose_secret(&identity.to_string()).to_owned();
        std::fs::write(&file, text).expect("write");
        let recipients = [identity.to_public().to_string()];
        let config = Config::default();
        let mut repository = repository(Keyring::new(&recipients, &[file]).expect("keys")).await;
        exporter(&repository, &config, &[Format::Ndjson]).commit_rows(&[(1, "a"), (2, "a")]).await;
        let mut parquet = exporter(&repository, &config, &[Format::Parquet]);
        assert_eq!(parquet.complete(&table(&[]), report()).await.expect("a copy").rows, 2);
        assert_eq!(rows_by_archive(&repository, Some(Format::Parquet)).await, [row(1, "a"), row(2, "a")]);
        // Without the key the database is asked, which nothing is here.
        let mut ndjson = exporter(&repository, &config, &[Format::Parquet]);
        ndjson.commit_rows(&[(3, "b")]).await;
        repository.keys = Keyring::new(&recipients, &[]).expect("keys");
        let refused = exporter(&repository, &config, &[Format::Ndjson]).complete(&table(&[]), report()).await;
        assert!(matches!(refused, Err(ExportError::Link(_))), "{refused:?}");
    }
}
