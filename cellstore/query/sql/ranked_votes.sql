-- The label that won each vote, and the second (by id): one row per predict run, level, vote,
-- unit_id and subset, as in label_votes. The label with the most votes wins; among equals the one
-- with the highest summed probability, then the first in the alphabet. votes says the same with
-- names. This is the only place where labels are ranked.
SELECT
    run_id,
    level,
    vote,
    unit_id,
    subset,
    best[1].label_id AS winner_id,
    best[1].votes AS votes,
    CASE WHEN best[2].votes > 0 THEN best[2].label_id END AS runner_up_id,
    coalesce(best[2].votes, 0) AS runner_up_votes,
    n_cells
FROM (
    SELECT
        run_id,
        level,
        vote,
        unit_id,
        subset,
        -- The two largest, in the order of the fields. row_number() would sort all rows: ten times
        -- as slow with two million of them.
        max(
            struct_pack(
                votes := votes,
                probability := probability,
                before := -position,
                label_id := label_id
            ),
            2
        ) AS best,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM label_votes
    GROUP BY run_id, level, vote, unit_id, subset
)
