"""Hits of a small screen whose effects are planted: the rows, the rule, the words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import func, select, update
from typer.testing import CliRunner

from cellstore.analysis.activity import Score
from cellstore.analysis.well_profiles import WELL_COLUMNS, WellProfiles
from cellstore.config import HitsParams, ProfileParams, SplitParams
from cellstore.enums import Control, ScoreLevel, Stage, Status, Verdict
from cellstore.errors import UnknownNameError, UserInputError, by_number
from cellstore.jobs.workspace import Workspace
from cellstore.models import Run, TreatmentScore, Well
from cellstore.stages.hits import HitRow, answer_of, judge, plate_sets, rule_of
from cellstore.store import Store
from cellstore_cli.app import app

pytest.importorskip("copairs")
pytest.importorskip("pycytominer")

FEATURES, CONTROLS, EC50 = 24, 12, 1.0
DOSES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FAST = HitsParams(permutations=2000)


def planted(random: np.random.Generator) -> dict[str, tuple[str, float, np.ndarray, int]]:
    """By treatment: its target, its dose, what it adds to features, and its cells in a well."""
    ways = random.normal(size=(3, FEATURES))
    small = 0.02 * ways
    found = {
        "alpha1": ("AAA", np.nan, 3 * ways[0], 10),
        "alpha2": ("AAA", np.nan, 3 * ways[0], 10),
        "beta1": ("BBB", np.nan, 3 * ways[1], 10),
        "beta2": ("BBB", np.nan, 3 * ways[1], 10),
        "killer": ("KKK", np.nan, 0.4 * ways[0], 2),
        "idle": ("", np.nan, 0 * small[0], 10),
    }
    for dose in DOSES:
        found[f"serial {dose}"] = ("CCC", dose, 5 * ways[2] * dose**2 / (dose**2 + EC50**2), 10)
    return found


def single_cells(folder: Path) -> Path:
    """A table of some 800 cells: three plates with a well of each treatment, one without DMSO."""
    random = np.random.default_rng(3)
    effects = planted(random)
    names = ["Plate", "Well", "Site", "ObjectNumber", "pert_iname", "target", "dose", "dose_unit"]
    rows: list[list[Any]] = []
    values = []
    for plate in ("P1", "P2", "P3", "BARE"):
        content = ["DMSO"] * CONTROLS + list(effects) + ["once"] * (plate == "P1")
        if plate == "BARE":
            content = ["alpha1"]
        order = random.permutation(len(content))
        for at, index in enumerate(order.tolist()):
            name = content[index]
            target, dose, effect, cells = effects.get(name, ("", np.nan, np.zeros(FEATURES), 10))
            cells += int(random.integers(0, 3))
            of_well = random.normal(scale=0.3, size=FEATURES) + effect
            well = f"{'BCDEF'[at // 8]}{2 + at % 8:02d}"
            for number in range(1, cells + 1):
                given = dose if dose == dose else None
                unit = None if given is None else "uM"
                pert = name.split()[0]
                rows.append([plate, well, 1, number, pert, target or None, given, unit])
                values.append(of_well + random.normal(size=FEATURES))
    columns = {f"Metadata_{name}": [row[at] for row in rows] for at, name in enumerate(names)} | {
        "Metadata_control_type": ["negcon" if row[4] == "DMSO" else None for row in rows],
    }
    columns |= {f"Cells_F{at}": column for at, column in enumerate(np.array(values).T.tolist())}
    path = folder / "single_cells.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def store(workspace: Workspace, tmp_path: Path) -> Store:
    opened = Store(workspace)
    opened.ingest(single_cells(tmp_path))
    opened.profile(ProfileParams(features="single_cells"))
    return opened


def by_name(rows: tuple[HitRow, ...]) -> dict[str, HitRow]:
    return {row.name: row for row in rows}


def test_what_is_planted_is_found(store: Store) -> None:
    found = store.hits(FAST)
    rows = by_name(found.rows)
    verdicts = {name: row.verdict for name, row in rows.items()}
    strong = ["alpha1", "alpha2", "beta1", "beta2", "serial 10 uM", "serial 30 uM", "serial 3 uM"]
    assert {name for name in strong if verdicts[name] == "hit"} == set(strong)
    assert verdicts["killer"] == "mainly fewer cells"
    assert verdicts["once"] == "cannot say"
    assert {verdicts[name] for name in ("idle", "serial 0.1 uM")} == {"no difference"}
    assert (found.treatments, found.tested, found.fewer_cells) == (13, 12, 1)
    assert found.answer == (
        f"{found.hits + 1} of 12 treatments differ from the controls; 1 of them mainly by fewer "
        "cells; 1 more could not be judged."
    )
    # Ranked: hits first, by effect.
    assert [row.verdict for row in found.rows[: found.hits]] == ["hit"] * found.hits
    effects = [row.effect for row in found.rows[: found.hits] if row.effect is not None]
    assert effects == sorted(effects, reverse=True)
    alpha = rows["alpha1"]
    assert (alpha.n_wells, alpha.n_controls, alpha.n_plates) == (3, 3 * CONTROLS, 3)
    assert (alpha.target, alpha.plate_set, alpha.activity) == ("AAA", "all plates", 1.0)
    assert alpha.effect_low is not None
    assert alpha.effect is not None
    assert 0 < alpha.effect_low < alpha.effect
    killer = rows["killer"]
    assert killer.cell_count == pytest.approx(3 / 11, abs=0.1)
    assert "cell count is" in (killer.note or "")
    # Targets: only hits count, with the dose of the largest effect.
    consistency = {row.target: row.consistency for row in found.targets}
    assert (consistency["AAA"], consistency["BBB"]) == (1.0, 1.0)
    assert {row.target: row.perturbations for row in found.targets}["CCC"] == 1
    curve = next(row for row in found.doses if row.quantity == "effect")
    assert (curve.name, curve.unit) == ("serial", "uM")
    assert curve.ec50 is not None
    assert 0.3 < curve.ec50 < 1.5  # of distances, on the scale of logarithms
    assert curve.trend_p is not None
    assert curve.trend_p < 0.01
    assert curve.lowest_active in (0.3, 1.0)
    notes = " ".join(found.notes)
    assert "No controls on plate BARE" in notes
    # AAA and BBB have 2 of the 5: of 10 ways to choose 2, one is the best for each.
    assert "with 5 hits the smallest q value that can be reached is 0.1." in notes
    assert "not spread" not in notes  # no treatment is at the edge
    assert found.versions.keys() == {"copairs", "pycytominer", "scipy"}
    check_rows(store, found.run_id)
    if store.workspace.database.is_sqlite:
        check_command(store)
        check_same_again(store)
        check_changes(store)
        check_words(store)
        check_probabilities(store)


def check_rows(store: Store, run_id: int) -> None:
    """Written with the end of the run, complete, and for SQL and the ORM the same."""
    with store.session() as session:
        run = session.get_one(Run, run_id)
        assert (run.stage, run.status, run.seed) == (Stage.HITS, Status.DONE, 0)
        assert run.parent is not None
        assert run.parent.stage is Stage.PROFILE
        assert (run.result or {})["rule"] == rule_of(FAST)
        assert run.recipe.parameters["q"] == FAST.q
        assert [item.stage for item in run.recipe.inputs] == [Stage.PROFILE]
        scores = session.scalars(
            select(TreatmentScore).where(TreatmentScore.name == "alpha1")
        ).all()
        assert {score.measure for score in scores} == {
            *("activity", "activity_copairs", "replicate_correlation", "effect"),
            *("cell_count", "hit"),
        }
        assert {score.treatment.name for score in scores if score.treatment} == {"alpha1"}
        levels = {ScoreLevel.TREATMENT, ScoreLevel.PERTURBATION, ScoreLevel.TARGET}
        assert set(session.scalars(select(TreatmentScore.level).distinct())) == levels
    asked = store.sql(
        "SELECT verdict, count(*) AS n FROM treatment_scores WHERE measure = 'hit' GROUP BY 1"
    )
    assert dict(zip(asked["verdict"].to_pylist(), asked["n"].to_pylist(), strict=True))["hit"] >= 7


def check_command(store: Store) -> None:
    """The command answers first; JSON has the rows, and a rule of one's own is another run."""

    def said(*words: str) -> Any:
        done = CliRunner().invoke(app, ["hits", "--store", str(store.root), *words])
        assert done.exit_code == 0, done.output
        return done

    text = said("--permutations", "2000")
    lines = text.stdout.splitlines()
    assert lines[0].startswith("Nothing to do: run ")
    assert "of 12 treatments differ from the controls; 1 of them mainly by fewer cells" in lines[1]
    order = ["serial 30 uM", "killer", "once", "idle"]
    rows = [next(at for at, line in enumerate(lines) if line.startswith(name)) for name in order]
    killer = by_name(store.hits(FAST).rows)["killer"]
    assert killer.cell_count_q is not None
    assert killer.cell_count_q != killer.q
    # By the number of its cells it is called so.
    assert float(lines[rows[1]].split()[-3]) == float(f"{killer.cell_count_q:.2g}")
    assert max(map(len, lines)) <= 80
    assert rows == sorted(rows)
    assert "Do hits of one target look alike?" in lines
    assert lines[rows[0] - 1].startswith("---")
    assert any(line.endswith("not determined (no response)") for line in lines)
    assert "hit_table" in text.stderr
    found = json.loads(said("--permutations", "2000", "--q", "1e-9", "--json").stdout)
    assert (found["already_done"], found["hits"]) == (False, 0)
    assert "No treatment could have been called a hit" in " ".join(found["notes"])


