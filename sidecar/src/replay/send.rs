//! Batches of rows as reducer calls, several on their way at once, in order.

use std::collections::VecDeque;

use crate::database::link::Link;
use crate::replay::{ReplayError, TableReplay};

const BATCH_ROWS: usize = 1_000;
const BATCH_BYTES: usize = 1 << 20;
/// Batches that were sent and not confirmed.
const ON_THE_WAY: usize = 4;

type Row = (String, Vec<u8>);

/// Sends rows to one reducer.
pub struct Sender {
    reducer: String,
    batch: Vec<Row>,
    bytes: usize,
    sent: VecDeque<Vec<Row>>,
}

impl Sender {
    pub fn new(reducer: &str) -> Self {
        Self { reducer: reducer.to_owned(), batch: Vec::new(), bytes: 0, sent: VecDeque::new() }
    }

    /// Takes a row in binary form; `name` tells it from others.
    pub async fn push(
        &mut self,
        link: &mut Link,
        name: String,
        row: Vec<u8>,
        report: &mut TableReplay,
    ) -> Result<(), ReplayError> {
        self.bytes += row.len();
        self.batch.push((name, row));
        if self.batch.len() >= BATCH_ROWS || self.bytes >= BATCH_BYTES {
            self.send(link).await?;
        }
        while self.sent.len() > ON_THE_WAY {
            self.confirm(link, report).await?;
        }
        Ok(())
    }

    /// Sends what is left and waits for everything.
    pub async fn finish(&mut self, link: &mut Link, report: &mut TableReplay) -> Result<(), ReplayError> {
        if !self.batch.is_empty() {
            self.send(link).await?;
        }
        while !self.sent.is_empty() {
            self.confirm(link, report).await?;
        }
        Ok(())
    }

    async fn send(&mut self, link: &mut Link) -> Result<(), ReplayError> {
        self.bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        link.call(&self.reducer, arguments(&batch)).await?;
        self.sent.push_back(batch);
        Ok(())
    }

    async fn confirm(&mut self, link: &mut Link, report: &mut TableReplay) -> Result<(), ReplayError> {
        let said = link.confirm().await?;
        let Some(batch) = self.sent.pop_front() else { return Ok(()) };
        if said.is_ok() {
            report.applied += batch.len() as u64;
            return Ok(());
        }
        // Those behind it were sent already: first their answers, then the rows of this one by themselves.
        let mut failed = vec![batch];
        while let Some(batch) = self.sent.pop_front() {
            match link.confirm().await? {
                Ok(()) => report.applied += batch.len() as u64,
                Err(_) => failed.push(batch),
            }
        }
        for row in failed.into_iter().flatten() {
            link.call(&self.reducer, arguments(std::slice::from_ref(&row))).await?;
            match link.confirm().await? {
                Ok(()) => report.applied += 1,
                Err(said) => report.refuse(row.0, said),
            }
        }
        Ok(())
    }
}

/// One argument: the list of rows.
fn arguments(rows: &[Row]) -> Vec<u8> {
    let mut bytes = u32::try_from(rows.len()).unwrap_or_default().to_le_bytes().to_vec();
    rows.iter().for_each(|(_, row)| bytes.extend_from_slice(row));
    bytes
}
