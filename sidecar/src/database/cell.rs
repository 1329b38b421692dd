//! Values of any [`Shape`], from and to the server's binary form.

use spacetimedb_sats::bsatn::{self, DecodeError};
use spacetimedb_sats::{F32, F64, i256, u256};

use crate::database::shape::{Field, Shape};

/// One value. Which integer it is tells its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cell {
    Unit,
    Bool(bool),
    /// Integers up to 64 bits, `i128`, timestamps and durations.
    Int(i128),
    /// `u128` and connection ids.
    U128(u128),
    I256(i256),
    /// `u256` and identities.
    U256(u256),
    /// Of both widths; 32 bits fit into 64.
    Float(F64),
    Text(Box<str>),
    Bytes(Box<[u8]>),
    None,
    Some(Box<Cell>),
    List(Vec<Cell>),
    Struct(Vec<Cell>),
    Enum(u8),
    Sum(u8, Box<Cell>),
}

/// Reads a row.
///
/// # Errors
/// When the bytes are not a row of these columns.
pub fn decode_row(columns: &[Field], mut bytes: &[u8]) -> Result<Vec<Cell>, DecodeError> {
    let row = columns.iter().map(|column| Cell::decode(&column.shape, &mut bytes)).collect::<Result<_, _>>()?;
    if bytes.is_empty() { Ok(row) } else { Err(DecodeError::Other(format!("{} bytes are left over", bytes.len()))) }
}

/// Writes a row of these columns.
///
/// # Errors
/// When a value is not of its column's shape.
pub fn encode_row(columns: &[Field], row: &[Cell], out: &mut Vec<u8>) -> Result<(), String> {
    columns.iter().zip(row).try_for_each(|(column, cell)| cell.encode(&column.shape, out))
}

