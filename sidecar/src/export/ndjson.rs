//! Rows as lines of JSON. FORMAT.md says how each type is written.

use serde_json::Value as Json;
use spacetimedb_sats::{i256, u256};

use crate::database::cell::Cell;
use crate::database::shape::{Field, Shape, tag_of};

/// Writes a row and the end of its line.
pub fn write_row(columns: &[Field], row: &[Cell], out: &mut Vec<u8>) {
    write_members(columns.iter().zip(row).map(|(column, cell)| (column.name.as_str(), &column.shape, cell)), out);
    out.push(b'\n');
}

/// Reads a row.
///
/// # Errors
/// What about the line is not understood.
pub fn read_row(columns: &[Field], line: &[u8]) -> Result<Vec<Cell>, String> {
    let json: Json = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    read_members(columns, &json)
}

fn write_members<'a>(members: impl Iterator<Item = (&'a str, &'a Shape, &'a Cell)>, out: &mut Vec<u8>) {
    out.push(b'{');
    for (index, (name, shape, cell)) in members.enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_text(name, out);
        out.push(b':');
        write(shape, cell, out);
    }
    out.push(b'}');
}

fn write_text(text: &str, out: &mut Vec<u8>) {
    // Writing into memory does not fail.
    let _ = serde_json::to_writer(out, text);
}

fn write_plain(value: impl std::fmt::Display, out: &mut Vec<u8>) {
    use std::io::Write as _;
    let _ = write!(out, "{value}");
}

fn write(shape: &Shape, cell: &Cell, out: &mut Vec<u8>) {
    match (shape, cell) {
        (_, Cell::Unit) => out.extend_from_slice(b"true"),
        (_, Cell::Bool(value)) => write_plain(value, out),
        (Shape::Timestamp, Cell::Int(value)) => match timestamp(*value) {
            Some(time) => write_plain(format_args!("\"{time}\""), out),
            None => write_plain(value, out),
        },
        (Shape::I128, Cell::Int(value)) => write_plain(format_args!("\"{value}\""), out),
        (_, Cell::Int(value)) => write_plain(value, out),
        (_, Cell::None) => out.extend_from_slice(b"null"),
        (Shape::Option(some), Cell::Some(value)) if some.is_option() => {
            write_members(std::iter::once(("some", &**some, &**value)), out);
        }
        (Shape::Option(some), Cell::Some(value)) => write(some, value, out),
        (Shape::List(of), Cell::List(cells)) => {
            out.push(b'[');
            for (index, cell) in cells.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write(of, cell, out);
            }
            out.push(b']');
        }
        (Shape::Struct(parts), Cell::Struct(cells)) => {
            write_members(parts.iter().zip(cells).map(|(part, cell)| (part.name.as_str(), &part.shape, cell)), out);
        }
        (Shape::Sum(variants), Cell::Sum(tag, value)) => {
            let Some(variant) = variants.get(usize::from(*tag)) else { return out.extend_from_slice(b"null") };
            write_plain(format_args!("{{\"{}\":", tag_of(variants)), out);
            write_text(&variant.name, out);
            if variant.shape != Shape::Unit {
                out.push(b',');
                write_text(&variant.name, out);
                out.push(b':');
                write(&variant.shape, value, out);
            }
            out.push(b'}');
        }
        (_, Cell::Float(value)) if value.into_inner().is_finite() => {
            let _ = serde_json::to_writer(out, &value.into_inner());
        }
        (shape, cell) => write_text(&text(shape, cell).unwrap_or_default(), out),
    }
}

/// What is text in every format: texts, names, and numbers that no other type of the formats holds.
pub fn text(shape: &Shape, cell: &Cell) -> Option<String> {
    Some(match (shape, cell) {
        (_, Cell::Text(value)) => value.to_string(),
        (_, Cell::Bytes(value)) => hex(value),
        (Shape::Enum(names), Cell::Enum(tag)) => names.get(usize::from(*tag))?.clone(),
        (Shape::Identity, Cell::U256(value)) => format!("{value:064x}"),
        (Shape::ConnectionId, Cell::U128(value)) => format!("{value:032x}"),
        (Shape::Uuid, Cell::U128(value)) => {
            let digits = format!("{value:032x}");
            let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| digits.get(part).unwrap_or_default());
            parts.join("-")
        }
        (_, Cell::Int(value)) => value.to_string(),
        (_, Cell::U128(value)) => value.to_string(),
        (_, Cell::I256(value)) => value.to_string(),
        (_, Cell::U256(value)) => value.to_string(),
        (_, Cell::Float(value)) => match value.into_inner() {
            value if value.is_nan() => "NaN".into(),
            value if value > 0.0 => "Infinity".into(),
            _ => "-Infinity".into(),
        },
        _ => return None,
    })
}

