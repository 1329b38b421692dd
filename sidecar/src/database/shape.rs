//! Types of columns, free of references: what a value may be, by which it is read, written and converted.

use serde::{Deserialize, Serialize};
use spacetimedb_sats::typespace::Typespace;
use spacetimedb_sats::{AlgebraicType, ProductType, SumType};

/// No type of a table nests deeper; a reference that leads back to itself does.
const DEEPEST: usize = 32;

/// The type of a value. As JSON it is a name, or an object of one member for what has parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    Unit,
    Bool,
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    I128,
    U128,
    I256,
    U256,
    F32,
    F64,
    String,
    Bytes,
    /// Microseconds since 1970 in UTC.
    Timestamp,
    /// Microseconds.
    Duration,
    Identity,
    ConnectionId,
    Uuid,
    Option(Box<Shape>),
    List(Box<Shape>),
    Struct(Vec<Field>),
    /// A sum whose variants carry nothing: a name.
    Enum(Vec<String>),
    Sum(Vec<Field>),
}

/// A column, a part of a product, or a variant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field {
    pub name: String,
    #[serde(rename = "type")]
    pub shape: Shape,
}

impl Shape {
    /// # Errors
    /// The reason why no value of the type can be exported.
    pub fn of(ty: &AlgebraicType, types: &Typespace) -> Result<Self, String> {
        Self::at_depth(ty, types, 0)
    }

    fn at_depth(ty: &AlgebraicType, types: &Typespace, depth: usize) -> Result<Self, String> {
        if depth > DEEPEST {
            return Err("its type contains itself".into());
        }
        Ok(match ty {
            AlgebraicType::Ref(reference) => {
                let ty = types.get(*reference).ok_or("its type is not in the module's schema")?;
                Self::at_depth(ty, types, depth + 1)?
            }
            AlgebraicType::Product(product) if product.is_timestamp() => Self::Timestamp,
            AlgebraicType::Product(product) if product.is_time_duration() => Self::Duration,
            AlgebraicType::Product(product) if product.is_identity() => Self::Identity,
            AlgebraicType::Product(product) if product.is_connection_id() => Self::ConnectionId,
            AlgebraicType::Product(product) if is_uuid(product) => Self::Uuid,
            AlgebraicType::Product(product) if product.is_unit() => Self::Unit,
            AlgebraicType::Product(product) => Self::Struct(fields_at(product, types, depth)?),
            AlgebraicType::Sum(sum) => Self::of_sum(sum, types, depth)?,
            AlgebraicType::Array(array) => match &*array.elem_ty {
                AlgebraicType::U8 => Self::Bytes,
                of => Self::List(Box::new(Self::at_depth(of, types, depth + 1)?)),
            },
            AlgebraicType::String => Self::String,
            AlgebraicType::Bool => Self::Bool,
            AlgebraicType::I8 => Self::I8,
            AlgebraicType::U8 => Self::U8,
            AlgebraicType::I16 => Self::I16,
            AlgebraicType::U16 => Self::U16,
            AlgebraicType::I32 => Self::I32,
            AlgebraicType::U32 => Self::U32,
            AlgebraicType::I64 => Self::I64,
            AlgebraicType::U64 => Self::U64,
            AlgebraicType::I128 => Self::I128,
            AlgebraicType::U128 => Self::U128,
            AlgebraicType::I256 => Self::I256,
            AlgebraicType::U256 => Self::U256,
            AlgebraicType::F32 => Self::F32,
            AlgebraicType::F64 => Self::F64,
        })
    }

    fn of_sum(sum: &SumType, types: &Typespace, depth: usize) -> Result<Self, String> {
        if let Some(some) = sum.as_option() {
            return Ok(Self::Option(Box::new(Self::at_depth(some, types, depth + 1)?)));
        }
        if sum.is_empty() {
            return Err("its type has no values".into());
        }
        let variants = sum.variants.iter().enumerate().map(|(index, variant)| {
            let name = variant.name.as_deref().map_or_else(|| format!("_{index}"), str::to_owned);
            Ok(Field { name, shape: Self::at_depth(&variant.algebraic_type, types, depth + 1)? })
        });
        let variants: Vec<Field> = variants.collect::<Result<_, String>>()?;
        if variants.iter().all(|variant| variant.shape == Self::Unit) {
            return Ok(Self::Enum(variants.into_iter().map(|variant| variant.name).collect()));
        }
        Ok(Self::Sum(variants))
    }

    /// Is there a value that is written as null?
    pub fn is_option(&self) -> bool {
        matches!(self, Self::Option(_))
    }
}

/// Servers since 2.0 have this special type beside those that the family of 1.2.0 knows.
fn is_uuid(product: &ProductType) -> bool {
    matches!(&*product.elements, [number] if number.name.as_deref() == Some("__uuid__") && number.algebraic_type == AlgebraicType::U128)
}

/// The parts of a product.
///
/// # Errors
/// The name of a part and the reason why it cannot be exported.
pub fn fields(product: &ProductType, types: &Typespace) -> Result<Vec<Field>, String> {
    fields_at(product, types, 0)
}

