-- The label of an image by the vote of its cells: one row per predict run, image and vote.
-- vote is hard (each cell counts once, for its first choice), soft (each cell counts with the
-- probabilities it gave) or median (the label with the highest median probability). A draw goes to
-- the label with the higher summed probability, then to the first in alphabetical order; tie says
-- that there was a draw. votes is what the winner got: cells, summed probability, or the median.
-- share is that per cell (the median itself), margin how far it is above the runner-up's share.
-- abstained: null, few cells or close, by vote_rules. truth_place is the place of the true label
-- (1: winner, null: no cell named it among its stored choices); truth_probability the mean
-- probability that the cells gave it; correct is null without a truth or where it abstained.
WITH counted AS (
    SELECT lv.*, v.vote, CASE v.vote WHEN 'hard' THEN lv.cells ELSE lv.probability END AS weight
    FROM image_label_votes AS lv
    CROSS JOIN (VALUES ('hard'), ('soft')) AS v(vote)
    UNION ALL
    SELECT lv.*, 'median' AS vote, m.probability AS weight
    FROM image_label_votes AS lv
    JOIN image_label_medians AS m
        ON m.run_id = lv.run_id AND m.image_id = lv.image_id AND m.label = lv.label
),
placed AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY run_id, image_id, vote ORDER BY weight DESC, probability DESC, label
        ) AS place
    FROM counted
),
voted AS (
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
        CASE vote WHEN 'median' THEN 1 ELSE nullif(sum(cells), 0) END AS whole,
        any_value(truth) AS truth,
        max(place) FILTER (WHERE label = truth) AS truth_place,
        coalesce(max(probability) FILTER (WHERE label = truth), 0) / nullif(sum(cells), 0)
            AS truth_probability
    FROM placed
    GROUP BY run_id, image_id, vote
),
ruled AS (
    SELECT
        v.*,
        votes / whole AS share,
        (votes - runner_up_votes) / whole AS margin,
        votes = runner_up_votes AS tie,
        CASE
            WHEN n_cells < r.min_cells THEN 'few cells'
            WHEN (votes - runner_up_votes) / whole < r.min_margin THEN 'close'
        END AS abstained
    FROM voted AS v
    CROSS JOIN vote_rules AS r
)
SELECT
    run_id,
    image_id,
    well_id,
    subset,
    vote,
    winner,
    votes,
    runner_up,
    runner_up_votes,
    n_cells,
    share,
    margin,
    tie,
    abstained,
    truth,
    truth_place,
    CASE WHEN truth IS NOT NULL THEN truth_probability END AS truth_probability,
    CASE WHEN abstained IS NULL THEN winner = truth END AS correct
FROM ruled
