"""Which images train a network and which test it.

Whatever is drawn here depends on the seed and on the identifiers alone, not on the order of the
input. Down-sampling, grouping and folds order their candidates by the SHA-256 of seed and
identifier, which no version of Python, NumPy or scikit-learn can change. The published protocol
draws with scikit-learn's ``StratifiedShuffleSplit``, hence with NumPy's ``RandomState``, whose
stream is frozen (NEP 19). Folds of groups that hold several classes come from
``StratifiedGroupKFold`` without its shuffle, which scikit-learn 1.8 changed (its issue 32478).
"""

from __future__ import annotations

from .balancing import Cap as Cap
from .balancing import balanced as balanced
from .balancing import enough as enough
from .folds import folds as folds
from .images import Assignment as Assignment
from .images import LeftOut as LeftOut
from .images import SplitImage as SplitImage
from .sides import cut_by_groups as cut_by_groups
from .sides import grouped_split as grouped_split
from .sides import named_split as named_split
from .sides import published_split as published_split
