#!/bin/sh
# The CLI of the server's image starts the server with what follows.
exec /opt/spacetime/spacetimedb-standalone "$@"
