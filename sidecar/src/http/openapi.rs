//! The OpenAPI document, from the same table that the routes are made of.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::http::answer::ErrorBody;
use crate::http::guard::Access;
use crate::http::{Endpoint, Method};

/// The body of one status code: its media type and schema.
pub(super) type Body = (&'static str, fn(&mut SchemaGenerator) -> Value);

/// A JSON body of type `T`.
pub(super) fn json_of<T: JsonSchema>() -> Body {
    ("application/json", |generator| generator.subschema_for::<T>().to_value())
}

/// A body that is text of any kind.
pub(super) fn text_of(media_type: &'static str) -> Body {
    (media_type, |_| json!({"type": "string"}))
}

/// The document that describes `endpoints`.
pub(super) fn document(endpoints: &[Endpoint]) -> Value {
    let mut generator = SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/components/schemas".into())
        .into_generator();
    let mut paths: Map<String, Value> = Map::new();
    for endpoint in endpoints {
        let mut responses = Map::new();
        for (status, description, (media_type, schema)) in &endpoint.answers {
            let content = json!({ *media_type: {"schema": schema(&mut generator)} });
            responses.insert(status.to_string(), json!({"description": description, "content": content}));
        }
        let (media_type, schema) = json_of::<ErrorBody>();
        let mut refusals = vec![(429, "Asked too often; `Retry-After` says how long to wait.")];
        if endpoint.access != Access::Open {
            refusals.push((401, "The token is missing or wrong."));
            refusals.push((403, "There is no token for this, or the host name is not this machine's."));
            refusals.push((500, "It failed, for the reason given."));
            refusals.push((503, "The daemon is not archiving yet."));
        }
        for (status, description) in refusals.into_iter().chain(endpoint.refusals.iter().copied()) {
            let content = json!({ media_type: {"schema": schema(&mut generator)} });
            responses
                .entry(status.to_string())
                .or_insert_with(|| json!({"description": description, "content": content}));
        }
        let mut operation = json!({
            "operationId": endpoint.name,
            "summary": endpoint.summary,
            "responses": responses,
        });
        if endpoint.access == Access::Open {
            operation["security"] = json!([]);
        }
        if endpoint.path.contains("{id}") {
            let id = generator.subschema_for::<crate::ids::RestorePointId>();
            operation["parameters"] = json!([{"name": "id", "in": "path", "required": true, "schema": id}]);
        }
        if let Some((media_type, schema)) = &endpoint.body {
            let content = json!({ *media_type: {"schema": schema(&mut generator)} });
            operation["requestBody"] = json!({"required": false, "content": content});
        }
        let method = match endpoint.method {
            Method::Get => "get",
            Method::Post => "post",
        };
        let path = paths.entry(endpoint.path.to_owned()).or_insert_with(|| json!({}));
        path[method] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Inner Universe",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Health, metrics, status and triggers of the backup and recovery sidecar for SpacetimeDB.",
            "license": {"name": "MIT", "identifier": "MIT"}
        },
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "`http.token` of the configuration"}}
        },
        "security": [{"token": []}]
    })
}
