//! Three versions of a module's tables: every kind of column, and what migrations do to tables.

use spacetimedb_lib::db::raw_def::v9::btree;
use spacetimedb_lib::db::raw_def::v10::RawModuleDefV10Builder;
use spacetimedb_sats::{AlgebraicType, AlgebraicValue, ProductType};
use spacetimedb_schema::def::ModuleDef;

/// Version 1 has `goner`; 2 adds a column to `grows` and the table `late`; 3 has `goner` no more.
pub fn version(version: u8) -> anyhow::Result<ModuleDef> {
    use AlgebraicType as T;
    let mut module = RawModuleDefV10Builder::new();
    let product = |columns: &[(&'static str, T)]| ProductType::from_iter(columns.iter().cloned());
    let kinds = product(&[
        ("id", T::U64),
        ("flag", T::Bool),
        ("small", T::I8),
        ("middle", T::U16),
        ("large", T::I128),
        ("huge", T::U256),
        ("real", T::F64),
        ("bytes", T::bytes()),
        ("numbers", T::array(T::I32)),
        ("maybe", T::option(T::String)),
        ("who", T::identity()),
        ("link", T::connection_id()),
        ("at", T::timestamp()),
        ("lasts", T::time_duration()),
    ]);
    module
        .build_table_with_new_type_for_tests("kinds", kinds, true)
        .with_index_no_accessor_name(btree(0), "kinds_id")
        .finish();
    let texts = product(&[("id", T::U64), ("text", T::String)]);
    module.build_table_with_new_type_for_tests("texts", texts, true).finish();
    let emptied = product(&[("n", T::U64), ("text", T::String)]);
    module.build_table_with_new_type_for_tests("emptied", emptied, true).finish();
    let noise = product(&[("n", T::U64), ("text", T::String)]);
    module.build_table_with_new_type_for_tests("noise", noise, true).with_event(true).finish();
    let mut grows = vec![("id", T::U64), ("name", T::String)];
    if version >= 2 {
        grows.push(("note", T::String));
    }
    let table = module.build_table_with_new_type_for_tests("grows", product(&grows), true);
    let table = if version >= 2 { table.with_default_column_value(2, AlgebraicValue::from("old")) } else { table };
    table.finish();
    if version < 3 {
        module.build_table_with_new_type_for_tests("goner", product(&[("n", T::U64)]), true).finish();
    }
    if version >= 2 {
        module.build_table_with_new_type_for_tests("late", product(&[("n", T::U64)]), true).finish();
    }
    Ok(module.finish().try_into()?)
}
