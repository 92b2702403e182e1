-- The hard and the soft vote of each image in short: columns as in image_votes, without the place
-- and the probability of the true label, so that no count of single labels has to be read.
WITH shared AS (
    SELECT
        w.*,
        w.votes / nullif(w.n_cells, 0) AS share,
        (w.votes - w.runner_up_votes) / nullif(w.n_cells, 0) AS margin
    FROM image_winners AS w
),
ruled AS (
    SELECT
        s.*,
        CASE
            WHEN s.n_cells < r.min_cells THEN 'few cells'
            WHEN s.margin < r.min_margin THEN 'close'
        END AS abstained
    FROM shared AS s
    CROSS JOIN vote_rules AS r
)
SELECT
    v.run_id,
    v.image_id,
    ri.well_id,
    ri.subset,
    v.vote,
    w.value AS winner,
    v.votes,
    u.value AS runner_up,
    v.runner_up_votes,
    v.n_cells,
    v.share,
    v.margin,
    v.votes = v.runner_up_votes AS tie,
    v.abstained,
    ri.truth,
    CASE WHEN v.abstained IS NULL THEN w.value = ri.truth END AS correct
FROM ruled AS v
JOIN run_images AS ri ON ri.run_id = v.run_id AND ri.image_id = v.image_id
JOIN labels AS w ON w.id = v.winner_id
LEFT JOIN labels AS u ON u.id = v.runner_up_id