def check_same_again(store: Store) -> None:
    """Nothing is computed twice; another rule, or a well with another treatment, is another run."""
    first, second = store.hits(FAST), store.hits(FAST)
    assert second.already_done
    assert second == first
    strict = store.hits(replace(FAST, min_effect=1e6, plates=("P1", "P2", "P3")))
    assert not strict.already_done
    assert {row.verdict for row in strict.rows} <= {"small effect", "no difference", "cannot say"}
    assert "plate BARE" not in " ".join(strict.notes)
    assert "of them less than --min-effect asks for" in strict.answer
    one = store.hits(replace(FAST, plates=("P1",), control="idle"))
    notes = " ".join(one.notes)
    assert {row.verdict for row in one.rows} == {"cannot say"}
    assert one.answer.startswith("None of 13 treatments could be judged")
    assert "There is one plate only" in notes
    change = planted(np.random.default_rng(3))["serial 30.0"][2]
    name = f"Cells_F{np.argmax(np.abs(change))}"  # the feature that changes most
    by_feature = store.hits(replace(FAST, curves=(name,), edge="match"))
    curves = {row.quantity: row for row in by_feature.doses}
    assert curves.keys() == {"effect", "cell_count", name}
    feature = curves[name]
    assert feature.low is not None
    assert feature.high is not None
    assert feature.low < EC50 < feature.high


