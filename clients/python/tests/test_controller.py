"""The controller and the client on a real server, through the real command line."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import AsyncIterator

import pytest
import pytest_asyncio

from inner_universe import (
    Client,
    InnerUniverseController,
    InnerUniverseError,
    NothingToRestoreError,
    ReducerError,
    RefusedError,
    UsageError,
)

BINARY = os.environ["INNER_UNIVERSE_BIN"]
MODULES = Path(os.environ["INNER_UNIVERSE_WASM_DIR"])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def seed(tmp_path: Path, **changes: object) -> dict[str, dict[str, object]]:
    """The seed's configuration, but for paths and the port."""
    config: dict[str, dict[str, object]] = {
        "module_config": {
            "module_dir": str(tmp_path),
            "module_path": str(MODULES / "inner_universe_module.wasm"),
            "build_module": False,
        },
        "spacetimedb_config": {
            "db_path": str(tmp_path / "data"),
            "address": "127.0.0.1",
            "port": free_port(),
            "log_level": "info",
        },
        "server_config": {"max_connections": 100, "timeout_ms": 30000, "cache_size_mb": 512, "auth_required": True},
        "feature_flags": {
            "enable_state_versioning": True,
            "enable_audit_log": True,
            "enable_metrics": True,
            "enable_caching": True,
            "enable_distribution": False,
        },
    }
    for key, value in changes.items():
        section = next(section for section in config.values() if key in section)
        section[key] = value
    return config


def controller_of(tmp_path: Path, config: dict[str, dict[str, object]]) -> InnerUniverseController:
    return InnerUniverseController(
        config,
        binary=BINARY,
        environment={
            "INNER_UNIVERSE__ARCHIVE__STATE_DIR": str(tmp_path / "state"),
            "INNER_UNIVERSE__REPOSITORY__URL": f"file://{tmp_path}/repository",
            "INNER_UNIVERSE__SPACETIMEDB_CONFIG__SERVER_BIN": os.environ["SPACETIMEDB_STANDALONE"],
            "INNER_UNIVERSE__HTTP__LISTEN": "127.0.0.1:0",
        },
    )


@pytest_asyncio.fixture
async def controller(tmp_path: Path) -> AsyncIterator[InnerUniverseController]:
    controller = controller_of(tmp_path, seed(tmp_path))
    report = await controller.init_repository()
    assert report["created"] and not (await controller.init_repository())["created"]
    yield controller
    await controller.stop()


async def started(controller: InnerUniverseController) -> Client:
    client = await controller.start_server()
    assert isinstance(client, Client)
    return client


async def test_the_seeds_configuration_is_deployed_started_called_and_stopped(
    controller: InnerUniverseController,
) -> None:
    report = await controller.deploy()
    assert report["status"] == "deployed" and report["outcome"] == "deployed"
    client = await started(controller)
    await client.call("create_entity", "sun", "star", '{"n": 1}')
    rows = await client.sql("SELECT * FROM entity")
    assert [(row["entity_id"], row["version"]) for row in rows] == [("sun", 1)]
    assert rows[0]["created_at"].tzinfo is not None and len(rows[0]["updated_by"]) == 64
    events = await client.sql("SELECT * FROM event_log WHERE event_type = 'ENTITY_CREATED'")
    assert events[0]["source"] == "sun" and events[0]["data"]["tag"] == "Change"
    assert events[0]["data"]["value"]["operation"] == "Create"
    status = await controller.status()
    assert status["server"]["ready"] and status["server"]["started_by"] == "background"
    assert (await controller.stop())["status"] == "stopped"
    assert not (await controller.status())["server"]["running"]
    client = await started(controller)
    assert len(await client.sql("SELECT * FROM entity")) == 1, "what was written is still there"


async def test_errors_carry_exit_code_and_hint(controller: InnerUniverseController, tmp_path: Path) -> None:
    with pytest.raises(NothingToRestoreError) as nothing:
        await controller.restore()
    assert nothing.value.exit_code == 4
    await controller.deploy()
    client = await started(controller)
    with pytest.raises(ReducerError, match="no entity `nowhere`"):
        await client.call("delete_entity", "nowhere")
    with pytest.raises(RefusedError) as refused:
        await controller.restore(force=True)
    assert refused.value.exit_code == 6 and "stop it" in refused.value.message
    with pytest.raises(UsageError) as usage:
        await controller_of(tmp_path, seed(tmp_path, module_path="/nowhere.wasm")).deploy()
    assert usage.value.exit_code == 2
    with pytest.raises(InnerUniverseError, match="give its path"):
        await InnerUniverseController({}, binary="/nowhere/inner-universe").status()
    with pytest.raises(ValueError, match="`modul_path`"):
        InnerUniverseController({"modul_path": "x"})


