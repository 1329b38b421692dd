//! What the tests write: accounts whose balances always add up to the same sum, a journal without holes, and blobs.
//!
//! Every successful call of a public reducer adds exactly one journal row, so a state is a prefix of the history exactly
//! when its journal has no hole and the accounts add up.

use spacetimedb::sats::{i256, u256};
use spacetimedb::{
    ConnectionId, Identity, ReducerContext, SpacetimeType, Table, TimeDuration, Timestamp, reducer, table,
};

pub const ACCOUNTS: u64 = 16;
pub const BALANCE: i64 = 1000;

#[table(name = account, public)]
pub struct Account {
    #[primary_key]
    pub id: u64,
    pub balance: i64,
    /// Only grows.
    pub version: u64,
}

#[table(name = journal, public)]
pub struct Journal {
    #[primary_key]
    pub step: u64,
    pub what: String,
    pub at: Timestamp,
}

#[table(name = note, public)]
pub struct Note {
    #[primary_key]
    pub id: u64,
    pub text: String,
}

#[table(name = attachment, public)]
pub struct Attachment {
    #[primary_key]
    pub id: u64,
    pub bytes: Vec<u8>,
}

/// There only after the update.
#[cfg(feature = "v2")]
#[table(name = audit, public)]
pub struct Audit {
    #[primary_key]
    pub step: u64,
    pub comment: String,
}

#[reducer(init)]
pub fn init(ctx: &ReducerContext) {
    for id in 0..ACCOUNTS {
        ctx.db.account().insert(Account { id, balance: BALANCE, version: 0 });
    }
}

fn journal_step(ctx: &ReducerContext, what: String) -> u64 {
    let step = ctx.db.journal().count();
    ctx.db.journal().insert(Journal { step, what, at: ctx.timestamp });
    #[cfg(feature = "v2")]
    ctx.db.audit().insert(Audit { step, comment: format!("step {step} after the update") });
    step
}

/// Moves money; fails when there is not enough.
#[reducer]
pub fn transfer(ctx: &ReducerContext, from: u64, to: u64, amount: i64) -> Result<(), String> {
    let find = |id| ctx.db.account().id().find(id).ok_or(format!("no account {id}"));
    journal_step(ctx, format!("transfer {amount} from {from} to {to}"));
    let source = find(from)?;
    ctx.db.account().id().update(Account {
        balance: source.balance - amount,
        version: source.version + 1,
        ..source
    });
    if source.balance < amount {
        // After the writes, so that a rollback has something to undo.
        return Err(format!("account {from} has {} and not {amount}", source.balance));
    }
    let target = find(to)?;
    ctx.db.account().id().update(Account {
        balance: target.balance + amount,
        version: target.version + 1,
        ..target
    });
    Ok(())
}

#[reducer]
pub fn put_note(ctx: &ReducerContext, id: u64, text: String) {
    journal_step(ctx, format!("put note {id}"));
    if ctx.db.note().id().find(id).is_some() {
        ctx.db.note().id().update(Note { id, text });
    } else {
        ctx.db.note().insert(Note { id, text });
    }
}

#[reducer]
pub fn delete_note(ctx: &ReducerContext, id: u64) -> Result<(), String> {
    journal_step(ctx, format!("delete note {id}"));
    if !ctx.db.note().id().delete(id) {
        return Err(format!("no note {id}"));
    }
    Ok(())
}

/// Large values live outside the pages, as blobs.
#[reducer]
pub fn attach(ctx: &ReducerContext, id: u64, bytes: Vec<u8>) {
    journal_step(ctx, format!("attach {id}"));
    if ctx.db.attachment().id().find(id).is_some() {
        ctx.db.attachment().id().update(Attachment { id, bytes });
    } else {
        ctx.db.attachment().insert(Attachment { id, bytes });
    }
}

/// Many rows in one transaction, for volume.
#[reducer]
pub fn fill(ctx: &ReducerContext, first: u64, count: u64, len: u64, seed: u64) {
    journal_step(ctx, format!("fill {first} to {}", first + count));
    let mut state = seed | 1;
    for id in first..first + count {
        let mut text = String::with_capacity(len as usize);
        while (text.len() as u64) < len {
            // Half random, half words: compresses about as well as real rows do.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(&format!("{:08x} entity updated ", state >> 32));
        }
        text.truncate(len as usize);
        ctx.db.note().insert(Note { id, text });
    }
}

