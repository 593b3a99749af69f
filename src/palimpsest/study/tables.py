"""The tables of a store, as SQLAlchemy maps them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


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
    detail: Mapped[str]
    verdict: Mapped[str | None]
    reasons: Mapped[list[Any]]
    facts: Mapped[dict[str, Any]]
    seconds: Mapped[float | None]
    peak_bytes: Mapped[int | None] = mapped_column(BigInteger)
    started: Mapped[datetime]
    finished: Mapped[datetime]
    findings: Mapped[list[FindingRow]] = relationship(
        cascade="all, delete-orphan", order_by="FindingRow.position", lazy="selectin"
    )
    series: Mapped[list[SeriesRow]] = relationship(
        cascade="all, delete-orphan", order_by="SeriesRow.id", lazy="selectin"
    )


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


def now() -> datetime:
    """The time in UTC, without a zone: databases differ in what they make of one."""
    return datetime.now(UTC).replace(tzinfo=None)
