"""A small client of one database: reducer calls, SQL, and subscriptions that outlive the connection."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl as ssl_module
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, AsyncIterator, Mapping

import aiohttp

from .errors import InnerUniverseError
from .values import Row, Tables, sql_rows

_PROTOCOL = "v1.json.spacetimedb"
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 10.0
# Changes that wait for who reads them; one who does not read is told so, and memory does not grow.
_QUEUE = 100_000


class ReducerError(InnerUniverseError):
    """A reducer refused a call."""


@dataclass(frozen=True)
class Change:
    """One row that came or went."""

    table: str
    kind: str
    """`insert` or `delete`; an update is a delete and an insert."""
    row: Row
    resumed: bool = False
    """Found after the connection was lost and made again."""


class Subscription:
    """Changes of the rows that a query selects, the rows that are there first."""

    def __init__(self, client: "Client", query: str) -> None:
        self.query = query
        self._client = client
        self._fresh = True
        self._queue: asyncio.Queue[Change | Exception] = asyncio.Queue(_QUEUE)

    def __aiter__(self) -> AsyncIterator[Change]:
        return self

    async def __anext__(self) -> Change:
        change = await self._queue.get()
        if isinstance(change, Exception):
            raise change
        return change

    async def close(self) -> None:
        """Ends the subscription."""
        await self._client._unsubscribe(self)

    def _selects(self, table: str) -> bool:
        return f" {table.lower()} " in f" {self.query.lower()} "

    def _give(self, change: Change | Exception) -> None:
        if self._queue.full():
            while not self._queue.empty():
                self._queue.get_nowait()
            change = InnerUniverseError(f"more than {_QUEUE} changes waited to be read; subscribe again")
        self._queue.put_nowait(change)


class _Cache:
    """Rows by table, as far as they fit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tables: dict[str, dict[str, Row]] = {}
        self.size = 0
        self.full = False

    def insert(self, table: str, key: str, row: Row) -> None:
        rows = self.tables.setdefault(table, {})
        if key in rows:
            return
        if self.size + len(key) > self.limit:
            # A cache that lacks rows would answer wrongly, so it answers no more.
            self.full = True
            self.tables.clear()
            self.size = 0
        if not self.full:
            rows[key] = row
            self.size += len(key)

    def delete(self, table: str, key: str) -> None:
        if self.tables.get(table, {}).pop(key, None) is not None:
            self.size -= len(key)