/// A value of every type that columns have.
#[table(name = sample, public)]
#[derive(Clone)]
pub struct Sample {
    #[primary_key]
    pub id: u64,
    pub small: i8,
    pub byte: u8,
    pub short: i16,
    pub word: u16,
    pub int: i32,
    pub uint: u32,
    pub long: i64,
    pub wide: i128,
    pub uwide: u128,
    pub huge: i256,
    pub uhuge: u256,
    pub single: f32,
    pub double: f64,
    pub yes: bool,
    pub text: String,
    pub bytes: Vec<u8>,
    pub at: Timestamp,
    pub took: TimeDuration,
    pub who: Identity,
    pub connection: ConnectionId,
    pub maybe: Option<String>,
    pub perhaps: Option<Option<u64>>,
    pub numbers: Vec<u64>,
    pub colour: Colour,
    pub shape: Figure,
    pub shapes: Vec<Figure>,
}

#[derive(SpacetimeType, Clone)]
pub enum Colour {
    Red,
    Green,
}

#[derive(SpacetimeType, Clone)]
pub struct Point {
    pub x: f64,
    pub label: Option<String>,
}

/// A sum within a product within a sum.
#[derive(SpacetimeType, Clone)]
pub enum Figure {
    Nothing,
    Circle(f32),
    Polygon(Vec<Point>),
    Coloured(Painted),
}

#[derive(SpacetimeType, Clone)]
pub struct Painted {
    pub colour: Colour,
    pub inner: Outline,
}

#[derive(SpacetimeType, Clone)]
pub enum Outline {
    None,
    Dashes(Vec<u32>),
}

/// The ends of every type, and texts of every plane.
#[reducer]
pub fn take_samples(ctx: &ReducerContext) {
    let base = Sample {
        id: 0,
        small: i8::MIN,
        byte: u8::MAX,
        short: i16::MIN,
        word: u16::MAX,
        int: i32::MIN,
        uint: u32::MAX,
        long: i64::MIN,
        wide: i128::MIN,
        uwide: u128::MAX,
        huge: i256::MIN,
        uhuge: u256::MAX,
        single: f32::MIN_POSITIVE,
        double: 0.1 + 0.2,
        yes: true,
        text: String::new(),
        bytes: Vec::new(),
        at: Timestamp::from_micros_since_unix_epoch(-1),
        took: TimeDuration::from_micros(i64::MAX),
        who: ctx.sender,
        connection: ConnectionId::ZERO,
        maybe: None,
        perhaps: None,
        numbers: Vec::new(),
        colour: Colour::Red,
        shape: Figure::Nothing,
        shapes: Vec::new(),
    };
    ctx.db.sample().insert(base.clone());
    // Every plane has its first and last letters in it, but for the surrogates, which are none.
    let planes: String = (0..=16u32).flat_map(|plane| [plane << 16 | 0x21, plane << 16 | 0xfffd]).filter_map(char::from_u32).collect();
    let painted = Painted { colour: Colour::Green, inner: Outline::Dashes(vec![0, u32::MAX]) };
    let points = vec![Point { x: f64::NEG_INFINITY, label: None }, Point { x: -0.0, label: Some("\u{0}\"\\".into()) }];
    ctx.db.sample().insert(Sample {
        id: u64::MAX,
        wide: i128::MAX,
        huge: i256::MAX,
        single: f32::INFINITY,
        double: f64::NAN,
        yes: false,
        text: planes,
        bytes: (0..=255).collect(),
        at: Timestamp::from_micros_since_unix_epoch(i64::MAX),
        took: TimeDuration::from_micros(i64::MIN),
        connection: ConnectionId::from_u128(u128::MAX),
        maybe: Some(String::new()),
        perhaps: Some(None),
        numbers: vec![0, u64::MAX],
        shape: Figure::Coloured(painted.clone()),
        shapes: vec![Figure::Nothing, Figure::Circle(1.1), Figure::Polygon(points), Figure::Coloured(painted)],
        ..base.clone()
    });
    ctx.db.sample().insert(Sample { id: 7, text: "x".repeat(1 << 20), perhaps: Some(Some(u64::MAX)), ..base });
}

#[reducer]
pub fn import_sample(ctx: &ReducerContext, samples: Vec<Sample>) {
    for sample in samples {
        ctx.db.sample().insert(sample);
    }
}
