//! What the tests write: accounts whose balances always add up to the same sum, a journal without holes, and blobs.
//!
//! Every successful call of a public reducer adds exactly one journal row, so a state is a prefix of the history exactly
//! when its journal has no hole and the accounts add up.

use spacetimedb::{ReducerContext, Table, Timestamp, reducer, table};

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