async def test_a_backup_is_restored_and_a_failed_deployment_taken_back(
    controller: InnerUniverseController, tmp_path: Path
) -> None:
    await controller.deploy()
    client = await started(controller)
    await client.call("create_entity", "kept", "thing", "{}")
    # The server answers a moment before it writes.
    await asyncio.sleep(1)
    backup = await controller.backup(label="then")
    assert backup["label"] == "then"
    await client.call("create_entity", "late", "thing", "{}")
    module = seed(tmp_path, module_path=str(MODULES / "inner_universe_module_broken.wasm"))
    same_server = {"spacetimedb_config": dict(controller.config["spacetimedb_config"])}
    broken = controller_of(tmp_path, {**module, **same_server})
    with pytest.raises(InnerUniverseError, match="right before the publish"):
        await broken.deploy()
    await controller.stop()
    plan = await controller.restore("label:then", force=True, dry_run=True)
    assert plan["dry_run"]
    restored = await controller.restore("label:then", force=True)
    assert Path(restored["moved_aside"]).is_dir()
    client = await started(controller)
    assert [row["entity_id"] for row in await client.sql("SELECT * FROM entity")] == ["kept"]


async def test_a_subscription_outlives_its_server_and_tells_what_changed(controller: InnerUniverseController) -> None:
    await controller.deploy()
    client = await started(controller)
    await client.call("create_entity", "a", "thing", "{}")
    subscription = await client.subscribe("SELECT * FROM entity")

    async def next_change() -> tuple[str, str, bool]:
        change = await asyncio.wait_for(anext(subscription), 30)
        return change.kind, change.row["entity_id"], change.resumed

    assert await next_change() == ("insert", "a", False)
    await client.call("create_entity", "b", "thing", "{}")
    assert await next_change() == ("insert", "b", False)
    assert sorted(row["entity_id"] for row in client.rows("entity")) == ["a", "b"]
    # Another client changes things while this one's connection is gone.
    await controller.run("server", "stop")
    report = await controller.run("server", "start")
    other = Client(report["url"], "inner-universe", token=client.token)
    async with other:
        await other.call("delete_entity", "a")
        await other.call("create_entity", "c", "thing", "{}")
    changes = {(await next_change())[:2] for _ in range(2)}
    assert changes == {("delete", "a"), ("insert", "c")}
    assert sorted(row["entity_id"] for row in client.rows("entity")) == ["b", "c"]
    await subscription.close()
    with pytest.raises(StopAsyncIteration):
        await anext(subscription)
    bad = await client.subscribe("SELECT * FROM nowhere")
    with pytest.raises(InnerUniverseError, match="nowhere"):
        await asyncio.wait_for(anext(bad), 30)


async def test_caching_is_what_the_configuration_says(tmp_path: Path) -> None:
    controller = controller_of(tmp_path, seed(tmp_path, enable_caching=False))
    try:
        await controller.init_repository()
        await controller.deploy()
        client = await started(controller)
        await client.call("create_entity", "a", "thing", "{}")
        subscription = await client.subscribe("SELECT * FROM entity")
        assert (await asyncio.wait_for(anext(subscription), 30)).row["entity_id"] == "a"
        with pytest.raises(InnerUniverseError, match="enable_caching"):
            client.rows("entity")
        async with Client(client.url, client.database, token=client.token, cache=True, cache_size_mb=1) as small:
            watching = await small.subscribe("SELECT * FROM entity")
            await asyncio.wait_for(anext(watching), 30)
            assert len(small.rows("entity")) == 1
            await client.call("create_entity", "large", "thing", "x" * 2_000_000)
            await asyncio.wait_for(anext(watching), 30)
            with pytest.raises(InnerUniverseError, match="cache_size_mb"):
                small.rows("entity")
    finally:
        await controller.stop()


async def test_a_call_ends_after_timeout_ms(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100_000)
        await asyncio.sleep(60)

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", "nowhere", token="none", timeout=0.2)
    with pytest.raises(InnerUniverseError, match="no answer within 0.2 s"):
        await client.connect()
    server.close()


def test_flat_keys_become_sections() -> None:
    from inner_universe.controller import _sections

    flat = {"module_dir": "/m", "module_path": "/m.wasm", "db_path": "/d", "port": 3000, "repository": {"url": "file:///r"}}
    assert _sections(flat) == {
        "module_config": {"module_dir": "/m", "module_path": "/m.wasm", "build_module": True},
        "spacetimedb_config": {"db_path": "/d", "port": 3000},
        "repository": {"url": "file:///r"},
    }