impl Cell {
    fn decode(shape: &Shape, bytes: &mut &[u8]) -> Result<Self, DecodeError> {
        fn int<'de, T>(bytes: &mut &'de [u8]) -> Result<Cell, DecodeError>
        where
            T: spacetimedb_sats::de::Deserialize<'de> + Into<i128>,
        {
            Ok(Cell::Int(bsatn::from_reader::<T>(bytes)?.into()))
        }
        Ok(match shape {
            Shape::Unit => Self::Unit,
            Shape::Bool => Self::Bool(bsatn::from_reader(bytes)?),
            Shape::I8 => int::<i8>(bytes)?,
            Shape::U8 => int::<u8>(bytes)?,
            Shape::I16 => int::<i16>(bytes)?,
            Shape::U16 => int::<u16>(bytes)?,
            Shape::I32 => int::<i32>(bytes)?,
            Shape::U32 => int::<u32>(bytes)?,
            Shape::I64 | Shape::Timestamp | Shape::Duration => int::<i64>(bytes)?,
            Shape::U64 => int::<u64>(bytes)?,
            Shape::I128 => int::<i128>(bytes)?,
            Shape::U128 | Shape::ConnectionId | Shape::Uuid => Self::U128(bsatn::from_reader(bytes)?),
            Shape::I256 => Self::I256(bsatn::from_reader(bytes)?),
            Shape::U256 | Shape::Identity => Self::U256(bsatn::from_reader(bytes)?),
            Shape::F32 => Self::Float(f64::from(bsatn::from_reader::<F32>(bytes)?.into_inner()).into()),
            Shape::F64 => Self::Float(bsatn::from_reader(bytes)?),
            Shape::String => Self::Text(bsatn::from_reader(bytes)?),
            Shape::Bytes => Self::Bytes(bsatn::from_reader::<Vec<u8>>(bytes)?.into()),
            Shape::Option(some) => match bsatn::from_reader::<u8>(bytes)? {
                0 => Self::Some(Box::new(Self::decode(some, bytes)?)),
                1 => Self::None,
                tag => return Err(no_variant(tag)),
            },
            Shape::List(of) => {
                let len = bsatn::from_reader::<u32>(bytes)? as usize;
                // A length that is wrong must not take memory before it is found out.
                let mut cells = Vec::with_capacity(len.min(bytes.len().max(1)));
                for _ in 0..len {
                    cells.push(Self::decode(of, bytes)?);
                    if cells.len() > MOST_EMPTY && bytes.is_empty() {
                        return Err(DecodeError::Other("a list is longer than its bytes".into()));
                    }
                }
                Self::List(cells)
            }
            Shape::Struct(parts) => {
                Self::Struct(parts.iter().map(|part| Self::decode(&part.shape, bytes)).collect::<Result<_, _>>()?)
            }
            Shape::Enum(names) => match bsatn::from_reader::<u8>(bytes)? {
                tag if usize::from(tag) < names.len() => Self::Enum(tag),
                tag => return Err(no_variant(tag)),
            },
            Shape::Sum(variants) => {
                let tag = bsatn::from_reader::<u8>(bytes)?;
                let variant = variants.get(usize::from(tag)).ok_or_else(|| no_variant(tag))?;
                Self::Sum(tag, Box::new(Self::decode(&variant.shape, bytes)?))
            }
        })
    }

    fn encode(&self, shape: &Shape, out: &mut Vec<u8>) -> Result<(), String> {
        fn write<T: spacetimedb_sats::ser::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) -> Result<(), String> {
            bsatn::to_writer(out, value).map_err(|error| error.to_string())
        }
        fn int<T: TryFrom<i128> + spacetimedb_sats::ser::Serialize>(
            out: &mut Vec<u8>,
            value: i128,
        ) -> Result<(), String> {
            write(out, &T::try_from(value).map_err(|_| format!("{value} does not fit its column"))?)
        }
        match (shape, self) {
            (Shape::Unit, Self::Unit) => Ok(()),
            (Shape::Bool, Self::Bool(value)) => write(out, value),
            (Shape::I8, Self::Int(value)) => int::<i8>(out, *value),
            (Shape::U8, Self::Int(value)) => int::<u8>(out, *value),
            (Shape::I16, Self::Int(value)) => int::<i16>(out, *value),
            (Shape::U16, Self::Int(value)) => int::<u16>(out, *value),
            (Shape::I32, Self::Int(value)) => int::<i32>(out, *value),
            (Shape::U32, Self::Int(value)) => int::<u32>(out, *value),
            (Shape::I64 | Shape::Timestamp | Shape::Duration, Self::Int(value)) => int::<i64>(out, *value),
            (Shape::U64, Self::Int(value)) => int::<u64>(out, *value),
            (Shape::I128, Self::Int(value)) => write(out, value),
            (Shape::U128 | Shape::ConnectionId | Shape::Uuid, Self::U128(value)) => write(out, value),
            (Shape::I256, Self::I256(value)) => write(out, value),
            (Shape::U256 | Shape::Identity, Self::U256(value)) => write(out, value),
            (Shape::F32, Self::Float(value)) => write(out, &F32::from(value.into_inner() as f32)),
            (Shape::F64, Self::Float(value)) => write(out, value),
            (Shape::String, Self::Text(value)) => write(out, value),
            (Shape::Bytes, Self::Bytes(value)) => write(out, &**value),
            (Shape::Option(_), Self::None) => write(out, &1u8),
            (Shape::Option(some), Self::Some(value)) => {
                write(out, &0u8)?;
                value.encode(some, out)
            }
            (Shape::List(of), Self::List(cells)) => {
                write(out, &u32::try_from(cells.len()).map_err(|_| "a list is too long")?)?;
                cells.iter().try_for_each(|cell| cell.encode(of, out))
            }
            (Shape::Struct(parts), Self::Struct(cells)) => encode_row(parts, cells, out),
            (Shape::Enum(_), Self::Enum(tag)) => write(out, tag),
            (Shape::Sum(variants), Self::Sum(tag, value)) => {
                let variant = variants.get(usize::from(*tag)).ok_or_else(|| format!("there is no variant {tag}"))?;
                write(out, tag)?;
                value.encode(&variant.shape, out)
            }
            (shape, cell) => Err(format!("{cell:?} is no value of {shape:?}")),
        }
    }

    /// The value as a number of a sequence.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// As a value of another shape, such as the same column has in a newer module: parts by name, variants by name, new
    /// parts empty.
    ///
    /// # Errors
    /// Why it is none.
    pub fn convert(self, from: &Shape, to: &Shape) -> Result<Self, String> {
        match (self, from, to) {
            (cell, from, to) if from == to => Ok(cell),
            (Self::None, Shape::Option(_), Shape::Option(_)) => Ok(Self::None),
            (Self::Some(value), Shape::Option(from), Shape::Option(to)) => {
                Ok(Self::Some(Box::new(value.convert(from, to)?)))
            }
            (cell, from, Shape::Option(to)) => Ok(Self::Some(Box::new(cell.convert(from, to)?))),
            (Self::List(cells), Shape::List(from), Shape::List(to)) => {
                Ok(Self::List(cells.into_iter().map(|cell| cell.convert(from, to)).collect::<Result<_, _>>()?))
            }
            (Self::Struct(cells), Shape::Struct(from), Shape::Struct(to)) => {
                convert_row(cells, from, to).map(Self::Struct)
            }
            (Self::Enum(tag), Shape::Enum(from), Shape::Enum(to)) => {
                let name = from.get(usize::from(tag)).ok_or_else(|| format!("there is no variant {tag}"))?;
                let found = to.iter().position(|to| to == name).and_then(|tag| u8::try_from(tag).ok());
                found.map(Self::Enum).ok_or_else(|| format!("the variant `{name}` is not known here"))
            }
            (Self::Sum(tag, value), Shape::Sum(from), Shape::Sum(to)) => {
                let variant = from.get(usize::from(tag)).ok_or_else(|| format!("there is no variant {tag}"))?;
                let found = to.iter().position(|to| to.name == variant.name);
                let found = found.ok_or_else(|| format!("the variant `{}` is not known here", variant.name))?;
                let value = value.convert(&variant.shape, &to[found].shape)?;
                Ok(Self::Sum(u8::try_from(found).map_err(|error| error.to_string())?, Box::new(value)))
            }
            // A wider integer takes the value, a narrower one if it fits: that is seen when it is written.
            (cell @ Self::Int(_), from, to) if is_int(from) && is_int(to) => Ok(cell),
            (cell @ Self::Float(_), Shape::F32, Shape::F64) => Ok(cell),
            (_, from, to) => Err(format!("{from:?} does not become {to:?}")),
        }
    }

    /// What a part holds that the export does not know.
    fn empty(shape: &Shape) -> Result<Self, String> {
        Ok(match shape {
            Shape::Unit => Self::Unit,
            Shape::Bool => Self::Bool(false),
            Shape::U128 | Shape::ConnectionId | Shape::Uuid => Self::U128(0),
            Shape::I256 => Self::I256(i256::ZERO),
            Shape::U256 | Shape::Identity => Self::U256(u256::ZERO),
            Shape::F32 | Shape::F64 => Self::Float(0.0.into()),
            Shape::String => Self::Text("".into()),
            Shape::Bytes => Self::Bytes(Box::default()),
            Shape::Option(_) => Self::None,
            Shape::List(_) => Self::List(Vec::new()),
            Shape::Struct(parts) => {
                Self::Struct(parts.iter().map(|part| Self::empty(&part.shape)).collect::<Result<_, _>>()?)
            }
            Shape::Enum(_) => Self::Enum(0),
            Shape::Sum(variants) => {
                let first = variants.first().ok_or("its type has no values")?;
                Self::Sum(0, Box::new(Self::empty(&first.shape)?))
            }
            _ => Self::Int(0),
        })
    }
}

