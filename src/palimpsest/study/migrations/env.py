"""Alembic's environment: the connection comes from the store that asks for the migration."""

from alembic import context

from palimpsest.study.tables import Table

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Table.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