/// The value that [`text`] wrote.
///
/// # Errors
/// Why the text is none.
pub fn from_text(shape: &Shape, text: &str) -> Result<Cell, String> {
    let wrong = || format!("`{}` is no {shape:?}", text.chars().take(80).collect::<String>());
    let number = |result: Option<Cell>| result.ok_or_else(wrong);
    match shape {
        Shape::String => Ok(Cell::Text(text.into())),
        Shape::Bytes => unhex(text).map(|bytes| Cell::Bytes(bytes.into())).ok_or_else(wrong),
        Shape::Enum(names) => {
            let tag = names.iter().position(|name| name == text).and_then(|tag| u8::try_from(tag).ok());
            tag.map(Cell::Enum).ok_or_else(wrong)
        }
        Shape::Identity => number(u256::from_str_radix(text, 16).ok().filter(|_| text.len() == 64).map(Cell::U256)),
        Shape::ConnectionId => number(u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32).map(Cell::U128)),
        Shape::Uuid => {
            let digits: String = text.split('-').collect();
            let is_whole = text.len() == 36 && digits.len() == 32;
            number(u128::from_str_radix(&digits, 16).ok().filter(|_| is_whole).map(Cell::U128))
        }
        Shape::I128 => number(text.parse().ok().map(Cell::Int)),
        Shape::U128 => number(text.parse().ok().map(Cell::U128)),
        Shape::I256 => number(text.parse::<i256>().ok().map(Cell::I256)),
        Shape::U256 => number(text.parse::<u256>().ok().map(Cell::U256)),
        Shape::Timestamp => {
            let time: jiff::Timestamp = text.parse().map_err(|_| wrong())?;
            Ok(Cell::Int(time.as_microsecond().into()))
        }
        Shape::F32 | Shape::F64 => match text {
            "NaN" => Ok(Cell::Float(f64::NAN.into())),
            "Infinity" => Ok(Cell::Float(f64::INFINITY.into())),
            "-Infinity" => Ok(Cell::Float(f64::NEG_INFINITY.into())),
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

fn timestamp(micros: i128) -> Option<jiff::Timestamp> {
    jiff::Timestamp::from_microsecond(i64::try_from(micros).ok()?).ok()
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)]);
    digits.map(char::from).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pair = |pair: &[u8]| u8::try_from(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?).ok();
    text.as_bytes().chunks(2).map(pair).collect()
}

fn read_members(parts: &[Field], json: &Json) -> Result<Vec<Cell>, String> {
    let members = json.as_object().ok_or("it is no object")?;
    let member = |part: &Field| {
        let value = members.get(&part.name).ok_or_else(|| format!("`{}` is missing", part.name))?;
        read(&part.shape, value).map_err(|reason| format!("`{}`: {reason}", part.name))
    };
    parts.iter().map(member).collect()
}

fn read(shape: &Shape, json: &Json) -> Result<Cell, String> {
    match (shape, json) {
        (Shape::Unit, Json::Bool(true)) => Ok(Cell::Unit),
        (Shape::Bool, Json::Bool(value)) => Ok(Cell::Bool(*value)),
        (Shape::Option(_), Json::Null) => Ok(Cell::None),
        (Shape::Option(some), json) if some.is_option() => {
            let value = json.get("some").ok_or("it has no `some`")?;
            Ok(Cell::Some(Box::new(read(some, value)?)))
        }
        (Shape::Option(some), json) => Ok(Cell::Some(Box::new(read(some, json)?))),
        (Shape::List(of), Json::Array(items)) => {
            Ok(Cell::List(items.iter().map(|item| read(of, item)).collect::<Result<_, _>>()?))
        }
        (Shape::Struct(parts), json) => read_members(parts, json).map(Cell::Struct),
        (Shape::Sum(variants), json) => {
            let name = json.get(tag_of(variants)).and_then(Json::as_str).ok_or("it names no variant")?;
            let index = variants.iter().position(|variant| variant.name == name);
            let index = index.ok_or_else(|| format!("there is no variant `{name}`"))?;
            let value = match (&variants[index].shape, json.get(name)) {
                (Shape::Unit, _) => Cell::Unit,
                (shape, Some(value)) => read(shape, value)?,
                (_, None) => return Err(format!("the variant `{name}` carries nothing")),
            };
            Ok(Cell::Sum(u8::try_from(index).map_err(|error| error.to_string())?, Box::new(value)))
        }
        (Shape::F32 | Shape::F64, Json::Number(value)) => {
            value.as_f64().map(|value| Cell::Float(value.into())).ok_or_else(|| format!("{value} is no number"))
        }
        (_, Json::Number(value)) => {
            let whole = value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
            whole.map(Cell::Int).ok_or_else(|| format!("{value} is no whole number of 64 bits"))
        }
        (shape, Json::String(text)) => from_text(shape, text),
        (shape, json) => Err(format!("`{}` is no {shape:?}", json.to_string().chars().take(80).collect::<String>())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_everybody_writes_one() {
        let (shape, value) = (Shape::Uuid, Cell::U128(0x0192_f3a4_b5c6_7d8e_9fa0_b1c2_d3e4_f506));
        let written = text(&shape, &value).unwrap();
        assert_eq!(written, "0192f3a4-b5c6-7d8e-9fa0-b1c2d3e4f506");
        assert_eq!(from_text(&shape, &written), Ok(value));
        for wrong in ["", "0192f3a4b5c67d8e9fa0b1c2d3e4f506", "0192f3a4-b5c6-7d8e-9fa0-b1c2d3e4f50g"] {
            assert!(from_text(&shape, wrong).is_err(), "{wrong}");
        }
    }
}
