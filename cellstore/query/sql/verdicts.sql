-- Every answer beside its truth: one row per predict run and cell, image or well.
-- level is cell, image or well, and unit_id the id of that cell, image or well; image_id is null
-- for a well. A cell has one answer, its first choice, listed under vote hard; images and wells
-- have hard, soft and median ones. confidence is the probability of a cell's first choice, or the
-- winner's share of the vote; truth_place, truth_probability and abstained as in image_votes (for
-- a cell truth_probability is null where the truth is not among its stored choices). correct is
-- null where it abstained. Answers without a known truth are left out; so are controls, if
-- vote_rules says so.
WITH truths AS (
    SELECT b.run_id, b.cell_id, min(b.rank) AS place, max(b.probability) AS probability
    FROM ballots AS b
    JOIN run_images AS ri ON ri.run_id = b.run_id AND ri.image_id = b.image_id
    JOIN labels AS l ON l.id = b.label_id AND l.value = ri.truth
    GROUP BY b.run_id, b.cell_id
),
cell_answers AS (
    SELECT
        b.run_id,
        b.cell_id,
        b.image_id,
        ri.well_id,
        ri.plate_id,
        ri.subset,
        ri.control,
        ri.truth,
        l.value AS predicted,
        b.probability AS confidence,
        t.place AS truth_place,
        t.probability AS truth_probability
    FROM ballots AS b
    JOIN labels AS l ON l.id = b.label_id
    JOIN run_images AS ri ON ri.run_id = b.run_id AND ri.image_id = b.image_id
    LEFT JOIN truths AS t ON t.run_id = b.run_id AND t.cell_id = b.cell_id
    WHERE b.rank = 1
),
well_places AS (
    SELECT id AS well_id, plate_id, control FROM wells
),
answers AS (
    SELECT
        run_id, subset, 'cell' AS level, 'hard' AS vote, cell_id AS unit_id, image_id, well_id,
        plate_id, control, truth, predicted, confidence, truth_place, truth_probability,
        false AS tie, CAST(NULL AS VARCHAR) AS abstained
    FROM cell_answers
    UNION ALL
    SELECT
        v.run_id, v.subset, 'image' AS level, v.vote, v.image_id AS unit_id, v.image_id, v.well_id,
        p.plate_id, p.control, v.truth, v.winner AS predicted, v.share AS confidence,
        v.truth_place, v.truth_probability, v.tie, v.abstained
    FROM image_votes AS v
    JOIN well_places AS p ON p.well_id = v.well_id
    UNION ALL
    SELECT
        v.run_id, v.subset, 'well' AS level, v.vote, v.well_id AS unit_id, NULL AS image_id,
        v.well_id, p.plate_id, p.control, v.truth, v.winner AS predicted, v.share AS confidence,
        v.truth_place, v.truth_probability, v.tie, v.abstained
    FROM well_votes AS v
    JOIN well_places AS p ON p.well_id = v.well_id
)
SELECT a.*, CASE WHEN abstained IS NULL THEN predicted = truth END AS correct
FROM answers AS a
CROSS JOIN vote_rules AS r
WHERE truth IS NOT NULL AND predicted IS NOT NULL AND (r.controls OR control IS NULL)
