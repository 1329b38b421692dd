# syntax=docker/dockerfile:1
# Two images of one build. `sidecar` (the last, so the default) archives; `operator` has the server too, for `deploy`, `drill` and `restore`.
#   docker build --tag inner-universe:0.1.0 .
#   docker build --target operator --tag inner-universe-operator:0.1.0 .
ARG RUST_VERSION=1.95.0
ARG SPACETIMEDB_VERSION=v2.8.3

FROM rust:${RUST_VERSION}-slim-bookworm AS build
# The C libraries among the dependencies are built from source.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential clang cmake perl pkg-config \
    && rm -rf /var/lib/apt/lists/* \
    && rustup target add wasm32-unknown-unknown
WORKDIR /source
COPY . .
# The same source gives the same bytes: no paths of the builder, no times, the versions of the lock files.
ENV SOURCE_DATE_EPOCH=0 CARGO_INCREMENTAL=0 RUSTFLAGS="--remap-path-prefix=/source=. --remap-path-prefix=/usr/local/cargo=cargo"
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/source/target \
    cargo build --locked --release --package inner-universe \
    && install -D --strip target/release/inner-universe /out/usr/local/bin/inner-universe
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/source/module/target \
    cargo build --locked --release --target wasm32-unknown-unknown --manifest-path module/Cargo.toml \
    && install -D --mode=0644 module/target/wasm32-unknown-unknown/release/inner_universe_module.wasm \
        /out/usr/local/share/inner-universe/inner_universe_module.wasm

FROM clockworklabs/spacetime:${SPACETIMEDB_VERSION} AS operator
LABEL org.opencontainers.image.title="inner-universe-operator" \
      org.opencontainers.image.description="Deploys, restores and drills for SpacetimeDB, with the server they need" \
      org.opencontainers.image.licenses="MIT"
# Where the image keeps the server; its own PATH has the command line tool only.
ENV PATH="/opt/spacetime:${PATH}"
COPY --from=build /out /
# The image's own user; the data directory is theirs.
USER 1000:1000
ENTRYPOINT ["/usr/local/bin/inner-universe"]

FROM gcr.io/distroless/cc-debian12:nonroot AS sidecar
LABEL org.opencontainers.image.title="inner-universe" \
      org.opencontainers.image.description="Backup, recovery and observability sidecar for SpacetimeDB" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /out /
# The user of the server's image: what it writes is read by its owner alone.
USER 1000:1000
EXPOSE 9464
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s CMD ["/usr/local/bin/inner-universe", "status", "--ready"]
ENTRYPOINT ["/usr/local/bin/inner-universe"]
CMD ["run"]
