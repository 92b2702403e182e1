"""The rendered plates and fields: reproducible, labelled right, and without effect where asked."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage
from training_fields import render_nuclei

from cellstore.analysis.rendering import (
    CONTROL,
    TREATMENTS,
    Effect,
    PlateDesign,
    Population,
    blurred,
    lay_cells,
    render_field,
    smooth_noise,
)

SMALL = PlateDesign(size=96, sites=1, treatments=TREATMENTS)


def spec_of(design, name):
    return next(spec for spec in design.fields() if spec.treatment.pert_iname == name)


def test_a_field_does_not_depend_on_what_was_rendered_before():
    specs = list(SMALL.fields())[:3]
    forward = [render_field(SMALL, spec).channels for spec in specs]
    backward = [render_field(SMALL, spec).channels for spec in reversed(specs)]
    for one, other in zip(forward, reversed(backward), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(forward[0], forward[1])


def test_another_seed_gives_other_pixels():
    other = dataclasses.replace(SMALL, seed=2)
    spec = next(SMALL.fields())
    assert not np.array_equal(
        render_field(SMALL, spec).channels, render_field(other, spec).channels
    )


@pytest.mark.parametrize("treatment", TREATMENTS, ids=lambda t: t.pert_iname)
def test_without_effect_a_treated_well_is_the_same_as_a_control_well(treatment):
    silent = dataclasses.replace(SMALL, effect=0.0)
    spec = spec_of(SMALL, treatment.pert_iname)
    as_control = dataclasses.replace(spec, treatment=CONTROL)
    treated, control = render_field(silent, spec), render_field(silent, as_control)
    np.testing.assert_array_equal(treated.channels, control.channels)
    np.testing.assert_array_equal(treated.masks, control.masks)
    if treatment != CONTROL:
        assert not np.array_equal(render_field(SMALL, spec).channels, control.channels)


def test_wells_differ_as_much_as_they_are_told_to():
    design = PlateDesign(size=96, sites=1, effect=0.0)
    fields = {}
    for strength in (0.0, 1.0, 6.0):
        design = dataclasses.replace(design, well_effect=strength)
        specs = list(design.fields())[:12]
        darkest = [np.percentile(render_field(design, s).channels, 5) for s in specs]
        fields[strength] = np.std(darkest)
    assert 1.5 * fields[0.0] < fields[1.0] < 0.5 * fields[6.0], fields


def test_without_effect_the_layout_stays():
    silent = dataclasses.replace(SMALL, effect=0.0)
    assert list(silent.fields()) == list(SMALL.fields())


def test_the_effect_grows_with_its_strength():
    effect = Effect(diameter=4.0, count=0.25)
    assert effect.scaled(0.5) == Effect(diameter=2.0, count=0.5)
    assert effect.scaled(1.0) == effect
    assert effect.scaled(0.0) == Effect()


def test_a_larger_treatment_has_larger_cells():
    design = PlateDesign(sites=1)
    sizes = {}
    for name in ("demolimus", "DMSO", "demostatin"):
        specs = [s for s in design.fields() if s.treatment.pert_iname == name][:3]
        areas = [np.bincount(render_field(design, s).masks.ravel())[1:] for s in specs]
        sizes[name] = np.median(np.concatenate(areas))
    assert sizes["demolimus"] < 0.8 * sizes["DMSO"] < sizes["DMSO"] < 0.8 * sizes["demostatin"]


def test_channels_and_masks_have_the_promised_form():
    design = PlateDesign(size=96, sites=1, n_channels=5)
    field = render_field(design, next(design.fields()))
    assert field.channels.shape == (5, 96, 96)
    assert field.channels.dtype == field.masks.dtype == np.uint16
    assert np.array_equal(np.unique(field.masks), np.arange(field.masks.max() + 1))
    assert design.channel_names == ("Mito", "AGP", "RNA", "ER", "DNA")


def test_cells_are_brighter_than_what_lies_between_them_in_every_channel_but_the_nuclear_one():
    field = render_field(SMALL, next(SMALL.fields()))
    for plane in [*field.channels, np.median(field.channels, axis=0)]:
        assert np.median(plane[field.masks > 0]) > 2 * np.median(plane[field.masks == 0])


def test_the_layout_lets_a_well_grouped_split_keep_every_treatment_on_both_sides():
    design = PlateDesign()
    fields = list(design.fields())
    wells = {(s.plate, s.row, s.column): s.treatment.pert_iname for s in fields}
    per_treatment = {name: list(wells.values()).count(name) for name in set(wells.values())}
    assert len(design.plates) >= 2
    assert len(per_treatment) >= 6
    assert all(count >= 4 for count in per_treatment.values())
    assert per_treatment["DMSO"] > 2 * max(c for n, c in per_treatment.items() if n != "DMSO")
    assert len(fields) == len({(s.plate, s.core_name) for s in fields}) == len(design)


def test_each_plate_has_its_own_layout():
    first, second = (SMALL.wells(plate) for plate in SMALL.plates)
    assert [place[:2] for place in first] == [place[:2] for place in second]
    assert [place[2] for place in first] != [place[2] for place in second]


def test_phenix_names():
    spec = dataclasses.replace(next(SMALL.fields()), row=2, column=14, site=3)
    assert spec.well == "B14"
    assert spec.core_name == "r02c14f03"
    assert spec.file_name(2) == "r02c14f03p01-ch2sk1fk1fl1.tiff"


@pytest.mark.parametrize("seed", range(4))
def test_every_cell_is_one_piece_and_overlaps_nobody(seed):
    population = Population(40, 14.0, crowding=0.9, irregularity=0.1)
    cells = lay_cells(np.random.default_rng(seed), (96, 96), population)
    assert cells.count == cells.masks.max() > 10
    for label in range(1, cells.count + 1):
        assert ndimage.label(cells.masks == label)[1] == 1
    assert np.array_equal(cells.height > 0, cells.masks > 0)


def test_round_cells_have_the_area_of_their_circle():
    rng = np.random.default_rng(3)
    alone = Population(1, 40.0, spread=0.0, elongation=1.0, irregularity=0.0)
    areas = [int((lay_cells(rng, (200, 200), alone).masks > 0).sum()) for _ in range(20)]
    assert max(areas) == pytest.approx(np.pi * 20**2, rel=0.05)


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_smooth_noise_is_standardised_and_correlated_over_its_scale(scale):
    noise = smooth_noise(np.random.default_rng(0), (160, 200), scale)
    assert noise.shape == (160, 200)
    assert noise.mean() == pytest.approx(0, abs=1e-4)
    assert noise.std() == pytest.approx(1, abs=1e-4)
    near = int(max(1, scale / 2))
    assert np.mean(noise[:, near:] * noise[:, :-near]) > 0.6


@pytest.mark.parametrize("sigma", [1.0, 15.0])
def test_blur_keeps_the_light_and_the_shape(sigma):
    spot = np.zeros((151, 173), np.float32)
    spot[60:90, 70:100] = 1
    soft = blurred(spot, sigma)
    assert soft.shape == spot.shape
    assert soft.sum() == pytest.approx(900, rel=0.1)
    assert soft.max() <= 1.0 + 1e-5


@pytest.mark.parametrize("diameter", [10.0, 30.0, 60.0])
def test_training_fields_have_cells_of_the_size_asked_for(diameter):
    ratios = []
    for seed in range(6):
        field = render_nuclei(np.random.default_rng(seed), (256, 256), diameter)
        areas = np.bincount(field.masks.ravel())[1:]
        ratios.append(np.sqrt(np.median(areas) * 4 / np.pi) / diameter)
        assert np.isfinite(field.image).all()
    assert 0.8 < np.median(ratios) < 1.15
