"""``--where``: a condition on images, typed as SQL, checked word by word before it is used.

sqlglot reads it; only names of columns, values and plain comparisons go on, as SQLAlchemy
expressions with bound values. What is not listed here never reaches the database.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sqlglot
from sqlalchemy import ColumnElement, String, and_, false, func, not_, null, or_, select, true
from sqlglot import exp
from sqlglot.errors import SqlglotError

from ..db.fields import of_parts
from ..errors import UnknownNameError, UserInputError
from ..models import Image, Perturbation, Plate, Treatment, TreatmentPart, Well

_DOSE = (
    select(func.max(TreatmentPart.dose))
    .where(TreatmentPart.treatment_id == Treatment.id)
    .having(func.count() == 1)  # several perturbations have no one dose
    .correlate(Treatment)
    .scalar_subquery()
)

COLUMNS: Mapping[str, Any] = {
    "plate": Plate.barcode,
    "batch": Plate.batch,
    "well": Well.name,
    "well_row": Well.well_row,
    "well_column": Well.well_column,
    "site": Image.site,
    "plane": Image.plane,
    "time_point": Image.time_point,
    "image": Image.core_name,
    "image_id": Image.id,
    "treatment": Treatment.name,
    "perturbation": Treatment.name,  # as the label field of this name
    "name_with_dose": Treatment.name_with_dose,
    "dose": _DOSE,
    "target": Treatment.target,
    "kind": of_parts(Perturbation.kind),
    "control": Well.control,
    "identifier": of_parts(Perturbation.identifier),
}
"""What a condition may name."""

_COMPARISONS: Mapping[type[exp.Expression], Callable[[Any, Any], Any]] = {
    exp.EQ: operator.eq,
    exp.NEQ: operator.ne,
    exp.GT: operator.gt,
    exp.GTE: operator.ge,
    exp.LT: operator.lt,
    exp.LTE: operator.le,
    exp.Like: lambda left, right: left.like(right),
    exp.ILike: lambda left, right: left.ilike(right),
    exp.Is: lambda left, right: left.is_(right),
}
_EXAMPLE = "\"plate = 'P1' AND well_column <= 12 AND treatment <> 'DMSO'\""


def condition(text: str) -> ColumnElement[bool]:
    """Return the SQL condition ``text`` over :data:`COLUMNS` as an expression.

    It knows ``AND``, ``OR``, ``NOT``, comparisons with values, ``IN`` lists, ``BETWEEN``, ``LIKE``,
    ``ILIKE`` and ``IS NULL``.
    """
    if not text.strip():
        raise _refused(text, "it is empty")
    try:
        parsed = sqlglot.parse(f"({text}\n)", dialect="duckdb")
        if len(parsed) != 1 or not isinstance(parsed[0], exp.Paren):
            raise _refused(text, "it is more than one condition")
        return _condition(parsed[0].this)
    except SqlglotError as error:
        raise _refused(text, "it cannot be read") from error
    except RecursionError as error:
        raise _refused(text, "it is nested too deeply") from error


def _refused(text: str, why: str) -> UserInputError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return UserInputError(
        f"The condition {shown!r} is not usable: {why}. Write it like {_EXAMPLE}, "
        f"over: {', '.join(COLUMNS)}."
    )


def _condition(node: Any) -> ColumnElement[bool]:
    match node:
        case exp.Paren():
            return _condition(node.this)
        case exp.And():
            return and_(_condition(node.left), _condition(node.right))
        case exp.Or():
            return or_(_condition(node.left), _condition(node.right))
        case exp.Not():
            return not_(_condition(node.this))
        case exp.Boolean():
            return true() if node.this else false()
    found: ColumnElement[bool] = _comparison(node)
    return found


def _comparison(node: Any) -> Any:
    if isinstance(node, exp.In) and node.expressions and not node.args.get("query"):
        left = _column(node.this)
        return left.in_([_value(item, left) for item in node.expressions])
    if isinstance(node, exp.Between):
        left = _column(node.this)
        return left.between(_value(node.args["low"], left), _value(node.args["high"], left))
    compare = _COMPARISONS.get(type(node))
    if compare is None:
        raise _refused(node.sql(), "this is no comparison that is known here")
    left = _column(node.this)
    if isinstance(node, exp.Like | exp.ILike) and not _is_text(left):
        raise _refused(node.sql(), "LIKE is for columns of text")
    if isinstance(node, exp.Is) and not isinstance(node.expression, exp.Null):
        raise _refused(node.sql(), "IS goes with NULL; compare values with =")
    return compare(left, _value(node.expression, left))


def _is_text(column: Any) -> bool:
    return isinstance(column.type, String)


def _column(node: Any) -> Any:
    if not isinstance(node, exp.Column) or len(node.parts) > 1:
        raise _refused(node.sql(), "the left side of a comparison is the name of a column")
    name = node.name.lower()
    if name not in COLUMNS:
        raise UnknownNameError.of("column", node.name, COLUMNS)
    # These two are compared by the value that is stored.
    return COLUMNS[name].cast(String) if name in {"kind", "control"} else COLUMNS[name]


def _value(node: Any, left: Any) -> Any:
    """A plain value, of the kind of the column ``left``."""
    if isinstance(node, exp.Null):
        return null()
    literal = node.this if isinstance(node, exp.Neg) else node
    if isinstance(node, exp.Column):
        raise _refused(node.sql(), f"{node.sql()} is no value; put text in single quotes")
    if not isinstance(literal, exp.Literal) or (literal is not node and literal.is_string):
        raise _refused(node.sql(), "this is no plain value")
    if literal.is_string is not _is_text(left):
        kind = "text; put it in single quotes" if _is_text(left) else "a number"
        raise _refused(node.sql(), f"the column takes {kind}")
    if literal.is_string:
        return literal.this
    number = int(literal.this) if literal.this.isdecimal() else float(literal.this)
    if abs(number) >= 2**63:
        raise _refused(node.sql(), "the number is too large")
    return number if literal is node else -number