def _key(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _mark(key: str) -> bytes:
    """By which a row is known again without being kept."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


class Client:
    """Connects to `database` at `url`.

    `token` proves who one is; without it the server gives a new identity. `timeout` limits every call, in seconds. `ssl` is
    a context with the certificate authorities of an `https` server. Rows of subscriptions are kept for `rows` while the
    module's setting `enable_caching` is on, up to `cache_size_mb`; `cache` decides it instead. One HTTP connection pool of
    `connections` serves all calls.
    """

    def __init__(
        self,
        url: str,
        database: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        ssl: ssl_module.SSLContext | None = None,
        cache: bool | None = None,
        cache_size_mb: int | None = None,
        connections: int = 8,
    ) -> None:
        self.url = url.rstrip("/")
        self.database = database
        self.token = token
        self.identity: str | None = None
        self._timeout = timeout
        self._ssl = ssl
        self._wants_cache = cache
        self._wants_cache_mb = cache_size_mb
        self._connections = connections
        self._cache: _Cache | None = None
        self._http: aiohttp.ClientSession | None = None
        self._tables: Tables | None = None
        self._subscriptions: list[Subscription] = []
        # What was told of each table. Rows themselves are here only while they are kept anyway.
        self._seen: dict[str, dict[bytes, Row | None]] = {}
        self._run: asyncio.Task[None] | None = None
        self._renew = asyncio.Event()
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def __aenter__(self) -> "Client":
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    async def connect(self) -> None:
        """Takes an identity if there is none, and looks at the module's tables and settings."""
        connector = aiohttp.TCPConnector(limit=self._connections, ssl=self._ssl if self._ssl is not None else True)
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        self._http = aiohttp.ClientSession(connector=connector, timeout=timeout)
        try:
            if self.token is None:
                answer = json.loads(await self._request("POST", f"{self.url}/v1/identity"))
                self.token, self.identity = answer["token"], answer["identity"]
            schema = await self._request("GET", self._path("schema?version=9"))
            self._tables = Tables(json.loads(schema))
            await self._make_cache()
        except BaseException:
            await self.disconnect()
            raise

    async def _make_cache(self) -> None:
        settings: dict[str, str] = {}
        if self._wants_cache is None or self._wants_cache_mb is None:
            # A module of another kind has no settings, and a stranger may not read them.
            with suppress(InnerUniverseError):
                settings = {row["key"]: row["value"] for row in await self.sql("SELECT key, value FROM config")}
        wanted = settings.get("enable_caching", "true") == "true" if self._wants_cache is None else self._wants_cache
        size = self._wants_cache_mb if self._wants_cache_mb is not None else int(settings.get("cache_size_mb", "512"))
        self._cache = _Cache(size << 20) if wanted else None

    async def disconnect(self) -> None:
        """Closes everything. Subscriptions end."""
        if self._run is not None:
            self._run.cancel()
            with suppress(asyncio.CancelledError):
                await self._run
            self._run = None
        if self._http is not None:
            await self._http.close()
            self._http = None
        for subscription in self._subscriptions:
            subscription._give(StopAsyncIteration())
        self._subscriptions.clear()

    def _path(self, path: str) -> str:
        return f"{self.url}/v1/database/{self.database}/{path}"

    async def _request(self, method: str, url: str, **options: Any) -> str:
        if self._http is None:
            raise InnerUniverseError("the client is not connected; call connect() first")
        headers = dict(options.pop("headers", {}))
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            async with self._http.request(method, url, headers=headers, **options) as answer:
                text = await answer.text()
                if answer.status < 400:
                    return text
                said = text.strip() or answer.reason or ""
                raise ReducerError(said) if "/call/" in url else InnerUniverseError(f"{answer.status}: {said}")
        except asyncio.TimeoutError as error:
            raise InnerUniverseError(f"{url}: no answer within {self._timeout} s; check that the server runs") from error
        except aiohttp.ClientError as error:
            raise InnerUniverseError(f"{url}: {error}; check that the server runs") from error

    async def call(self, reducer: str, *arguments: Any) -> None:
        """Calls a reducer with arguments in the server's JSON: identities as `{"__identity__": "0x..."}`, options as
        `{"some": X}` or `{"none": []}`.

        Raises ReducerError with what the reducer said when it refuses.
        """
        headers = {"Content-Type": "application/json"}
        body = json.dumps(arguments)
        await self._request("POST", self._path(f"call/{reducer}"), data=body, headers=headers)

    async def sql(self, statement: str) -> list[Row]:
        """The rows that a statement selects."""
        answers = json.loads(await self._request("POST", self._path("sql"), data=statement))
        return sql_rows(answers[0]) if answers else []

    def rows(self, table: str) -> list[Row]:
        """The rows of `table` that are subscribed to, from memory.

        Raises InnerUniverseError while caching is off, or when the rows are more than the cache may hold.
        """
        if self._cache is None:
            raise InnerUniverseError("rows are not kept: enable_caching is off; read them with sql()")
        if self._cache.full:
            raise InnerUniverseError("rows are more than cache_size_mb; read them with sql(), or raise it")
        return list(self._cache.tables.get(table, {}).values())

    async def subscribe(self, query: str) -> Subscription:
        """Subscribes to a query of the form `SELECT * FROM table [WHERE ...]`. A lost connection is made again, and what
        changed meanwhile is told then."""
        subscription = Subscription(self, query)
        self._subscriptions.append(subscription)
        await self._changed()
        return subscription

    async def _unsubscribe(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            subscription._give(StopAsyncIteration())
            await self._changed()

    async def _changed(self) -> None:
        self._renew.set()
        if self._run is None:
            self._run = asyncio.create_task(self._follow())
        elif self._socket is not None:
            await self._socket.close()

    async def _follow(self) -> None:
        wait = _FIRST_WAIT
        while True:
            if not self._subscriptions:
                self._renew.clear()
                await self._renew.wait()
            self._renew.clear()
            try:
                await self._receive()
                wait = _FIRST_WAIT
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
                pass
            except InnerUniverseError as error:
                # The server does not take the queries: trying again would not help.
                for subscription in self._subscriptions:
                    subscription._give(error)
                self._subscriptions.clear()
            if not self._renew.is_set():
                await asyncio.sleep(wait)
                wait = min(wait * 2, _LONGEST_WAIT)

    async def _receive(self) -> None:
        assert self._http is not None and self._tables is not None
        headers = {"Authorization": f"Bearer {self.token}"}
        address = self._path("subscribe")
        async with self._http.ws_connect(address, protocols=(_PROTOCOL,), headers=headers, max_msg_size=0) as socket:
            self._socket = socket
            queries = list(dict.fromkeys(subscription.query for subscription in self._subscriptions))
            request = {"Subscribe": {"query_strings": queries, "request_id": 1}}
            await socket.send_str(json.dumps(request))
            try:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        self._take(json.loads(message.data))
            finally:
                self._socket = None

    def _take(self, message: Mapping[str, Any]) -> None:
        kind, body = next(iter(message.items()))
        if kind == "IdentityToken":
            self.identity = body["identity"]["__identity__"].removeprefix("0x")
        elif kind == "InitialSubscription":
            self._take_all(body["database_update"]["tables"])
        elif kind == "TransactionUpdate":
            status = body["status"]
            if "Committed" in status:
                self._take_changes(status["Committed"]["tables"])
            elif body["reducer_call"]["reducer_name"] == "<none>":
                raise InnerUniverseError(f"the server does not take the subscription: {status.get('Failed', status)}")
        elif kind == "TransactionUpdateLight":
            self._take_changes(body["update"]["tables"])

    def _parsed(self, table: str, texts: list[Any]) -> dict[str, Row]:
        assert self._tables is not None
        rows = [self._tables.row(table, json.loads(text) if isinstance(text, str) else text) for text in texts]
        return {_key(row): row for row in rows}

    def _take_all(self, tables: list[Mapping[str, Any]]) -> None:
        """All rows anew: what differs from those that were seen before is told as changes. While caching is off, rows that
        went while the connection was lost are not told, since nobody has kept them."""
        now: dict[str, dict[str, Row]] = {}
        for table in tables:
            for update in table["updates"]:
                now.setdefault(table["table_name"], {}).update(self._parsed(table["table_name"], update["inserts"]))
        resumed = bool(self._seen)
        for name in {*now, *self._seen}:
            new = {_mark(key): (key, row) for key, row in now.get(name, {}).items()}
            old = dict(self._seen.get(name, {}))
            for mark in old.keys() - new.keys():
                self._went(name, mark, old[mark], resumed)
            for mark in new.keys() - old.keys():
                self._came(name, *new[mark], resumed)
        for subscription in self._subscriptions:
            if subscription._fresh:
                # What others were told long ago is new to this one.
                subscription._fresh = False
                for name in filter(subscription._selects, now):
                    for row in now[name].values():
                        subscription._give(Change(name, "insert", row))

    def _take_changes(self, tables: list[Mapping[str, Any]]) -> None:
        for table in tables:
            name = table["table_name"]
            for update in table["updates"]:
                for key, row in self._parsed(name, update["deletes"]).items():
                    self._went(name, _mark(key), row, False)
                for key, row in self._parsed(name, update["inserts"]).items():
                    self._came(name, key, row, False)

    def _came(self, table: str, key: str, row: Row, resumed: bool) -> None:
        if self._cache is not None:
            self._cache.insert(table, key, row)
        self._seen.setdefault(table, {})[_mark(key)] = row if self._cache is not None and not self._cache.full else None
        self._tell(Change(table, "insert", row, resumed))

    def _went(self, table: str, mark: bytes, row: Row | None, resumed: bool) -> None:
        self._seen.get(table, {}).pop(mark, None)
        if row is None:
            return
        if self._cache is not None:
            self._cache.delete(table, _key(row))
        self._tell(Change(table, "delete", row, resumed))

    def _tell(self, change: Change) -> None:
        for subscription in self._subscriptions:
            if not subscription._fresh and subscription._selects(change.table):
                subscription._give(change)
