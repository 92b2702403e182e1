"""Which treatments differ from the controls: scores of wells, a rule, and a verdict on each.

The wells are those of a profile run. Plates of one cell line and time point are compared together;
the scores are those of ``analysis.activity``, the curves those of ``analysis.dose_curves``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from math import comb, inf, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from ..config import HitsParams
from ..db.bulk import in_lists
from ..db.fields import changed_since
from ..enums import Control, ScoreLevel, Stage, Verdict
from ..errors import UnknownNameError, UserInputError, by_number, some_of
from ..jobs.run_names import NamedRun, find_predict_run
from ..jobs.runs import (
    RecipeSpec,
    digest,
    digest_of_numbers,
    finished_run,
    result_of,
    running,
)
from ..jobs.workspace import Workspace
from ..models import Recipe, Run, Treatment, TreatmentScore
from ..notebooks import Shown
from ..query.cells import trainings_of_features
from ..query.engine import open_questions
from ..settings import need, track
from .profile import open_profiles

if TYPE_CHECKING:
    import pandas as pd

    from ..analysis.activity import Score
    from ..analysis.well_profiles import WellProfiles

VERSION = 1
FEWEST_WELLS = 2
"""Of a treatment with one well nobody can say whether it would come out the same again."""
FEWEST_DOSES = 2
PROBABILITY = "probability:"
PACKAGES = ("copairs", "pycytominer", "scipy")
ORDER = (Verdict.HIT, Verdict.FEWER_CELLS, Verdict.SMALL, Verdict.UNKNOWN, Verdict.NO)
"""Of the verdicts in a ranked table."""

Numbers = NDArray[np.float64]
Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class HitRow:
    """A treatment with its dose against the controls of the plates of one plate set.

    ``effect``: how much farther its wells are from the controls than controls are from each other,
    in standard deviations (see ``activity.effects``), with a 95 % interval. ``activity`` is a mean
    average precision in 0..1, with ``p`` and ``q`` of the measure that the rule reads.
    ``cell_count`` is the ratio to the controls, with its own q. ``note`` says in words why the
    verdict is so.
    """

    name: str
    verdict: str
    note: str | None
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    activity: float | None
    p: float | None
    q: float | None
    cell_count: float | None
    cell_count_low: float | None
    cell_count_high: float | None
    cell_count_q: float | None
    replicate_correlation: float | None
    n_wells: int
    n_controls: int
    n_plates: int
    target: str | None
    plate_set: str
    cell_line: str | None
    time_point: str | None
    treatment_id: int | None


@dataclass(frozen=True)
class TargetRow:
    """Whether the perturbations of one target that are hits look alike: ``consistency`` in 0..1."""

    target: str
    consistency: float | None
    p: float | None
    q: float | None
    perturbations: int
    plate_set: str
    note: str | None


@dataclass(frozen=True)
class DoseRow:
    """How a quantity of a perturbation changes with the dose, doses in ``unit``.

    ``ec50`` with its 95 % interval is ``None`` where it is not determined; ``note`` says why.
    ``trend_p``: of a trend in one direction. ``lowest_active``: the lowest dose from which on all
    differ from the controls.
    """

    name: str
    quantity: str
    ec50: float | None
    low: float | None
    high: float | None
    unit: str | None
    trend: float | None
    trend_p: float | None
    lowest_active: float | None
    plate_set: str
    note: str | None


@dataclass(frozen=True)
class HitsResult(Shown):
    """Treatments against the controls of their plates: hits first, by effect.

    ``tested`` of ``treatments`` could be judged; ``hits`` differ from the controls, and so do
    ``fewer_cells``, by their cell count alone. ``plate_sets``: the barcodes of the plates that were
    compared together, by name. ``already_done``: the run was there before this call.
    """

    run_id: int
    recipe_id: int
    already_done: bool
    answer: str
    rule: str
    profile_run: int
    feature_set: str | None
    columns: int
    control: str
    measure: str
    treatments: int
    tested: int
    hits: int
    fewer_cells: int
    plate_sets: Mapping[str, Sequence[str]]
    strata: Mapping[str, str]
    versions: Mapping[str, str]
    rows: tuple[HitRow, ...]
    targets: tuple[TargetRow, ...]
    doses: tuple[DoseRow, ...]
    notes: tuple[str, ...]
    html: str | None = None


@dataclass
class PlateSet:
    """The N wells of the plates of one cell line and time point that are compared together.

    ``treatments``: rows with treatment_id, name, perturbation (its name without doses), dose,
    dose_unit and target. ``groups`` (N,): the position in ``treatments`` of each well's, -1 of a
    control. ``plates`` (N,) number the plates, ``counts`` (N,) are cells per image. ``values`` (N,
    F) are NaN in wells without cells. ``compared`` (N,): wells on plates that have controls, with
    an image that counts.
    """

    name: str
    cell_line: str | None
    time_point: str | None
    table: pd.DataFrame
    values: Numbers
    groups: Ids
    plates: Ids
    compared: Flags
    counts: Numbers
    treatments: tuple[Any, ...]
    barcodes: tuple[str, ...]
    strata: str = "plate"
    rows: list[TreatmentScore] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def controls(self) -> Flags:
        """Which wells are controls (N,)."""
        return self.groups < 0

    @property
    def profiled(self) -> Flags:
        """Which wells have a profile (N,)."""
        known: Flags = np.isfinite(self.values).any(axis=1)
        return known

    @property
    def empty(self) -> Flags:
        """Which wells have images that count, but no cells (N,)."""
        found: Flags = self.compared & (self.counts == 0)
        return found

    def add(self, level: ScoreLevel, name: str, measure: str, **values: Any) -> None:
        """Keep a row of the scores; what is no finite number is null."""
        values = {"n_wells": 0, "n_controls": 0, "n_plates": 0, **values}
        for key, value in values.items():
            if isinstance(value, float) and not isfinite(value):
                values[key] = None
        keys = {"level": level, "name": name, "measure": measure, "plate_set": self.name}
        place = {"cell_line": self.cell_line, "time_point": self.time_point}
        self.rows.append(TreatmentScore(**keys, **place, **values))


def hits(
    workspace: Workspace, params: HitsParams | None = None, *, force: bool = False
) -> HitsResult:
    """Score the treatments of a profile run, and judge them; see :meth:`Store.hits`."""
    need("hits")
    params = params or HitsParams()
    profile_run, profiles = open_profiles(workspace, params.profiles)
    parts = plate_sets(profiles, params)
    curves, predicted = _curves(workspace, params, profiles)
    with workspace.database.read() as session:
        recipe = session.get_one(Recipe, session.get_one(Run, profile_run).recipe_id)
        inputs = [recipe]
        if predicted is not None:
            run = session.get_one(Run, predicted.id)
            inputs.append(session.get_one(Recipe, run.recipe_id))
        spec = _recipe(session, params, parts, curves, tuple(inputs))
        earlier = None if force else finished_run(session, spec)
        made = session.get_one(Run, profile_run).result or {}
        if earlier is not None:
            return hits_result(session, earlier)
        training = next(trainings_of_features(session, recipe), None)
        sphered = [recipe.parameters.get(name) for name in ("normalise", "against")]
    with running(workspace.database, spec, parent_id=profile_run, seed=params.seed) as handle:
        for part in track(workspace.progress, "hits", len(parts), parts):
            _score(part, params)
            _score_targets(part, params)
            _score_doses(part, params, profiles.columns, curves)
        lead = {part.name: f"{part.name}: " if len(parts) > 1 else "" for part in parts}
        notes = []
        if training is not None:
            notes.append(
                f"These features are an embedding by training run {training.id}, which learned "
                "what wells got: a difference on wells of its split proves nothing. Use "
                "measurements."
            )
        if sphered == ["sphere", "controls"]:
            notes.append(
                "These profiles were sphered on the controls, which are then alike by themselves: "
                "effects are too large and p values too cautious. Make profiles with --against all "
                "or --normalise mad."
            )
        notes += [lead[part.name] + note for part in parts for note in part.notes]
        verdicts = [row.verdict for part in parts for row in part.rows if row.verdict is not None]
        handle.result = {
            "answer": " ".join(lead[part.name] + answer_of(part, params) for part in parts),
            "rule": rule_of(params),
            "profile_run": profile_run,
            "feature_set": made.get("feature_set"),
            "columns": len(profiles.columns),
            "control": ", ".join(sorted({name for part in parts for name in control_names(part)})),
            "measure": params.measure,
            "treatments": len(verdicts),
            "tested": len(verdicts) - verdicts.count(Verdict.UNKNOWN),
            "hits": verdicts.count(Verdict.HIT),
            "fewer_cells": verdicts.count(Verdict.FEWER_CELLS),
            "plate_sets": {part.name: list(part.barcodes) for part in parts},
            "strata": {part.name: part.strata for part in parts},
            "versions": {name: version(name) for name in PACKAGES},
            "notes": notes,
        }
        for row in (rows := [row for part in parts for row in part.rows]):
            row.run_id = handle.id
        handle.at_end.append(lambda session: session.add_all(rows))
    with workspace.database.read() as session:
        return replace(hits_result(session, session.get_one(Run, handle.id)), already_done=False)


def rule_of(params: HitsParams) -> str:
    """Return in words what makes a treatment a hit."""
    effect = (
        f"its effect is at least {params.min_effect:g} standard deviations of the controls"
        if params.min_effect
        else "its wells are farther from the controls than controls are from each other"
    )
    over = f" by more than {params.min_over_count:g}" if params.min_over_count else ""
    name = "activity" if params.measure == "activity" else "activity by copairs"
    return (
        f"A treatment is a hit where the q value of its {name} is below {params.q:g}, {effect}, "
        "and the number of its cells is not what has changed most: where the cells are fewer "
        "(q of the cell count below the same limit), its most changed features change by more than "
        f"its cell count{over}, in standard deviations of the controls. Else it is called "
        f"'{Verdict.FEWER_CELLS.value}' or '{Verdict.SMALL.value}'. "
        f"With fewer than {FEWEST_WELLS} wells: '{Verdict.UNKNOWN.value}'."
    )


# --- which wells are compared ---------------------------------------------------------------------


def plate_sets(profiles: WellProfiles, params: HitsParams) -> list[PlateSet]:
    """Return the wells by plate set; all that cannot be compared at all is refused here."""
    table, values = profiles.table, profiles.values
    if params.plates:
        on = set(table["plate"])
        for name in params.plates:
            if name not in on:
                raise UnknownNameError.of("plate", name, sorted(on))
        chosen = table["plate"].isin(params.plates).to_numpy()
        table, values = table[chosen].reset_index(drop=True), values[chosen]
    if not np.isfinite(values).any():
        raise UserInputError(
            "No well has a profile: all values are missing. Make profiles of other features: "
            "cellstore profile --features NAME"
        )
    named = table["treatment_id"].notna().to_numpy()
    if params.control is None:
        controls = (table["control"] == Control.NEGATIVE).to_numpy()
        if not controls.any():
            raise UserInputError(
                "No well is a negative control. Name a treatment with --control, or mark all its "
                "wells: cellstore ingest TABLE --control NAME=negative, or one: "
                "cellstore relabel WELL --control negative --reason TEXT"
            )
    else:
        names = table[["name_with_dose", "treatment"]]
        controls = (names == params.control).any(axis=1).to_numpy()
        if not controls.any():
            known = sorted(set(names.loc[named].to_numpy().ravel()))
            raise UnknownNameError.of("treatment", params.control, known)
    if not (named & ~controls).any():
        raise UserInputError(
            "Every well with a treatment is a control. There is nothing to compare it with."
        )
    lines, times = (
        [None if value is None or value != value else str(value) for value in table[name]]
        for name in ("cell_line", "time_point")
    )
    keys = list(zip(lines, times, strict=True))
    parts = []
    for line, time in sorted(set(keys), key=lambda key: tuple(map(str, key))):
        there = np.array([key == (line, time) for key in keys]) & (named | controls)
        words = []
        if len(set(lines)) > 1:
            words.append(line or "cell line unknown")
        if len(set(times)) > 1:
            words.append("time point unknown" if time is None else f"time point {time}")
        if (there & ~controls).any():
            name = ", ".join(words)[:255] or "all plates"
            of_set = table[there].reset_index(drop=True)
            parts.append(_plate_set(name, line, time, of_set, values[there], controls[there]))
    if not any((part.compared & ~part.controls).any() for part in parts):
        raise UserInputError(
            "No plate has both treatments and controls, so there is nothing to compare with. "
            "Name a treatment that is on the same plates with --control."
        )
    return parts


def _plate_set(
    name: str,
    line: str | None,
    time: str | None,
    table: pd.DataFrame,
    values: Numbers,
    controls: Flags,
) -> PlateSet:
    barcodes, plates = np.unique(table["plate"].to_numpy(dtype=str), return_inverse=True)
    ids = np.where(controls, -1, table["treatment_id"].fillna(-1)).astype(np.int64)
    with_controls = np.isin(plates, plates[controls])
    images = table["n_images"].to_numpy(dtype=np.float64)
    cells = table["n_cells"].to_numpy(dtype=np.float64)
    counts = np.divide(cells, images, out=np.full(len(images), np.nan), where=images > 0)
    columns = ["treatment_id", "name_with_dose", "perturbation", "dose", "dose_unit", "target"]
    treated = table.loc[~controls, columns].drop_duplicates("treatment_id")
    # By name, not in the order in which they came: what is drawn at random is the same elsewhere.
    treated = treated.sort_values(["name_with_dose", "treatment_id"]).astype(object)
    treated = treated.where(treated.notna(), None).rename(columns={"name_with_dose": "name"})
    treatments = tuple(treated.itertuples(index=False))
    code = {item.treatment_id: at for at, item in enumerate(treatments)}
    groups = np.array([code.get(key, -1) for key in ids.tolist()], dtype=np.int64)
    part = PlateSet(
        name=name,
        cell_line=line,
        time_point=time,
        table=table,
        values=values,
        groups=groups,
        plates=plates.astype(np.int64),
        compared=with_controls & np.isfinite(counts),
        counts=counts,
        treatments=treatments,
        barcodes=tuple(barcodes.tolist()),
    )
    if not with_controls.all():
        bare = barcodes[np.unique(plates[~with_controls])].tolist()
        part.notes.append(f"No controls on plate {some_of(bare)}: its wells are not compared.")
    return part


def control_names(part: PlateSet) -> set[str]:
    """Return what the controls of a plate set got."""
    names = part.table.loc[part.controls, "name_with_dose"]
    return set(names.where(names.notna(), "no treatment"))


def _recipe(
    session: Session,
    params: HitsParams,
    parts: Sequence[PlateSet],
    curves: Mapping[str, Mapping[int, float]],
    inputs: tuple[Recipe, ...],
) -> RecipeSpec:
    """Everything that decides the scores, without numbers of this store."""
    found = {item.treatment_id for part in parts for item in part.treatments}
    identities: dict[int, str] = {}
    for some in in_lists(sorted(found)):
        query = select(Treatment.id, Treatment.identity, Treatment.target)
        for key, *statements in session.execute(query.where(Treatment.id.in_(some))):
            identities[key] = str(statements)
    rows = []
    for part in parts:
        statements = [*(identities[item.treatment_id] for item in part.treatments), "control"]
        names = (part.table[name].tolist() for name in ("plate", "well", "well_id"))
        for plate, well, well_id, group in zip(*names, part.groups.tolist(), strict=True):
            numbers = [curve.get(int(well_id), np.nan) for curve in curves.values()]
            rows.append(([part.name, plate, well, statements[group]], numbers))  # -1 is the last
    rows.sort(key=lambda row: [str(text) for text in row[0]])
    parameters = asdict(params) | {"wells": digest([well for well, _ in rows])}
    for name in ("profiles", "run", "plates"):  # the inputs and the wells say it
        del parameters[name]
    parameters["curves"] = list(params.curves)
    if curves:
        parameters["probabilities"] = digest_of_numbers(np.array([row[1] for row in rows]))
    return RecipeSpec(Stage.HITS, VERSION, parameters, None, inputs)


def _curves(
    workspace: Workspace, params: HitsParams, profiles: WellProfiles
) -> tuple[dict[str, dict[int, float]], NamedRun | None]:
    """Return the mean probability of labels by well id, and the predict run that gave them.

    Features that a curve is asked of must be in the profiles.
    """
    labels = [name.removeprefix(PROBABILITY) for name in params.curves if _is_label(name)]
    for name in params.curves:
        if not _is_label(name) and name not in profiles.columns:
            raise UnknownNameError.of("feature of the profiles", name, profiles.columns)
    if not labels:
        if params.run is not None:
            raise UserInputError(
                f"--run is about probabilities: add --curve {PROBABILITY}LABEL, or leave it out."
            )
        return {}, None
    with workspace.database.read() as session:
        run = find_predict_run(session, params.run or "latest")
    with open_questions(workspace, runs=run.read_as) as questions:
        there = "FROM image_label_counts AS c JOIN labels AS l ON l.id = c.label_id"
        query = f"SELECT DISTINCT l.value {there} WHERE c.run_id = $run"
        known = [value for (value,) in questions.ask_ours(query, {"run": run.id}).rows()]
        answer = questions.ask_ours(
            "SELECT i.well_id, "
            "CASE WHEN list_contains($labels, l.value) THEN l.value END AS label, "
            f"sum(c.probability) AS given, sum(c.cells) AS cells {there} "
            "JOIN images AS i ON i.id = c.image_id "
            "WHERE c.run_id = $run GROUP BY ALL ORDER BY 2, 1",
            {"run": run.id, "labels": list(labels)},
        )
        rows = list(answer.records())
    cells: dict[int, float] = defaultdict(float)
    given: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        cells[int(row["well_id"])] += float(row["cells"] or 0)
        if row["label"] is not None:
            given[row["label"]][int(row["well_id"])] = float(row["given"] or 0)
    for label in labels:
        if label not in known:
            raise UnknownNameError.of(f"label of run {run.id}", label, known)
    return {
        PROBABILITY + label: {
            well: given[label].get(well, 0.0) / number for well, number in cells.items() if number
        }
        for label in labels
    }, run


def _is_label(name: str) -> bool:
    return name.startswith(PROBABILITY)


def _quantity(name: str) -> str:
    return f"probability of {name.removeprefix(PROBABILITY)}" if _is_label(name) else name


# --- scores ---------------------------------------------------------------------------------------


def _score(part: PlateSet, params: HitsParams) -> None:
    """Compare each treatment of a plate set with its controls, and judge it."""
    from ..analysis import activity
    from ..analysis.well_profiles import on_edge

    groups, controls, plates = part.groups, part.controls, part.plates
    strata, edge = plates, on_edge(part.table)
    matched, warning = activity.edge_check(
        part.values, controls, plates, edge, part.barcodes, seed=params.seed
    )
    if params.edge == "match" or (params.edge == "auto" and matched):
        part.strata = "plate and zone"
        strata = 2 * plates + edge
    if warning and params.edge == "auto" and (edge & part.compared & ~controls).any():
        part.notes.append(warning)
    data = activity.Wells(part.values, groups, controls, plates)
    layered = data._replace(strata=strata)
    how: dict[str, Any] = {"permutations": params.permutations, "seed": params.seed}
    scores = {
        "activity": activity.activity(layered, **how),
        "activity_copairs": activity.activity_by_copairs(
            layered, null_size=params.permutations, seed=params.seed
        ),
        "replicate_correlation": activity.replicate_correlation(data, **how),
    }
    scores["effect"], effects = activity.effects(data)
    scores["cell_count"], changes = activity.cell_counts(
        part.counts, groups, controls, plates, **how
    )
    strongest = activity.strongest_changes(data)
    part.table = part.table.assign(effect=effects)
    floors = dict.fromkeys(range(len(part.treatments)), 1 / (params.permutations + 1))
    rule = scores["activity_copairs"]
    if params.measure == "activity":
        rule = scores["activity"]
        floors |= activity.smallest_p(layered, params.permutations)
    for code, item in enumerate(part.treatments):
        mine = part.compared & (groups == code)
        change = changes[mine & np.isfinite(changes)]
        verdict, note = judge(
            params,
            rule[code],
            scores["effect"][code],
            scores["cell_count"][code],
            fewer=-float(change.mean()) if len(change) else 0.0,
            strongest=float(strongest[code]),
            floor=floors[code],
            empty=int((mine & part.empty).sum()),
        )
        about: dict[str, Any] = {
            "treatment_id": item.treatment_id,
            "dose": item.dose,
            "dose_unit": item.dose_unit,
        }
        for measure, found in scores.items():
            quantity = measure if measure == "cell_count" else None
            of_one = asdict(found[code])
            part.add(ScoreLevel.TREATMENT, item.name, measure, quantity=quantity, **of_one, **about)
        part.add(
            ScoreLevel.TREATMENT,
            item.name,
            "hit",
            verdict=verdict,
            note=note,
            p=rule[code].p,
            q=rule[code].q,
            n_wells=int(mine.sum()),
            n_controls=int((part.compared & controls & np.isin(plates, plates[mine])).sum()),
            n_plates=len(np.unique(plates[mine])),
            **about,
        )
    part.notes += _notes(part, params, floors, rule)


def judge(
    params: HitsParams,
    activity: Score,
    effect: Score,
    count: Score,
    *,
    fewer: float,
    strongest: float,
    floor: float,
    empty: int = 0,
) -> tuple[Verdict, str]:
    """Return the verdict on a treatment by the rule, and the reason in one short sentence.

    ``fewer``: by how much its cell count is lower, ``strongest``: by how much its most changed
    features change, in standard deviations of the controls. ``floor``: the smallest p value that so
    few wells can have. ``empty``: how many of its wells have no cells.
    """
    killed = count.q is not None and count.q < params.q and fewer > 0
    if activity.q is None or effect.value is None:
        if activity.q is None and empty and killed:
            return Verdict.FEWER_CELLS, "Too few of its wells have cells left for a profile."
        return Verdict.UNKNOWN, activity.note or effect.note or "Too few wells to say anything."
    if activity.q >= params.q:
        if floor >= params.q:
            note = f"With so few wells and controls, p cannot be below {floor:.2g}."
            return Verdict.UNKNOWN, note
        if killed:
            return Verdict.FEWER_CELLS, "Its cells are fewer, and not shown to look different."
        return Verdict.NO, "Its wells are no more like each other than like the controls."
    if effect.value < params.min_effect:
        note = f"It differs, but its effect of {effect.value:.2g} is below {params.min_effect:g}."
        return Verdict.SMALL, note
    if killed and strongest - fewer <= params.min_over_count:
        lower = f"Its cell count is {fewer:.2g} standard deviations lower"
        note = f"{lower}; 95 % of its features change by {strongest:.2g} at most."
        return Verdict.FEWER_CELLS, note
    return Verdict.HIT, "Its wells are alike, and unlike the controls."


def _notes(
    part: PlateSet, params: HitsParams, floors: Mapping[int, float], rule: Mapping[int, Score]
) -> Iterator[str]:
    """Yield what a reader has to know about the scores of a plate set."""
    low = np.sort([floors[code] for code, score in rule.items() if score.p is not None])
    reachable = low * len(low) / np.arange(1, len(low) + 1)  # q where so many have the smallest p
    if len(low) and reachable.min() >= params.q:
        yield (
            f"No treatment could have been called a hit: with so few replicates and controls the "
            f"smallest q value that can be reached is {reachable.min():.2g}. More replicates or "
            "controls are the only way to know."
        )
    elif len(low) and reachable[0] >= params.q:
        yield (
            f"No p value can be below {low[0]:.2g}: of {len(low)} treatments, "
            f"{int(np.argmax(reachable < params.q)) + 1} or more must reach it before one is "
            "called a hit. More replicates or controls allow smaller ones, or more --permutations."
        )
    if len(np.unique(part.plates[part.compared])) == 1:
        yield "There is one plate only: whether the same comes out on another is not known."
    left_out = {
        "have no cells that count, so that only their cell count is compared": part.empty,
        "have cells but no profile, as their cells are not measured, or their plate has too few "
        "controls with cells": part.compared & ~part.empty & ~part.profiled,
        "have no image that counts, and are not compared": ~np.isfinite(part.counts),
    }
    for what, some in left_out.items():
        if some.any():
            names = [f"{row.plate}/{row.well}" for row in part.table[some].itertuples()]
            yield f"{len(names)} of {len(some)} wells {what}: {some_of(names)}."


def answer_of(part: PlateSet, params: HitsParams) -> str:
    """Return what was found in a plate set, in one sentence."""
    found = [row.verdict for row in part.rows if row.verdict is not None]
    hit, fewer, small, unknown = (
        found.count(v) for v in (Verdict.HIT, Verdict.FEWER_CELLS, Verdict.SMALL, Verdict.UNKNOWN)
    )
    tested, differ = len(found) - unknown, hit + fewer + small
    if not tested:
        return f"None of {unknown} treatments could be judged."
    treatments = "treatment" if tested == 1 else "treatments"
    does = "differ" if differ > 1 else "differs"
    statements = [f"{differ or 'None'} of {tested} {treatments} {does} from the controls"]
    if fewer:
        statements.append(f"{fewer} of them mainly by fewer cells")
    if small:
        asked = "less than --min-effect asks for"
        statements.append(
            f"{small} of them {asked if params.min_effect else 'no farther than controls'}"
        )
    if unknown:
        statements.append(f"{unknown} more could not be judged")
    return "; ".join(statements) + "."


def _score_targets(part: PlateSet, params: HitsParams) -> None:
    """Say of each target whether its perturbations that are hits look alike.

    A perturbation has one profile: the median over the wells of its dose with the largest effect.
    """
    from ..analysis import activity

    best: dict[str, tuple[float, int]] = {}
    at = {(row.treatment_id, row.measure): row for row in part.rows}
    for code, item in enumerate(part.treatments):
        if at[item.treatment_id, "hit"].verdict is not Verdict.HIT:
            continue
        effect = at[item.treatment_id, "effect"].value or 0.0
        best[item.perturbation] = max(best.get(item.perturbation, (-inf, -1)), (effect, code))
    codes = [code for _, code in best.values()]
    texts = [(part.treatments[code].target or "").split("|") for code in codes]
    targets = [frozenset(text.strip() for text in some if text.strip()) for some in texts]
    members: dict[str, int] = defaultdict(int)
    for some in targets:
        for target in some:
            members[target] += 1
    if not any(number > 1 for number in members.values()):
        return
    there = part.compared & part.profiled
    values = np.array(
        [np.nanmedian(part.values[there & (part.groups == code)], axis=0) for code in codes]
    )
    both = {
        "consistency": activity.consistency(
            values, targets, permutations=params.permutations, seed=params.seed
        ),
        "consistency_copairs": activity.consistency_by_copairs(
            values, targets, null_size=params.permutations, seed=params.seed
        ),
    }
    tested = [
        members[target] for target, score in both["consistency"].items() if score.p is not None
    ]
    low = np.sort([1 / min(comb(len(codes), n), params.permutations + 1) for n in tested])
    reachable = np.min(low * len(low) / np.arange(1, len(low) + 1), initial=1.0)
    if reachable >= params.q and max(map(len, targets)) == 1:
        part.notes.append(
            f"No target can be shown to be consistent: with {len(codes)} hits the smallest q value "
            f"that can be reached is {reachable:.2g}."
        )
    for measure, scores in both.items():
        for target, score in scores.items():
            statements = asdict(score) | {"n_wells": members[target]}
            part.add(ScoreLevel.TARGET, target, measure, **statements)


def _score_doses(
    part: PlateSet,
    params: HitsParams,
    columns: Sequence[str],
    curves: Mapping[str, Mapping[int, float]],
) -> None:
    """Fit curves over the doses of each perturbation that has several in one unit."""
    from ..analysis.dose_curves import effect_curve, fit_curve, lowest_active

    responses: dict[str, Numbers] = {
        "effect": part.table["effect"].to_numpy(),
        "cell_count": cell_ratios(part),
    }
    ids = part.table["well_id"].tolist()
    for name in params.curves:
        if _is_label(name):
            statements = [curves[name].get(int(key), np.nan) for key in ids]
            responses[_quantity(name)] = np.array(statements)
        else:
            responses[name] = part.values[:, columns.index(name)]
    several: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for code, item in enumerate(part.treatments):
        if item.dose:  # a combination has none
            several[item.perturbation, item.dose_unit].append(code)
    doses = np.array([item.dose or np.nan for item in part.treatments], dtype=np.float64)
    for (name, unit), codes in several.items():
        if len(set(doses[codes])) < FEWEST_DOSES:
            continue
        given = part.compared & np.isin(part.groups, codes)
        for quantity, response in responses.items():
            there = part.compared & np.isfinite(response)
            mine = there & given
            controls = there & part.controls & np.isin(part.plates, part.plates[mine])
            data = (doses[part.groups[mine]], response[mine], response[controls])
            if quantity == "effect":
                used = mine | controls
                dose = np.where(given, doses[part.groups], np.nan)[used]
                curve, _ = effect_curve(response[used], part.values[used], dose, seed=params.seed)
            else:
                curve = fit_curve(*data, seed=params.seed)
            lowest, p, note = lowest_active(*data, part.plates[mine])
            ec50 = {"value": curve.ec50, "low": curve.low, "high": curve.high}
            for measure, values in (
                ("ec50", {**ec50, "p": curve.p_flat, "note": curve.note}),
                ("trend", {"value": curve.trend, "p": curve.trend_p}),
                ("lowest_active_dose", {"value": lowest, "p": p, "note": note}),
            ):
                part.add(
                    ScoreLevel.PERTURBATION,
                    name,
                    measure,
                    quantity=quantity,
                    dose_unit=unit,
                    n_wells=int(mine.sum()),
                    n_controls=int(controls.sum()),
                    n_plates=len(np.unique(part.plates[mine])),
                    **values,
                )


def cell_ratios(part: PlateSet) -> Numbers:
    """Return the cell count of each well (N,) as a ratio to the mean of its plate's controls."""
    from ..analysis.activity import control_means

    ratios: Numbers = part.counts / control_means(part.counts, part.controls, part.plates)
    return ratios