def check_probabilities(store: Store) -> None:
    """A class probability has a curve, too: the mean over the cells of a well."""
    cells = store.sql(
        "SELECT cell_id, treatment = 'serial' AS given, dose FROM cell_table ORDER BY 1"
    ).to_pandas()
    dose = cells["dose"].where(cells["given"], 0.0).to_numpy()
    near = np.random.default_rng(0).normal(0.1 + 0.8 * dose**2 / (dose**2 + 4), 0.03)
    table = pd.DataFrame({"cell_id": cells["cell_id"], "serial": np.clip(near, 0.01, 0.99)})
    table["DMSO"] = 1 - table["serial"]
    store.create_split("by-well", SplitParams(allow_missing=True))
    added = store.add_predictions(table, "mine", split="by-well")
    found = store.hits(replace(FAST, curves=("probability:serial",), run=str(added.run_id)))
    curve = next(row for row in found.doses if row.quantity == "probability of serial")
    assert curve.ec50 == pytest.approx(2, rel=0.1)
    with pytest.raises(UnknownNameError, match="Unknown label of run"):
        store.hits(replace(FAST, curves=("probability:cereal",)))


def check_changes(store: Store) -> None:
    """Wells that were excluded since do not count, and other controls are called out."""
    table = store.profiles().table
    name = {row.treatment: f"{row.plate}/{row.well}" for row in table.itertuples()}
    store.exclude("well", name["alpha2"], reason="air bubble")
    found = store.hits(FAST)
    assert (found.already_done, by_name(found.rows)["alpha2"].n_wells) == (False, 2)
    assert len(store.profiles().table) == len(table) - 1
    # One control less and one more: as many as before, and others.
    store.relabel(name["DMSO"], control="none", reason="empty")
    store.relabel(name["idle"], control="negative", reason="as DMSO")
    for _ in range(2):  # also where it is answered from the store
        assert "relabelled, excluded or included since run" in store.hits(FAST).notes[0]
    store.profile(ProfileParams(features="single_cells"))
    assert "relabelled" not in " ".join(store.hits(FAST).notes)


