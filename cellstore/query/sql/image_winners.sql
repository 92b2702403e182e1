-- The label that the cells of an image chose, and the second: one row per predict run, image and
-- vote (hard or soft), with the labels by id. votes and runner_up_votes as in image_votes, which
-- says the same in words and by the rules.
WITH told AS (
    SELECT c.run_id, c.image_id, c.cells, c.probability, c.label_id, n.late
    FROM image_label_counts AS c
    JOIN (
        SELECT id, row_number() OVER (ORDER BY value DESC, id DESC) AS late FROM labels
    ) AS n ON n.id = c.label_id
),
-- What decides is an entry, in the order of its parts: late is small for a label that is late in
-- the alphabet.
voted AS (
    SELECT
        run_id,
        image_id,
        'hard' AS vote,
        max(
            struct_pack(
                weight := CAST(cells AS DOUBLE),
                probability := probability,
                late := late,
                label_id := label_id
            ),
            2
        ) AS best,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM told
    GROUP BY run_id, image_id
    UNION ALL
    SELECT
        run_id,
        image_id,
        'soft' AS vote,
        max(
            struct_pack(
                weight := probability,
                probability := probability,
                late := late,
                label_id := label_id
            ),
            2
        ) AS best,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM told
    GROUP BY run_id, image_id
)
SELECT
    run_id,
    image_id,
    vote,
    best[1].label_id AS winner_id,
    best[1].weight AS votes,
    CASE WHEN best[2].weight > 0 THEN best[2].label_id END AS runner_up_id,
    coalesce(best[2].weight, 0) AS runner_up_votes,
    n_cells
FROM voted