# --- rows and results -----------------------------------------------------------------------------


def hits_result(session: Session, run: Run) -> HitsResult:
    """Return what a run found, from its rows."""
    query = (
        select(TreatmentScore, Treatment.target)
        .outerjoin(Treatment, Treatment.id == TreatmentScore.treatment_id)
        .where(TreatmentScore.run_id == run.id)
        .order_by(TreatmentScore.id)
    )
    treatments: dict[Any, dict[str, TreatmentScore]] = defaultdict(dict)
    doses: dict[Any, dict[str, TreatmentScore]] = defaultdict(dict)
    targets, target_of = list[TargetRow](), dict[int | None, str | None]()
    for score, target in session.execute(query):
        if score.level is ScoreLevel.TREATMENT:
            treatments[score.plate_set, score.treatment_id][score.measure] = score
            target_of[score.treatment_id] = target
        elif score.level is ScoreLevel.PERTURBATION:
            key = (score.plate_set, score.name, score.dose_unit, score.quantity)
            doses[key][score.measure] = score
        elif score.measure == "consistency":
            values = (score.value, score.p, score.q, score.n_wells)
            targets.append(TargetRow(score.name, *values, score.plate_set, score.note))
    rows = [_hit_row(**found, target=target_of[key]) for (_, key), found in treatments.items()]
    sets = list((run.result or {})["plate_sets"])
    order = [verdict.value for verdict in ORDER]
    rows.sort(
        key=lambda row: (
            sets.index(row.plate_set),
            order.index(row.verdict),
            -inf if row.effect is None else -row.effect,
            by_number(row.name),
        )
    )
    targets.sort(key=lambda row: (sets.index(row.plate_set), inf if row.q is None else row.q))
    return result_of(
        run,
        HitsResult,
        already_done=True,
        rows=tuple(rows),
        targets=tuple(targets),
        doses=tuple(_dose_row(**found) for found in doses.values()),
        notes=(*changed_since(session, run.parent_id or run.id), *(run.result or {})["notes"]),
    )


