"""The tables of quality control: what is measured of an image, and what was found odd.

Part of :mod:`cellstore.db.models`, which is where to import them from.
"""

from __future__ import annotations

from sqlalchemy import Float, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from ..enums import CellFlagReason, ImageFlagReason
from .types import Base, BigId, Name, Sha256, by_value


class ImageQuality(Base):
    """What is measured of one channel of an image, as its bytes were; see ``ops.quality``.

    Intensities are grey levels, ``saturated`` and ``maximal`` shares of the pixels.
    """

    __tablename__ = "image_quality"

    image_id: Mapped[int] = mapped_column(BigId, ForeignKey("images.id"), primary_key=True)
    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"), primary_key=True)
    content_sha256: Mapped[Sha256] = mapped_column(primary_key=True)
    channel: Mapped[Name] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    power_log_log_slope: Mapped[float | None] = mapped_column(Float(53))
    sharpness: Mapped[float | None] = mapped_column(Float(53))
    saturated: Mapped[float] = mapped_column(Float(53))
    maximal: Mapped[float] = mapped_column(Float(53))
    background: Mapped[float] = mapped_column(Float(53))
    median: Mapped[float] = mapped_column(Float(53))
    mean: Mapped[float] = mapped_column(Float(53))
    std: Mapped[float] = mapped_column(Float(53))


class ImageFlag(Base):
    """A quality-control run holds an image to be odd: its value is not from ``low`` to ``high``.

    ``channel`` is an empty text where the reason is about the image and no channel of it. The
    limits depend on the other images of the plate, so flags belong to a run and never change.
    """

    __tablename__ = "image_flags"

    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), primary_key=True)
    image_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("images.id"), primary_key=True, index=True
    )
    reason: Mapped[ImageFlagReason] = mapped_column(by_value(ImageFlagReason), primary_key=True)
    channel: Mapped[Name] = mapped_column(primary_key=True)
    value: Mapped[float] = mapped_column(Float(53))
    low: Mapped[float | None] = mapped_column(Float(53))
    high: Mapped[float | None] = mapped_column(Float(53))


class CellFlag(Base):
    """A quality-control run holds a cell to be odd; ``value``: its area in pixels, if that is why.

    Cells without perimeter are not here: they never count (``cells.excluded``).
    """

    __tablename__ = "cell_flags"

    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), primary_key=True)
    cell_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("cells.id"), primary_key=True, index=True
    )
    reason: Mapped[CellFlagReason] = mapped_column(by_value(CellFlagReason), primary_key=True)
    value: Mapped[float | None] = mapped_column(Float(53))
