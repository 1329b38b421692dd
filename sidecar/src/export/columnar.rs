//! Rows as Arrow arrays, and back: what Parquet files hold. FORMAT.md says which type becomes which.
//!
//! Every column may be null, so that files from before a column was added read as one table with those after.

use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, StringBuilder};
use arrow_array::cast::AsArray as _;
use arrow_array::types::{Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType};
use arrow_array::{
    Array, ArrayRef, BooleanArray, Decimal128Array, Float32Array, Float64Array, Int32Array, Int64Array, ListArray,
    RecordBatch, StructArray, TimestampMicrosecondArray,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{ArrowError, DataType, Field as ArrowField, Fields, Schema, TimeUnit};

use crate::database::cell::Cell;
use crate::database::shape::{Field, Shape, tag_of};
use crate::export::ndjson::{from_text, text};

/// Twenty digits hold every `u64`, and no engine lacks them.
const U64_DIGITS: u8 = 20;

pub fn schema(columns: &[Field]) -> Schema {
    Schema::new(columns.iter().map(|column| arrow_field(&column.name, &column.shape)).collect::<Vec<_>>())
}

/// # Errors
/// When rows are not of these columns.
pub fn batch(schema: &Arc<Schema>, columns: &[Field], rows: &[Vec<Cell>]) -> Result<RecordBatch, ArrowError> {
    let arrays = columns.iter().enumerate().map(|(index, column)| {
        let cells: Vec<Option<&Cell>> = rows.iter().map(|row| row.get(index)).collect();
        array(&column.shape, &cells)
    });
    RecordBatch::try_new(Arc::clone(schema), arrays.collect::<Result<_, _>>()?)
}

/// # Errors
/// Which column is missing or holds what it cannot.
pub fn rows(columns: &[Field], batch: &RecordBatch) -> Result<Vec<Vec<Cell>>, String> {
    let find = |column: &Field| {
        batch.column_by_name(&column.name).cloned().ok_or_else(|| format!("`{}` is missing", column.name))
    };
    let arrays: Vec<ArrayRef> = columns.iter().map(find).collect::<Result<_, _>>()?;
    let row = |index: usize| {
        let cell = |(column, array): (&Field, &ArrayRef)| {
            cell(&column.shape, array, index).map_err(|reason| format!("`{}`: {reason}", column.name))
        };
        columns.iter().zip(&arrays).map(cell).collect()
    };
    (0..batch.num_rows()).map(row).collect()
}

fn arrow_field(name: &str, shape: &Shape) -> ArrowField {
    ArrowField::new(name, data_type(shape), true)
}

fn data_type(shape: &Shape) -> DataType {
    match shape {
        Shape::Unit | Shape::Bool => DataType::Boolean,
        Shape::I8 | Shape::U8 | Shape::I16 | Shape::U16 | Shape::I32 => DataType::Int32,
        Shape::U32 | Shape::I64 | Shape::Duration => DataType::Int64,
        Shape::U64 => DataType::Decimal128(U64_DIGITS, 0),
        Shape::F32 => DataType::Float32,
        Shape::F64 => DataType::Float64,
        Shape::Bytes => DataType::Binary,
        Shape::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        Shape::Option(some) if some.is_option() => DataType::Struct(Fields::from(vec![arrow_field("some", some)])),
        Shape::Option(some) => data_type(some),
        Shape::List(of) => DataType::List(Arc::new(arrow_field("element", of))),
        Shape::Struct(parts) => DataType::Struct(struct_fields(parts)),
        Shape::Sum(variants) => DataType::Struct(sum_fields(variants)),
        Shape::I128
        | Shape::U128
        | Shape::I256
        | Shape::U256
        | Shape::String
        | Shape::Identity
        | Shape::ConnectionId
        | Shape::Uuid
        | Shape::Enum(_) => DataType::Utf8,
    }
}

fn struct_fields(parts: &[Field]) -> Fields {
    parts.iter().map(|part| arrow_field(&part.name, &part.shape)).collect()
}

/// The variant's name, then a member for each variant that carries something.
fn sum_fields(variants: &[Field]) -> Fields {
    let tag = ArrowField::new(tag_of(variants), DataType::Utf8, true);
    std::iter::once(tag).chain(carrying(variants).map(|(_, part)| arrow_field(&part.name, &part.shape))).collect()
}

fn carrying(variants: &[Field]) -> impl Iterator<Item = (usize, &Field)> {
    variants.iter().enumerate().filter(|(_, variant)| variant.shape != Shape::Unit)
}

fn misplaced(shape: &Shape, cell: &Cell) -> ArrowError {
    ArrowError::InvalidArgumentError(format!("{cell:?} is no value of {shape:?}"))
}

/// One array of the values; `None` where there is no row for it.
fn array(shape: &Shape, cells: &[Option<&Cell>]) -> Result<ArrayRef, ArrowError> {
    fn ints<T: TryFrom<i128>>(shape: &Shape, cells: &[Option<&Cell>]) -> Result<Vec<Option<T>>, ArrowError> {
        let int = |cell: &Cell| match cell {
            Cell::Int(value) => T::try_from(*value).map_err(|_| misplaced(shape, cell)),
            cell => Err(misplaced(shape, cell)),
        };
        cells.iter().map(|cell| cell.map(int).transpose()).collect()
    }
    fn floats(shape: &Shape, cells: &[Option<&Cell>]) -> Result<Vec<Option<f64>>, ArrowError> {
        let float = |cell: &Cell| match cell {
            Cell::Float(value) => Ok(value.into_inner()),
            cell => Err(misplaced(shape, cell)),
        };
        cells.iter().map(|cell| cell.map(float).transpose()).collect()
    }
    Ok(match shape {
        Shape::Unit | Shape::Bool => {
            let bool = |cell: &Cell| match cell {
                Cell::Unit => Ok(true),
                Cell::Bool(value) => Ok(*value),
                cell => Err(misplaced(shape, cell)),
            };
            let values = cells.iter().map(|cell| cell.map(bool).transpose());
            Arc::new(values.collect::<Result<BooleanArray, _>>()?)
        }
        Shape::I8 | Shape::U8 | Shape::I16 | Shape::U16 | Shape::I32 => {
            Arc::new(Int32Array::from(ints::<i32>(shape, cells)?))
        }
        Shape::U32 | Shape::I64 | Shape::Duration => Arc::new(Int64Array::from(ints::<i64>(shape, cells)?)),
        Shape::U64 => {
            let values = Decimal128Array::from(ints::<i128>(shape, cells)?);
            Arc::new(values.with_precision_and_scale(U64_DIGITS, 0)?)
        }
        Shape::Timestamp => {
            let values = TimestampMicrosecondArray::from(ints::<i64>(shape, cells)?);
            Arc::new(values.with_timezone("UTC"))
        }
        Shape::F32 => {
            let values = floats(shape, cells)?.into_iter().map(|value| value.map(|value| value as f32));
            Arc::new(values.collect::<Float32Array>())
        }
        Shape::F64 => Arc::new(Float64Array::from(floats(shape, cells)?)),
        Shape::Bytes => {
            let mut values = BinaryBuilder::new();
            for cell in cells {
                match cell {
                    Some(Cell::Bytes(bytes)) => values.append_value(bytes),
                    Some(cell) => return Err(misplaced(shape, cell)),
                    None => values.append_null(),
                }
            }
            Arc::new(values.finish())
        }
        Shape::Option(some) => {
            let inner: Vec<Option<&Cell>> = cells
                .iter()
                .map(|cell| match cell {
                    Some(Cell::Some(value)) => Some(&**value),
                    _ => None,
                })
                .collect();
            let values = array(some, &inner)?;
            if !some.is_option() {
                return Ok(values);
            }
            let valid: NullBuffer = inner.iter().map(Option::is_some).collect::<Vec<_>>().into();
            Arc::new(StructArray::try_new(Fields::from(vec![arrow_field("some", some)]), vec![values], Some(valid))?)
        }
        Shape::List(of) => {
            let lists: Vec<&[Cell]> = cells
                .iter()
                .map(|cell| match cell {
                    Some(Cell::List(items)) => Ok(items.as_slice()),
                    Some(cell) => Err(misplaced(shape, cell)),
                    None => Ok([].as_slice()),
                })
                .collect::<Result<_, _>>()?;
            let items: Vec<Option<&Cell>> = lists.iter().flat_map(|items| items.iter().map(Some)).collect();
            let offsets = OffsetBuffer::from_lengths(lists.iter().map(|items| items.len()));
            let field = Arc::new(arrow_field("element", of));
            Arc::new(ListArray::try_new(field, offsets, array(of, &items)?, Some(validity(cells)))?)
        }
        Shape::Struct(parts) => {
            let part = |(index, part): (usize, &Field)| {
                let inner: Vec<Option<&Cell>> = cells
                    .iter()
                    .map(|cell| match cell {
                        Some(Cell::Struct(cells)) => cells.get(index),
                        _ => None,
                    })
                    .collect();
                array(&part.shape, &inner)
            };
            let arrays = parts.iter().enumerate().map(part).collect::<Result<_, _>>()?;
            Arc::new(StructArray::try_new(struct_fields(parts), arrays, Some(validity(cells)))?)
        }
        Shape::Sum(variants) => {
            let mut tags = StringBuilder::new();
            for cell in cells {
                match cell {
                    Some(Cell::Sum(tag, _)) => tags.append_option(variants.get(usize::from(*tag)).map(|v| &v.name)),
                    Some(cell) => return Err(misplaced(shape, cell)),
                    None => tags.append_null(),
                }
            }
            let mut arrays: Vec<ArrayRef> = vec![Arc::new(tags.finish())];
            for (index, variant) in carrying(variants) {
                let inner: Vec<Option<&Cell>> = cells
                    .iter()
                    .map(|cell| match cell {
                        Some(Cell::Sum(tag, value)) if usize::from(*tag) == index => Some(&**value),
                        _ => None,
                    })
                    .collect();
                arrays.push(array(&variant.shape, &inner)?);
            }
            Arc::new(StructArray::try_new(sum_fields(variants), arrays, Some(validity(cells)))?)
        }
        Shape::I128
        | Shape::U128
        | Shape::I256
        | Shape::U256
        | Shape::String
        | Shape::Identity
        | Shape::ConnectionId
        | Shape::Uuid
        | Shape::Enum(_) => {
            let mut values = StringBuilder::new();
            for cell in cells {
                match cell {
                    Some(Cell::Text(value)) => values.append_value(value),
                    Some(cell) => values.append_value(text(shape, cell).ok_or_else(|| misplaced(shape, cell))?),
                    None => values.append_null(),
                }
            }
            Arc::new(values.finish())
        }
    })
}

fn validity(cells: &[Option<&Cell>]) -> NullBuffer {
    cells.iter().map(Option::is_some).collect::<Vec<_>>().into()
}

/// The value at `index`.
fn cell(shape: &Shape, array: &ArrayRef, index: usize) -> Result<Cell, String> {
    if let Shape::Option(some) = shape {
        if array.is_null(index) {
            return Ok(Cell::None);
        }
        let inner = if some.is_option() {
            let values = array.as_struct_opt().ok_or_else(|| wrong(shape, array))?;
            cell(some, values.column_by_name("some").ok_or("it has no `some`")?, index)?
        } else {
            cell(some, array, index)?
        };
        return Ok(Cell::Some(Box::new(inner)));
    }
    if array.is_null(index) {
        return Err("it is null".into());
    }
    let wrong = || wrong(shape, array);
    Ok(match shape {
        Shape::Unit => Cell::Unit,
        Shape::Bool => Cell::Bool(array.as_boolean_opt().ok_or_else(wrong)?.value(index)),
        Shape::I8 | Shape::U8 | Shape::I16 | Shape::U16 | Shape::I32 => {
            Cell::Int(array.as_primitive_opt::<Int32Type>().ok_or_else(wrong)?.value(index).into())
        }
        Shape::U32 | Shape::I64 | Shape::Duration => {
            Cell::Int(array.as_primitive_opt::<Int64Type>().ok_or_else(wrong)?.value(index).into())
        }
        Shape::U64 => Cell::Int(array.as_primitive_opt::<Decimal128Type>().ok_or_else(wrong)?.value(index)),
        Shape::Timestamp => {
            Cell::Int(array.as_primitive_opt::<TimestampMicrosecondType>().ok_or_else(wrong)?.value(index).into())
        }
        Shape::F32 => {
            let value = array.as_primitive_opt::<Float32Type>().ok_or_else(wrong)?.value(index);
            Cell::Float(f64::from(value).into())
        }
        Shape::F64 => Cell::Float(array.as_primitive_opt::<Float64Type>().ok_or_else(wrong)?.value(index).into()),
        Shape::Bytes => Cell::Bytes(array.as_binary_opt::<i32>().ok_or_else(wrong)?.value(index).into()),
        Shape::List(of) => {
            let items = array.as_list_opt::<i32>().ok_or_else(wrong)?.value(index);
            Cell::List((0..items.len()).map(|index| cell(of, &items, index)).collect::<Result<_, _>>()?)
        }
        Shape::Struct(parts) => {
            let values = array.as_struct_opt().ok_or_else(wrong)?;
            let part = |part: &Field| {
                let column = values.column_by_name(&part.name).ok_or_else(|| format!("`{}` is missing", part.name))?;
                cell(&part.shape, column, index)
            };
            Cell::Struct(parts.iter().map(part).collect::<Result<_, _>>()?)
        }
        Shape::Sum(variants) => {
            let values = array.as_struct_opt().ok_or_else(wrong)?;
            let tags = values.column_by_name(tag_of(variants)).and_then(|tags| tags.as_string_opt::<i32>());
            let name = tags.ok_or_else(wrong)?.value(index);
            let tag = variants.iter().position(|variant| variant.name == name);
            let tag = tag.ok_or_else(|| format!("there is no variant `{name}`"))?;
            let value = match &variants[tag].shape {
                Shape::Unit => Cell::Unit,
                shape => cell(shape, values.column_by_name(name).ok_or_else(wrong)?, index)?,
            };
            Cell::Sum(u8::try_from(tag).map_err(|error| error.to_string())?, Box::new(value))
        }
        _ => from_text(shape, array.as_string_opt::<i32>().ok_or_else(wrong)?.value(index))?,
    })
}

fn wrong(shape: &Shape, array: &ArrayRef) -> String {
    format!("{} holds no {shape:?}", array.data_type())
}
