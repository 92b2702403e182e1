"""The tables of splits. Triggers guard them on both databases; see ``db.guards``.

Part of :mod:`cellstore.db.models`, which is where to import them from.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Text
from sqlalchemy.orm import Mapped, mapped_column

from ..enums import GroupLevel, LabelField, Subset
from .types import Base, BigId, Id, Name, Sha256, by_value


class Split(Base):
    """A named assignment of images to sides; ``frozen_at``: since when a run relies on it.

    Splits of one ``family`` are the folds of a cross-validation, numbered from 1 (``fold``).
    Triggers: a frozen split never changes, nor does the group level of any; the first run that
    names a split freezes it.
    """

    __tablename__ = "splits"

    id: Mapped[Id]
    name: Mapped[Name] = mapped_column(unique=True)
    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"))
    protocol: Mapped[Name]
    field: Mapped[LabelField] = mapped_column(by_value(LabelField))
    group_level: Mapped[GroupLevel] = mapped_column(by_value(GroupLevel))
    seed: Mapped[int]
    query: Mapped[str] = mapped_column(Text)
    fingerprint: Mapped[Sha256]
    left_out: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    frozen_at: Mapped[datetime | None]
    family: Mapped[Name | None]
    fold: Mapped[int | None]


class SplitMember(Base):
    """The side and the label of one image in one split.

    Triggers: none comes, changes or goes once the split is frozen, and its side is that of its
    group (:class:`SplitGroup`).
    """

    __tablename__ = "split_members"

    split_id: Mapped[int] = mapped_column(BigId, ForeignKey("splits.id"), primary_key=True)
    image_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("images.id"), primary_key=True, index=True
    )
    subset: Mapped[Subset] = mapped_column(by_value(Subset))
    label_id: Mapped[int] = mapped_column(BigId, ForeignKey("labels.id"))


class SplitGroup(Base):
    """The one side of a group in a split: what keeps a well, plate or treatment together.

    ``group_id`` is the id of the well, plate or treatment, as the group level of the split says;
    splits by image have no groups. Triggers write these rows as members come in, and refuse a
    member on another side, so that no two programs at once can put a group on two sides.
    """

    __tablename__ = "split_groups"

    split_id: Mapped[int] = mapped_column(BigId, ForeignKey("splits.id"), primary_key=True)
    group_id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=False)
    subset: Mapped[Subset] = mapped_column(by_value(Subset))