fn fields_at(product: &ProductType, types: &Typespace, depth: usize) -> Result<Vec<Field>, String> {
    let part = |(index, element): (usize, &spacetimedb_sats::ProductTypeElement)| {
        let name = element.name.as_deref().map_or_else(|| format!("_{index}"), str::to_owned);
        let shape = Shape::at_depth(&element.algebraic_type, types, depth + 1);
        Ok(Field { shape: shape.map_err(|reason| format!("{name}: {reason}"))?, name })
    };
    product.elements.iter().enumerate().map(part).collect()
}

/// What the member that names a sum's variant is called: `tag`, unless a variant is.
pub fn tag_of(variants: &[Field]) -> &'static str {
    if variants.iter().any(|variant| variant.name == "tag") { "tag_" } else { "tag" }
}

/// How `after` differs from `before` in a way that files of both cannot be read as one table.
///
/// What may come in: columns, parts and variants, at any place.
///
/// # Errors
/// The first difference.
pub fn extends(before: &[Field], after: &[Field]) -> Result<(), String> {
    for old in before {
        let Some(new) = after.iter().find(|new| new.name == old.name) else {
            return Err(format!("`{}` is gone", old.name));
        };
        extends_shape(&old.shape, &new.shape).map_err(|reason| format!("`{}`: {reason}", old.name))?;
    }
    Ok(())
}

fn extends_shape(before: &Shape, after: &Shape) -> Result<(), String> {
    match (before, after) {
        (Shape::Struct(before), Shape::Struct(after)) | (Shape::Sum(before), Shape::Sum(after)) => {
            extends(before, after)
        }
        (Shape::Option(before), Shape::Option(after)) | (Shape::List(before), Shape::List(after)) => {
            extends_shape(before, after)
        }
        // Variants are kept by name.
        (Shape::Enum(before), Shape::Enum(after)) => match before.iter().find(|name| !after.contains(name)) {
            Some(gone) => Err(format!("the variant `{gone}` is gone")),
            None => Ok(()),
        },
        (before, after) if before == after => Ok(()),
        (before, after) => Err(format!("it was {} and is {}", before.describe(), after.describe())),
    }
}

impl Shape {
    fn describe(&self) -> String {
        serde_json::to_string(self).unwrap_or_default().trim_matches('"').to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(name: &str, shape: Shape) -> Field {
        Field { name: name.into(), shape }
    }

    fn names(names: &[&str]) -> Shape {
        Shape::Enum(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn columns_parts_and_variants_may_come_in_at_any_place() {
        let before = [
            field("id", Shape::U64),
            field("kind", names(&["A", "B"])),
            field("place", Shape::Struct(vec![field("x", Shape::F64)])),
            field("last", Shape::Option(Box::new(Shape::Sum(vec![field("Text", Shape::String)])))),
        ];
        let after = [
            field("new", Shape::Bytes),
            field("id", Shape::U64),
            field("kind", names(&["C", "A", "B"])),
            field("place", Shape::Struct(vec![field("y", Shape::F64), field("x", Shape::F64)])),
            field(
                "last",
                Shape::Option(Box::new(Shape::Sum(vec![field("Text", Shape::String), field("Number", Shape::I8)]))),
            ),
        ];
        assert_eq!(extends(&before, &before), Ok(()));
        assert_eq!(extends(&before, &after), Ok(()));
        assert_eq!(extends(&after, &before), Err("`new` is gone".into()));
    }

    #[test]
    fn what_changes_its_type_or_goes_is_named() {
        let before = [field("id", Shape::U64), field("kind", names(&["A", "B"]))];
        let gone = extends(&before, &[field("id", Shape::U64), field("kind", names(&["A"]))]);
        assert_eq!(gone, Err("`kind`: the variant `B` is gone".into()));
        let narrower = extends(&before, &[field("id", Shape::U32), field("kind", names(&["A", "B"]))]);
        assert!(narrower.is_err_and(|reason| reason.starts_with("`id`: it was ")), "a narrower column");
        let optional = [field("id", Shape::Option(Box::new(Shape::U64))), field("kind", names(&["A", "B"]))];
        assert!(extends(&before, &optional).is_err());
        let deep = |of| [field("list", Shape::List(Box::new(Shape::Struct(vec![field("x", of)]))))];
        assert!(extends(&deep(Shape::F32), &deep(Shape::F64)).is_err_and(|reason| reason.starts_with("`list`: `x`")));
    }

    #[test]
    fn a_uuid_is_told_from_other_products_of_one_number() {
        let product = |name: &'static str, ty| AlgebraicType::product([(name, ty)]);
        let shape = |ty| Shape::of(&ty, &Typespace::default()).unwrap();
        assert_eq!(shape(product("__uuid__", AlgebraicType::U128)), Shape::Uuid);
        assert!(matches!(shape(product("__uuid__", AlgebraicType::U64)), Shape::Struct(_)));
        assert!(matches!(shape(product("uuid", AlgebraicType::U128)), Shape::Struct(_)));
    }
}
