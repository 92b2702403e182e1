-- What two predict runs say of the same cell, image or well: one row per pair of runs
-- (run_id < other_run_id), level, vote, unit and subset of the split that both have labelled.
-- level, vote, unit_id and truth as in scored_predictions; answers are null where a run abstained.
-- Ask for two runs: all pairs are many.
SELECT
    a.run_id,
    b.run_id AS other_run_id,
    a.level,
    a.vote,
    a.unit_id,
    a.plate,
    a.well,
    a.site,
    a.truth,
    CASE WHEN a.abstained IS NULL THEN a.predicted END AS winner,
    CASE WHEN b.abstained IS NULL THEN b.predicted END AS other_winner,
    a.correct,
    b.correct AS other_correct,
    a.abstained IS DISTINCT FROM b.abstained
    OR (a.abstained IS NULL AND a.predicted <> b.predicted) AS differ,
    a.image_id,
    a.well_id
FROM scored_predictions AS a
JOIN scored_predictions AS b
    ON b.level = a.level
    AND b.vote = a.vote
    AND b.unit_id = a.unit_id
    AND b.run_id > a.run_id
    AND b.truth = a.truth
    AND b.subset = a.subset
