"""The store of a study: SQLAlchemy over SQLite (a file in the run folder) or PostgreSQL, by Alembic.

Only the process that runs a study writes; a finished cell is written in one transaction with all that
belongs to it, so that a reader never sees half of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, Engine, ForeignKey, create_engine, event, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from palimpsest.core.errors import CannotWrite, MissingDependency

MIGRATIONS = Path(__file__).parent / "migrations"


class Table(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


class StudyRow(Table):
    """One recipe that was run: its text and the keys of its cells, in order."""

    __tablename__ = "studies"
    key: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    cells: Mapped[list[Any]]
    created: Mapped[datetime]


class CellRow(Table):
    """One method on one request with one seed."""

    __tablename__ = "cells"
    key: Mapped[str] = mapped_column(primary_key=True)
    method: Mapped[str]
    label: Mapped[str]
    request: Mapped[str]
    seeds: Mapped[dict[str, Any]]
    status: Mapped[str]
    reason: Mapped[str]
    verdict: Mapped[str | None]
    reasons: Mapped[list[Any]]
    facts: Mapped[dict[str, Any]]
    seconds: Mapped[float | None]
    peak_bytes: Mapped[int | None]
    finished: Mapped[datetime]
    findings: Mapped[list[FindingRow]] = relationship(
        cascade="all, delete-orphan", order_by="FindingRow.position", lazy="selectin"
    )
    series: Mapped[list[SeriesRow]] = relationship(cascade="all, delete-orphan", lazy="selectin")


class FindingRow(Table):
    """One finding of a cell; the columns that are searched for, and all of it as JSON."""

    __tablename__ = "findings"
    id: Mapped[int] = mapped_column(primary_key=True)
    cell: Mapped[str] = mapped_column(ForeignKey("cells.key", ondelete="CASCADE"), index=True)
    position: Mapped[int]
    audit: Mapped[str]
    name: Mapped[str]
    value: Mapped[float | None]
    k: Mapped[float | None]
    judgement: Mapped[str]
    content: Mapped[dict[str, Any]]


class SeriesRow(Table):
    """One series of a cell."""

    __tablename__ = "series"
    id: Mapped[int] = mapped_column(primary_key=True)
    cell: Mapped[str] = mapped_column(ForeignKey("cells.key", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    rows: Mapped[list[Any]]


class ArtifactRow(Table):
    """One weights file: where it lies, and what its bytes hash to."""

    __tablename__ = "artifacts"
    key: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    place: Mapped[str]
    sha256: Mapped[str]
    seconds: Mapped[float | None]
    created: Mapped[datetime]


class Store:
    """Reads and writes the tables.

    Args:
        url: SQLAlchemy URL. Missing tables are made and old ones brought up to date by Alembic.

    Raises:
        CannotWrite: If the database cannot be reached or written.
        MissingDependency: If the URL needs a driver that is not installed.
    """

    def __init__(self, url: str):
        try:
            self.engine = _engine(url)
            upgrade(self.engine)
        except ModuleNotFoundError as missing:
            raise MissingDependency(missing.name or "database driver", "postgres") from missing
        except (SQLAlchemyError, OSError) as problem:
            raise CannotWrite(f"Cannot open the store {_shown(url)}: {problem}") from problem

    def close(self) -> None:
        """Give back all connections."""
        self.engine.dispose()

    @contextmanager
    def _session(self) -> Generator[Session]:
        try:
            with Session(self.engine) as session, session.begin():
                yield session
        except DBAPIError as problem:
            raise CannotWrite(f"The store cannot be written: {problem.orig}") from problem

    def put_study(self, key: str, name: str, recipe: dict[str, Any], cells: list[str]) -> None:
        """Note that a recipe is being run; the newest is the one that is shown."""
        with self._session() as session:
            session.merge(StudyRow(key=key, name=name, recipe=recipe, cells=list(cells), created=now()))

    def newest_study(self) -> StudyRow | None:
        """The recipe that was run last."""
        with self._session() as session:
            row = session.scalars(select(StudyRow).order_by(StudyRow.created.desc())).first()
            if row is not None:
                session.expunge(row)
            return row

    def put_cell(self, row: CellRow) -> None:
        """Write a cell with its findings and series, replacing an older one of the same key."""
        with self._session() as session:
            old = session.get(CellRow, row.key)
            if old is not None:
                session.delete(old)
                session.flush()
            session.add(row)

    def cells(self, keys: Iterable[str]) -> dict[str, CellRow]:
        """Cells by key, of those that were written."""
        wanted = list(keys)
        with self._session() as session:
            rows = list(session.scalars(select(CellRow).where(CellRow.key.in_(wanted))))
            session.expunge_all()
            return {row.key: row for row in rows}

    def statuses(self, keys: Iterable[str]) -> dict[str, str]:
        """Status by key, of the cells that were written."""
        wanted = list(keys)
        with self._session() as session:
            found = session.execute(select(CellRow.key, CellRow.status).where(CellRow.key.in_(wanted)))
            return dict(found.tuples().all())

    def put_artifact(self, row: ArtifactRow) -> None:
        """Write where an artifact lies."""
        with self._session() as session:
            session.merge(row)

    def artifacts(self) -> dict[str, ArtifactRow]:
        """All artifacts by key."""
        with self._session() as session:
            rows = list(session.scalars(select(ArtifactRow)))
            session.expunge_all()
            return {row.key: row for row in rows}


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the tables to a revision (the newest by default)."""
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def downgrade(engine: Engine, revision: str = "base") -> None:
    """Bring the tables back to an older revision."""
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def now() -> datetime:
    """The time in UTC, without a zone: databases differ in what they make of one."""
    return datetime.now(UTC).replace(tzinfo=None)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as problem:
        raise CannotWrite(f"'{url}' is no database URL, such as sqlite:///study.sqlite.") from problem
    engine = create_engine(parsed, pool_pre_ping=True)
    if parsed.get_backend_name() == "sqlite":

        @event.listens_for(engine, "connect")
        def _settings(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute("PRAGMA busy_timeout=30000")
            cursor.close()

    return engine


def _shown(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
