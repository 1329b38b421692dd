//! Every table of a database, as counts and hashes.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use spacetimedb_datastore::execution_context::Workload;
use spacetimedb_engine::relational_db::RelationalDB;
use spacetimedb_sats::bsatn;

/// For each table its rows and the SHA-256 of their BSATN, sorted as bytes and joined; and whose database it is.
pub fn of(database: &RelationalDB) -> anyhow::Result<Value> {
    let tables = database.with_read_only(Workload::Internal, |tx| -> anyhow::Result<_> {
        let mut tables = BTreeMap::new();
        for schema in database.get_all_tables(tx)? {
            let mut rows = Vec::new();
            for row in database.iter(tx, schema.table_id)? {
                rows.push(bsatn::to_vec(&row.to_product_value())?);
            }
            rows.sort_unstable();
            let digest = Sha256::digest(rows.concat());
            let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let table = json!({ "rows": rows.len(), "sha256": hex });
            tables.insert(schema.table_name.to_string(), table);
        }
        Ok(tables)
    })?;
    let module = database.metadata()?.map(|metadata| {
        json!({
            "identity": metadata.database_identity.to_hex().as_str(),
            "owner": metadata.owner_identity.to_hex().as_str(),
            "program": metadata.program_hash.to_hex().as_str(),
        })
    });
    Ok(json!({ "tables": tables, "module": module }))
}
