"""The treatment that the ``Metadata_`` columns of an image table name."""

from __future__ import annotations

import re
from collections.abc import Callable

from ...terms import Control, Perturbation
from ..records import TreatmentRecord

DMSO = "DMSO"

_NAME = "Metadata_pert_iname"
_TARGET = ("Metadata_target", "Metadata_gene", "Metadata_target_list")
_JCP = "Metadata_JCP2022"
_IDENTIFIER = ("Metadata_broad_sample", _JCP)
_CONTROL = ("Metadata_control_type", "Metadata_pert_type")
_KIND = ("Metadata_perturbation", "Metadata_Perturbation", "Metadata_modality")
_CHEMISTRY = ("Metadata_InChIKey", "Metadata_smiles", "Metadata_pubchem_cid")
_KINDS = {kind.value: kind for kind in Perturbation}
_JCP_NUMBER = re.compile(r"JCP2022_([0-9])[0-9]{5}", re.ASCII)
_JCP_KINDS = {"8": Perturbation.CRISPR, "9": Perturbation.ORF}
_JCP_NOTHING = frozenset({"JCP2022_999999", "JCP2022_UNKNOWN"})
"""How JUMP writes an empty well and one of which nothing is known."""

TREATMENT_COLUMNS = (_NAME, *_TARGET, *_IDENTIFIER, *_CONTROL, *_KIND, *_CHEMISTRY)


def treatment_of(get: Callable[..., str | None]) -> TreatmentRecord | None:
    """Return the treatment of a row; ``get`` gives the first known value of some columns.

    A row that names no perturbation but its ``Metadata_JCP2022`` is called by that.
    """
    name = get(_NAME, _JCP)
    if name is None or name in _JCP_NOTHING:
        return None
    inchikey, smiles, pubchem_cid = (get(column) for column in _CHEMISTRY)
    target = get(*_TARGET)
    return TreatmentRecord(
        kind=_kind(get(*_KIND), get(_JCP)),
        pert_iname=name,
        target=None if target is None else target_of(target),
        control=control_of(get(*_CONTROL), name),
        identifier=get(*_IDENTIFIER),
        inchikey=inchikey,
        smiles=smiles,
        pubchem_cid=pubchem_cid,
    )


def target_of(text: str) -> str | None:
    """Return a target; several, separated by ``|``, become each one once, sorted, with ``|``.

    'KCNK1' stays as it is, 'HDAC2 | HDAC1|HDAC2' is 'HDAC1|HDAC2': the order in which a table
    lists the targets of a compound does not make another label. None where it lists none.
    """
    targets = {target.strip() for target in text.split("|")} - {""}
    return "|".join(sorted(targets)) or None


def _kind(written: str | None, jcp: str | None) -> Perturbation:
    """Return the kind as written, else by the first digit of a JUMP identifier."""
    number = _JCP_NUMBER.fullmatch(jcp or "")
    known = _JCP_KINDS.get(number[1] if number else "", Perturbation.COMPOUND)
    return _KINDS.get((written or "").lower(), known)


def control_of(control_type: str | None, pert_iname: str) -> Control | None:
    """Return the role that JUMP's ``control_type`` gives; DMSO is always a negative control.

    'poscon_cp', 'poscon_diverse' and 'poscon_orf' are positive controls.
    """
    if pert_iname.upper() == DMSO:
        return Control.NEGATIVE
    text = (control_type or "").lower()
    if text.startswith("poscon"):
        return Control.POSITIVE
    return Control.NEGATIVE if text.startswith("negcon") else None
