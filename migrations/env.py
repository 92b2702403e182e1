"""Run migrations on the open connection that cellstore hands over, or on a URL.

From the command line: ``alembic -x url=sqlite:///some.db check``.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from alembic import context
from sqlalchemy import Connection, create_engine

config = context.config


def target_metadata() -> Any:
    """Return the tables to compare with; looked up by name, never imported by a revision."""
    given = config.attributes.get("target_metadata")
    return given or importlib.import_module("cellstore.models").Base.metadata


def migrate(connection: Connection) -> None:
    """Run what was asked for on ``connection``."""
    context.configure(
        connection=connection,
        target_metadata=target_metadata(),
        compare_type=True,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


def url() -> str:
    """Return the URL given with ``-x url=`` or in the environment."""
    given = context.get_x_argument(as_dictionary=True).get("url")
    found = given or os.environ.get("CELLSTORE_DATABASE_URL")
    if not found:
        raise SystemExit("Say which database: alembic -x url=sqlite:///path/cellstore.db ...")
    return found.replace("postgresql://", "postgresql+psycopg://", 1)


if "connection" in config.attributes:
    migrate(config.attributes["connection"])
else:
    with create_engine(url()).connect() as own:
        migrate(own)
        own.commit()
