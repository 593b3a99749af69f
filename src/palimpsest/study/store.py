"""The store of a study: SQLAlchemy over SQLite (a file in the run folder) or PostgreSQL, by Alembic.

Only the process that runs a study writes for it; a finished cell is written in one transaction with all
that belongs to it, so that a reader never sees half of it. Several studies may share a PostgreSQL store.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, create_engine, delete, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from palimpsest.core.errors import CannotWrite, MissingDependency
from palimpsest.study.tables import ArtifactRow, CellRow, StudyRow, now

T = TypeVar("T")
MIGRATIONS = Path(__file__).parent / "migrations"
WRITE_LOCK = 7_267_101
"""Number of the PostgreSQL advisory lock that a writer takes; SQLite has one writer by itself."""
MIGRATING = threading.Lock()
"""Alembic keeps what it works on in its module."""
PATIENCE = 30
"""Seconds to wait for other connections to a SQLite file."""


class Store:
    """Reads and writes the tables.

    Args:
        url: SQLAlchemy URL. Missing tables are made and old ones brought up to date by Alembic.

    Raises:
        CannotWrite: If the database cannot be reached or written, or was made by a newer release.
        MissingDependency: If the URL needs a driver that is not installed.
    """

    def __init__(self, url: str | URL):
        self.shown = _shown(url)
        try:
            self.engine = connect(url)
            upgrade(self.engine)
        except ModuleNotFoundError as missing:
            raise MissingDependency(missing.name or "database driver", "postgres") from missing
        except (SQLAlchemyError, OSError) as problem:
            raise CannotWrite(
                f"Cannot open the store {self.shown}: {getattr(problem, 'orig', problem)}"
            ) from problem

    def close(self) -> None:
        """Give back all connections."""
        self.engine.dispose()

    def put_study(self, key: str, name: str, recipe: dict[str, Any], cells: list[str]) -> None:
        """Note that a recipe is being run."""

        def write(session: Session) -> None:
            session.merge(StudyRow(key=key, name=name, recipe=recipe, cells=cells, created=now()))

        self._transaction(write, writes=True)

    def study(self, key: str) -> StudyRow | None:
        """A recipe that was run."""
        return self._transaction(lambda session: session.get(StudyRow, key))

    def put_cell(self, row: CellRow, artifact: ArtifactRow | None = None) -> None:
        """Write a cell with its findings and series and the weights it left, replacing an older one."""

        def write(session: Session) -> None:
            session.execute(delete(CellRow).where(CellRow.key == row.key))
            session.add(row)
            if artifact is not None:
                session.merge(artifact)

        self._transaction(write, writes=True)

    def cells(self, keys: Iterable[str]) -> dict[str, CellRow]:
        """Cells by key, of those that were written."""
        wanted = list(keys)

        def read(session: Session) -> dict[str, CellRow]:
            rows = session.scalars(select(CellRow).where(CellRow.key.in_(wanted)))
            return {row.key: row for row in rows}

        return self._transaction(read)

    def statuses(self, keys: Iterable[str]) -> dict[str, str]:
        """Status by key, of the cells that were written."""
        wanted = list(keys)

        def read(session: Session) -> dict[str, str]:
            found = session.execute(select(CellRow.key, CellRow.status).where(CellRow.key.in_(wanted)))
            return {row.key: row.status for row in found}

        return self._transaction(read)

    def put_artifact(self, row: ArtifactRow) -> None:
        """Write where an artifact lies."""
        self._transaction(lambda session: session.merge(row), writes=True)

    def artifacts(self, keys: Iterable[str]) -> dict[str, ArtifactRow]:
        """Artifacts by key, of those that were written."""
        wanted = list(keys)

        def read(session: Session) -> dict[str, ArtifactRow]:
            rows = session.scalars(select(ArtifactRow).where(ArtifactRow.key.in_(wanted)))
            return {row.key: row for row in rows}

        return self._transaction(read)

    def _transaction(self, do: Callable[[Session], T], writes: bool = False) -> T:
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                if writes:
                    _alone(session.connection())
                return do(session)
        except SQLAlchemyError as problem:
            reason = getattr(problem, "orig", None) or problem
            raise CannotWrite(f"The store {self.shown} cannot be read or written: {reason}") from problem


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the tables to a revision (the newest by default), wholly or not at all."""
    _migrate(engine, command.upgrade, revision)


def downgrade(engine: Engine, revision: str = "base") -> None:
    """Bring the tables back to an older revision."""
    _migrate(engine, command.downgrade, revision)


def connect(url: str | URL) -> Engine:
    """An engine for a URL.

    Raises:
        CannotWrite: If it is no database URL.
        ModuleNotFoundError: If its driver is not installed.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, pool_pre_ping=True)
    except ArgumentError as problem:
        raise CannotWrite(f"'{url}' is no database URL, such as sqlite:///study.sqlite.") from problem
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # Without this the driver ends a transaction at every CREATE TABLE, and a kill leaves half the tables.
    connection.isolation_level = None
    for setting in (f"busy_timeout={1000 * PATIENCE}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:  # this one setting does not wait for other connections by itself
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that starts reading and then writes would fail at once if another wrote meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(engine: Engine, move: Callable[[Config, str], None], revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        _alone(connection)
        config.attributes["connection"] = connection
        try:
            with MIGRATING:
                move(config, revision)
        except command.util.CommandError as problem:
            raise CannotWrite(
                f"The tables of {_shown(engine.url)} cannot be migrated: {problem}"
            ) from problem


def _alone(connection: Connection) -> None:
    """Wait until no other transaction writes: two that replace the same cell would trip over its key."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": WRITE_LOCK})


def _shown(url: str | URL) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return str(url)