/// A row of the columns `from` as one of the columns `to`; columns that are new are empty, those that are gone are left
/// out.
///
/// # Errors
/// The column that does not fit, and why.
pub fn convert_row(row: Vec<Cell>, from: &[Field], to: &[Field]) -> Result<Vec<Cell>, String> {
    let mut cells: Vec<Option<Cell>> = row.into_iter().map(Some).collect();
    let mut take = |column: &Field| {
        let index = from.iter().position(|from| from.name == column.name)?;
        Some((cells.get_mut(index)?.take()?, &from[index].shape))
    };
    let convert = |column: &Field| {
        let made = match take(column) {
            Some((cell, shape)) => cell.convert(shape, &column.shape),
            None => Cell::empty(&column.shape),
        };
        made.map_err(|reason| format!("column `{}`: {reason}", column.name))
    };
    to.iter().map(convert).collect()
}

/// Lists of more parts have bytes for them.
const MOST_EMPTY: usize = 1 << 20;

fn no_variant(tag: u8) -> DecodeError {
    DecodeError::Other(format!("there is no variant {tag}"))
}

fn is_int(shape: &Shape) -> bool {
    use Shape::{I8, I16, I32, I64, I128, U8, U16, U32, U64};
    matches!(shape, I8 | U8 | I16 | U16 | I32 | U32 | I64 | U64 | I128)
}
