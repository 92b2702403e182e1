-- The label of an image by the vote of its cells: one row per predict run, image and vote.
-- vote is hard (each cell counts once, for its first choice) or soft (each cell counts with the
-- probabilities it gave). A draw of the hard vote goes to the label with the higher summed
-- probability, then to the first in alphabetical order; tie says that there was a draw.
-- share is the winner's votes per cell; truth_place the place of the true label (1: winner,
-- null: no cell named it among its stored choices).
WITH weighed AS (
    SELECT lv.*, v.vote, CASE v.vote WHEN 'hard' THEN lv.cells ELSE lv.probability END AS weight
    FROM image_label_votes AS lv
    CROSS JOIN (VALUES ('hard'), ('soft')) AS v(vote)
),
placed AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, image_id, vote ORDER BY weight DESC, probability DESC, label
        ) AS place
    FROM weighed
)
SELECT
    run_id,
    image_id,
    any_value(well_id) AS well_id,
    any_value(subset) AS subset,
    vote,
    max(label) FILTER (WHERE place = 1) AS winner,
    max(weight) FILTER (WHERE place = 1) AS votes,
    max(label) FILTER (WHERE place = 2 AND weight > 0) AS runner_up,
    coalesce(max(weight) FILTER (WHERE place = 2), 0) AS runner_up_votes,
    CAST(sum(cells) AS BIGINT) AS n_cells,
    max(weight) FILTER (WHERE place = 1) / nullif(sum(cells), 0) AS share,
    max(weight) FILTER (WHERE place = 1)
        = coalesce(max(weight) FILTER (WHERE place = 2), 0) AS tie,
    any_value(truth) AS truth,
    max(place) FILTER (WHERE label = truth) AS truth_place,
    max(label) FILTER (WHERE place = 1) = any_value(truth) AS correct
FROM placed
GROUP BY run_id, image_id, vote
