//! Figures of several rounds, and the table that they become.

use std::fmt::Write as _;

use crate::bench::report::Spread;
use crate::measure::{Measured, median};

/// The same work by ours and by another, round by round.
pub struct Row {
    pub work: String,
    pub peer: String,
    pub ours: Series,
    pub theirs: Series,
    /// What it must reach, where the project has said so.
    pub wanted: Option<f64>,
}

#[derive(Debug, Default, Clone)]
pub struct Series {
    rounds: Vec<Measured>,
    bytes: u64,
}

impl Series {
    pub fn add(&mut self, measured: Measured, bytes: u64) {
        self.rounds.push(measured);
        self.bytes = bytes;
    }

    fn median(&self, of: impl Fn(&Measured) -> f64) -> f64 {
        median(&self.rounds.iter().map(of).collect::<Vec<_>>())
    }

    fn peak(&self) -> f64 {
        self.rounds.iter().map(|round| round.peak_mib).fold(0.0, f64::max)
    }
}

#[derive(Default)]
pub struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// The row of some work against a peer.
    ///
    /// # Panics
    /// Never: it is made where it is missing.
    pub fn row(&mut self, work: &str, peer: &str, wanted: Option<f64>) -> &mut Row {
        let found = self.rows.iter().position(|row| row.work == work && row.peer == peer);
        let at = found.unwrap_or_else(|| {
            let (ours, theirs) = (Series::default(), Series::default());
            self.rows.push(Row { work: work.into(), peer: peer.into(), ours, theirs, wanted });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Above 1, ours is faster: the ratio of each round, their middle and their spread.
    pub fn text(&self) -> String {
        let mut text = String::from(
            "| work | against | ratio | spread | on the disk | must reach | ours | theirs | CPU s | memory MiB | bytes |\n\
             |---|---|---|---|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let pairs = || row.ours.rounds.iter().zip(&row.theirs.rounds);
            let ratio = Spread::of(pairs().map(|(ours, theirs)| theirs.seconds / ours.seconds));
            let on_disk: Vec<_> =
                pairs().filter_map(|(ours, theirs)| Some(theirs.synced_seconds? / ours.seconds)).collect();
            let on_disk = match on_disk.as_slice() {
                [] => "-".to_owned(),
                ratios => {
                    let Spread { middle, least, most } = Spread::of(ratios.iter().copied());
                    format!("{middle:.2} ({least:.2} to {most:.2})")
                }
            };
            let bytes = match row.theirs.bytes {
                0 => "-".to_owned(),
                theirs => format!("{:.3}", row.ours.bytes as f64 / theirs as f64),
            };
            let _ = writeln!(
                text,
                "| {} | {} | {:.2} | {:.2} to {:.2} | {on_disk} | {} | {:.2} s | {:.2} s | {:.1} / {:.1} | {:.0} / {:.0} | {bytes} |",
                row.work,
                row.peer,
                ratio.middle,
                ratio.least,
                ratio.most,
                row.wanted.map_or("-".into(), |wanted| wanted.to_string()),
                row.ours.median(|round| round.seconds),
                row.theirs.median(|round| round.seconds),
                row.ours.median(|round| round.cpu_seconds),
                row.theirs.median(|round| round.cpu_seconds),
                row.ours.peak(),
                row.theirs.peak(),
            );
        }
        text
    }
}
