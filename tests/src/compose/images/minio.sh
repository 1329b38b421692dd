#!/bin/sh
# `minio server DIR --address :PORT`, by another S3 server that keeps a bucket as a directory and checks signatures.
set -eu
exec /usr/local/bin/s3s-fs --host 0.0.0.0 --port "${4#:}" \
    --access-key "$(cat "$MINIO_ROOT_USER_FILE")" --secret-key "$(cat "$MINIO_ROOT_PASSWORD_FILE")" "$2"
