"""Inner Universe from Python: `InnerUniverseController` deploys, starts, stops, backs up and restores; `Client` talks to the
database."""

from .client import Change, Client, ReducerError, Subscription
from .controller import InnerUniverseController
from .errors import (
    FindingsError,
    InnerUniverseError,
    LockedError,
    NothingToRestoreError,
    RefusedError,
    StoreUnreachableError,
    UsageError,
)

__all__ = [
    "Change",
    "Client",
    "FindingsError",
    "InnerUniverseController",
    "InnerUniverseError",
    "LockedError",
    "NothingToRestoreError",
    "ReducerError",
    "RefusedError",
    "StoreUnreachableError",
    "Subscription",
    "UsageError",
]