def _hit_row(
    hit: TreatmentScore,
    activity: TreatmentScore,
    effect: TreatmentScore,
    cell_count: TreatmentScore,
    replicate_correlation: TreatmentScore,
    target: str | None,
    **_: TreatmentScore,
) -> HitRow:
    """Return the row of a treatment from those of its measures, by the names of these."""
    return HitRow(
        name=hit.name,
        verdict=str(hit.verdict.value if hit.verdict else ""),
        note=hit.note,
        effect=effect.value,
        effect_low=effect.low,
        effect_high=effect.high,
        activity=activity.value,
        p=hit.p,
        q=hit.q,
        cell_count=cell_count.value,
        cell_count_low=cell_count.low,
        cell_count_high=cell_count.high,
        cell_count_q=cell_count.q,
        replicate_correlation=replicate_correlation.value,
        n_wells=hit.n_wells,
        n_controls=hit.n_controls,
        n_plates=hit.n_plates,
        target=target,
        plate_set=hit.plate_set,
        cell_line=hit.cell_line,
        time_point=hit.time_point,
        treatment_id=hit.treatment_id,
    )


def _dose_row(
    ec50: TreatmentScore, trend: TreatmentScore, lowest_active_dose: TreatmentScore
) -> DoseRow:
    return DoseRow(
        name=ec50.name,
        quantity=ec50.quantity or "",
        ec50=ec50.value,
        low=ec50.low,
        high=ec50.high,
        unit=ec50.dose_unit,
        trend=trend.value,
        trend_p=trend.p,
        lowest_active=lowest_active_dose.value,
        plate_set=ec50.plate_set,
        note=ec50.note,
    )