def check_words(store: Store) -> None:
    """What cannot be compared is one sentence."""

    def refused(kind: type[Exception] = UserInputError, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            store.hits(replace(FAST, **options))
        return str(caught.value)

    assert "Unknown plate 'P9'" in refused(UnknownNameError, plates=("P9",))
    assert "Unknown treatment 'water'" in refused(UnknownNameError, control="water")
    assert "Unknown feature" in refused(UnknownNameError, curves=("areo",))
    assert "--run is about probabilities" in refused(run="3")
    assert "no predict run" in refused(UnknownNameError, curves=("probability:DMSO",))
    assert "needs a profile run" in refused(profiles="latest ingest")
    with store.session() as session:
        hits = select(func.count()).where(Run.stage == Stage.HITS)
        assert session.scalar(hits.where(Run.status != Status.DONE)) == 0
        names = select(Well.id, Well.control)
        were = [{"id": key, "control": value} for key, value in session.execute(names)]
    with store.workspace.database.begin() as session:
        session.execute(update(Well).values(control=None))
    assert "cellstore ingest TABLE --control NAME=negative" in refused()
    with store.workspace.database.begin() as session:
        session.execute(update(Well).values(control=Control.NEGATIVE))
    assert "is a control" in refused()
    with store.workspace.database.begin() as session:
        session.execute(update(Well), were)


def wells(content: dict[tuple[str, str | None, str | None], list[str]]) -> WellProfiles:
    """Wells by (plate, cell line, time point): what each got; random profiles."""
    rows = []
    keys: dict[str, int] = {}
    for (plate, line, time), names in content.items():
        for column, name in enumerate(names, start=1):
            said = dict.fromkeys(WELL_COLUMNS)
            said |= {"well_id": len(rows) + 1, "plate": plate, "well": f"A{column:02d}"}
            said |= {"well_row": 1, "well_column": column, "cell_line": line, "time_point": time}
            said |= {"treatment_id": keys.setdefault(name, len(keys) + 1), "n_cells": 9}
            said |= dict.fromkeys(("treatment", "name_with_dose", "perturbation"), name)
            said |= {"n_images": 1, "control": "negative" if name == "DMSO" else None}
            rows.append(said)
    values = np.random.default_rng(0).normal(size=(len(rows), 5))
    return WellProfiles(pd.DataFrame(rows), values, tuple("abcde"))


def test_plates_of_one_cell_line_and_time_point_are_compared_together() -> None:
    plate = ["DMSO", "DMSO", "taxol"]
    both = wells(
        {("P1", "A549", "24"): plate, ("P2", "A549", "24"): plate, ("P3", "U2OS", "24"): plate}
    )
    parts = plate_sets(both, HitsParams())
    assert [(part.name, part.barcodes) for part in parts] == [
        ("A549", ("P1", "P2")),
        ("U2OS", ("P3",)),
    ]
    assert [len(part.groups) for part in parts] == [6, 3]
    other = wells({("P1", None, None): [*plate, "noco"]})  # came in another order
    other.table["treatment_id"] = 9 - other.table["treatment_id"]
    (part,) = plate_sets(other, HitsParams())
    assert [item.name for item in part.treatments] == ["noco", "taxol"]
    assert part.groups.tolist() == [-1, -1, 1, 0]
    parts[0].values[:] = np.nan  # as on a plate with too few controls: its wells have cells
    assert (parts[0].profiled.any(), parts[0].empty.any()) == (False, False)
    times = wells(
        {("P1", None, "24"): plate, ("P2", None, "48"): plate, ("P3", None, None): ["taxol"]}
    )
    names = [part.name for part in plate_sets(times, HitsParams())]
    assert names == ["time point 24", "time point 48", "time point unknown"]
    assert [part.name for part in plate_sets(wells({("P1", "A", "1"): plate}), HitsParams())] == [
        "all plates"
    ]


def test_what_cannot_be_compared_at_all_is_one_sentence() -> None:
    def refused(found: WellProfiles, **options: Any) -> str:
        with pytest.raises(UserInputError) as caught:
            plate_sets(found, HitsParams(**options))
        return str(caught.value)

    one = ("P1", None, None)
    assert "No well is a negative control" in refused(wells({one: ["taxol", "water"]}))
    assert "is a control" in refused(wells({one: ["DMSO", "DMSO"]}))
    apart = wells({one: ["DMSO", "DMSO"], ("P2", None, None): ["taxol"]})
    assert "No plate has both treatments and controls" in refused(apart)
    empty = wells({one: ["DMSO", "taxol"]})
    empty.values[:] = np.nan
    assert "all values are missing" in refused(empty)


def test_words_of_what_differs_and_the_order_of_doses() -> None:
    (part,) = plate_sets(wells({("P1", None, None): ["DMSO", "taxol"]}), HitsParams())
    part.add(ScoreLevel.TREATMENT, "taxol", "hit", verdict=Verdict.SMALL)
    said = "1 of 1 treatment differs from the controls; 1 of them no farther than controls."
    assert answer_of(part, HitsParams()) == said
    names = ["b 2 uM", "a 10 uM", "a 3 uM", "a 0.3 uM", "a"]
    assert sorted(names, key=by_number) == ["a", "a 0.3 uM", "a 3 uM", "a 10 uM", "b 2 uM"]


def verdict(
    q: float | None = 0.01, effect: float = 3.0, fewer: float = 0.0, **more: Any
) -> tuple[str, str]:
    p = None if q is None else q / 2
    rule = Score(0.9, p=p, q=q, n_wells=3, note=None if q is not None else "One well only.")
    count = Score(1.0, q=more.pop("count_q", 0.01))
    params = HitsParams(**more.pop("params", {}))
    found, note = judge(
        params, rule, Score(effect), count, fewer=fewer, strongest=3.0, floor=0.001, **more
    )
    assert note.endswith(".")
    return found.value, note


def test_the_rule() -> None:
    assert verdict()[0] == "hit"
    assert verdict(q=0.05)[0] == "no difference"
    assert verdict(effect=-0.1)[0] == "small effect"
    assert verdict(effect=3, params={"min_effect": 4})[0] == "small effect"
    assert verdict(fewer=2.9)[0] == "hit"
    assert verdict(fewer=3)[0] == "mainly fewer cells"
    assert verdict(fewer=9, count_q=0.05)[0] == "hit"  # that there are fewer is not shown
    assert verdict(fewer=-9)[0] == "hit"  # more cells kill nobody
    assert verdict(fewer=2.9, params={"min_over_count": 1})[0] == "mainly fewer cells"
    assert verdict(q=0.05, fewer=1)[0] == "mainly fewer cells"
    assert verdict(q=0.05, fewer=-1)[0] == "no difference"
    assert verdict(q=None) == ("cannot say", "One well only.")
    assert verdict(q=None, empty=3, fewer=1)[0] == "mainly fewer cells"
    unsure = {"fewer": 0.0, "strongest": 0.0}
    few = judge(HitsParams(), Score(p=0.2, q=0.2), Score(1.0), Score(), **unsure, floor=0.1)
    assert few == (Verdict.UNKNOWN, "With so few wells and controls, p cannot be below 0.1.")
