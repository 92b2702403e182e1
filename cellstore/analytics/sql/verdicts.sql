-- Every answer beside its truth: one row per predict run and cell, image or well.
-- level is cell, image or well, and unit_id the id of that cell, image or well. A cell has one
-- answer, its first choice, listed under vote hard; images and wells have hard and soft ones.
-- confidence is the probability of a cell's first choice, or the winner's share of the vote;
-- truth_place as in image_votes. Answers without a known truth are left out.
WITH cell_answers AS (
    SELECT
        p.run_id,
        p.cell_id,
        any_value(ri.well_id) AS well_id,
        any_value(ri.subset) AS subset,
        any_value(ri.truth) AS truth,
        max(l.value) FILTER (WHERE p.rank = 1) AS predicted,
        max(p.probability) FILTER (WHERE p.rank = 1) AS confidence,
        min(p.rank) FILTER (WHERE l.value = ri.truth) AS truth_place
    FROM predictions AS p
    JOIN voters AS v ON v.cell_id = p.cell_id
    JOIN labels AS l ON l.id = p.label_id
    JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = v.image_id
    GROUP BY p.run_id, p.cell_id
),
answers AS (
    SELECT
        run_id, subset, 'cell' AS level, 'hard' AS vote, cell_id AS unit_id, well_id,
        truth, predicted, confidence, truth_place, false AS tie
    FROM cell_answers
    UNION ALL
    SELECT
        run_id, subset, 'image' AS level, vote, image_id AS unit_id, well_id,
        truth, winner AS predicted, share AS confidence, truth_place, tie
    FROM image_votes
    UNION ALL
    SELECT
        run_id, subset, 'well' AS level, vote, well_id AS unit_id, well_id,
        truth, winner AS predicted, share AS confidence, truth_place, tie
    FROM well_votes
)
SELECT *, predicted = truth AS correct
FROM answers
WHERE truth IS NOT NULL AND predicted IS NOT NULL
