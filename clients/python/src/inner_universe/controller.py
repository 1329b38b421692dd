"""Deploys, starts, stops, backs up and restores, by the command line `inner-universe`."""

from __future__ import annotations

import asyncio
import json
import os
import ssl as ssl_module
import tempfile
from pathlib import Path
from typing import Any, Mapping

from .client import Client
from .errors import InnerUniverseError, of_exit

Report = dict[str, Any]

_SECTIONS: dict[str, tuple[str, ...]] = {
    "module_config": ("module_dir", "module_path", "build_module"),
    "spacetimedb_config": (
        "db_path",
        "address",
        "port",
        "log_level",
        "url",
        "database",
        "token_file",
        "server_bin",
        "key_dir",
        "ca_file",
    ),
    "server_config": ("max_connections", "timeout_ms", "cache_size_mb", "auth_required"),
    "feature_flags": (
        "enable_state_versioning",
        "enable_audit_log",
        "enable_metrics",
        "enable_caching",
        "enable_distribution",
    ),
}


class InnerUniverseController:
    """Drives one deployment.

    `config` is the configuration: a file in TOML, JSON or YAML, or its sections as a mapping, or their keys alone
    (`{"module_path": ..., "db_path": ...}`). `binary` is the command line, found on the PATH; `environment` is added to
    this process' own, for example `INNER_UNIVERSE__REPOSITORY__URL`.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | os.PathLike[str],
        *,
        binary: str | os.PathLike[str] = "inner-universe",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.binary = os.fspath(binary)
        self.client: Client | None = None
        self._environment = {**os.environ, **(environment or {})}
        self._made: tempfile.TemporaryDirectory[str] | None = None
        if isinstance(config, Mapping):
            self.config: Mapping[str, Any] = config
            self._made = tempfile.TemporaryDirectory(prefix="inner-universe-")
            self._file = Path(self._made.name) / "config.json"
            # It may hold secrets.
            handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(_sections(config), file, default=str)
        else:
            self.config = {}
            self._file = Path(config)

    async def init_repository(self, *, replace: bool = False) -> Report:
        """Makes the repository that the configuration names, once: nothing else but a first backup does. One that is there is
        used; with `replace` also in the place of another that this data directory was archived to."""
        return await self.run("repository", "init", *_flags(replace=replace))

    async def deploy(self) -> Report:
        """Deploys the module: builds it if the configuration says so, publishes it, sets it up and verifies it."""
        return {"status": "deployed", **await self.run("deploy")}

    async def rollback(self, *, data: bool = False, dry_run: bool = False) -> Report:
        """Goes back to the module that was deployed before; with `data` the rows go back too."""
        return await self.run("deploy", "rollback", *_flags(data=data, dry_run=dry_run))

    async def start_server(self, *, connect: bool = True) -> Client | Report:
        """Starts the server in the background, unless it runs already, and connects a client to the database."""
        report = await self.run("server", "start")
        if not connect:
            return report
        await self._disconnect()
        settings = {setting["key"]: setting["value"] for setting in await self._settings()}
        token_file = await self._token_file(settings)
        ca_file = settings.get("spacetimedb_config.ca_file")
        self.client = Client(
            report["url"],
            settings.get("spacetimedb_config.database") or "inner-universe",
            token=token_file.read_text(encoding="utf-8").strip() if token_file else None,
            timeout=float(settings.get("server_config.timeout_ms", 30_000)) / 1000,
            ssl=ssl_module.create_default_context(cafile=ca_file) if ca_file else None,
        )
        await self.client.connect()
        return self.client

    async def stop(self) -> Report:
        """Disconnects the client and stops the server."""
        await self._disconnect()
        return {"status": "stopped", **await self.run("server", "stop")}

    async def status(self) -> Report:
        """What runs: the server, and what is archived where a repository is named."""
        server = await self.run("server", "status", accept=(0, 3))
        try:
            archive: Report | None = await self.run("status")
        except InnerUniverseError:
            archive = None
        return {"server": server, "archive": archive}

    async def doctor(self) -> Report:
        """The deployment checklist; `ok` says whether nothing fails."""
        return await self.run("doctor", accept=(0, 3))

    async def backup(self, label: str | None = None) -> Report:
        """Takes a restore point; the server keeps running."""
        return await self.run("backup", "create", *(("--label", label) if label else ()))

    async def restore(
        self,
        to: str = "latest",
        *,
        data_dir: str | os.PathLike[str] | None = None,
        force: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Restores the data directory, or another, to a target such as `latest`, `offset:N`, `time:T` or `label:L`. The
        server must be stopped; with `force` what is there is moved aside."""
        where = ("--data-dir", os.fspath(data_dir)) if data_dir is not None else ()
        return await self.run("restore", "--to", to, *where, *_flags(force=force, dry_run=dry_run))

    async def run(self, *arguments: str, accept: tuple[int, ...] = (0,)) -> Report:
        """Runs any verb and returns its JSON.

        Raises InnerUniverseError, or one of its kinds, with the exit code and the message when it fails.
        """
        command = [self.binary, "--json", "--config", os.fspath(self._file), *arguments]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self._environment,
            )
        except OSError as error:
            raise InnerUniverseError(f"start {self.binary}: {error}; install inner-universe, or give its path") from error
        try:
            stdout, stderr = await process.communicate()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
        code = process.returncode if process.returncode is not None else 1
        try:
            report: Any = json.loads(stdout)
        except ValueError:
            report = {}
        if code in accept:
            return report if isinstance(report, dict) else {"result": report}
        message = report.get("error") if isinstance(report, dict) else None
        raise of_exit(code, message or stderr.decode(errors="replace").strip() or f"exit code {code}")

    async def _settings(self) -> list[dict[str, Any]]:
        report = await self.run("config", "show")
        settings: list[dict[str, Any]] = report.get("result", [])
        return settings

    async def _token_file(self, settings: Mapping[str, Any]) -> Path | None:
        named = settings.get("spacetimedb_config.token_file")
        if named:
            return Path(named)
        own = (await self.run("server", "status", accept=(0, 3))).get("token_file")
        return Path(own) if own else None

    async def _disconnect(self) -> None:
        if self.client is not None:
            await self.client.disconnect()
            self.client = None


def _flags(**flags: bool) -> tuple[str, ...]:
    return tuple(f"--{name.replace('_', '-')}" for name, given in flags.items() if given)


def _sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that stand alone go into their sections; a mapping is a section already."""
    known = {key: section for section, keys in _SECTIONS.items() for key in keys}
    sections: dict[str, Any] = {name: dict(keys) for name, keys in config.items() if isinstance(keys, Mapping)}
    for key, value in config.items():
        if isinstance(value, Mapping):
            continue
        if key not in known:
            raise ValueError(f"`{key}` is no key of the configuration; put it into its section")
        sections.setdefault(known[key], {})[key] = value
    # As the seed has it: the module is built unless the configuration says otherwise.
    if "module_dir" in config and "build_module" not in config and "module_config" not in config:
        sections["module_config"].setdefault("build_module", True)
    return sections
