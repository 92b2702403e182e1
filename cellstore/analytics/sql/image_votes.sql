-- The label of an image by the vote of its cells: one row per predict run, image and vote.
-- vote is hard (each cell counts once, for its first choice), soft (each cell counts with the
-- probabilities it gave) or median (the label with the highest median probability). A draw goes to
-- the label with the higher summed probability, then to the first in alphabetical order; tie says
-- that there was a draw. votes is what the winner got: cells, summed probability, or the median.
-- share is that per cell (the median itself), margin how far it is above the runner-up's share.
-- abstained: null, few cells or close, by vote_rules. truth_place is the place of the true label
-- (1: winner, null: no cell named it among its stored choices); truth_probability the mean
-- probability that the cells gave it; correct is null without a truth or where it abstained.
WITH named AS (
    SELECT id, value, row_number() OVER (ORDER BY value DESC, id DESC) AS late FROM labels
),
told AS (
    SELECT c.run_id, c.image_id, c.cells, c.probability, n.value AS label, n.late
    FROM image_label_counts AS c
    JOIN named AS n ON n.id = c.label_id
),
counted AS (
    SELECT *, 'hard' AS vote, CAST(cells AS DOUBLE) AS weight FROM told
    UNION ALL
    SELECT *, 'soft' AS vote, probability AS weight FROM told
    UNION ALL
    SELECT told.*, 'median' AS vote, m.probability AS weight
    FROM told
    JOIN image_label_medians AS m
        ON m.run_id = told.run_id AND m.image_id = told.image_id AND m.label = told.label
),
entered AS (
    -- What decides, in this order; late is small for a label that is late in the alphabet.
    SELECT
        c.run_id, c.image_id, ri.well_id, ri.subset, ri.truth, c.vote, c.cells,
        struct_pack(weight := c.weight, probability := c.probability, late := c.late) AS entry,
        c.label = ri.truth AS is_true
    FROM counted AS c
    JOIN run_images AS ri ON ri.run_id = c.run_id AND ri.image_id = c.image_id
),
voted AS (
    SELECT
        run_id,
        image_id,
        any_value(well_id) AS well_id,
        any_value(subset) AS subset,
        any_value(truth) AS truth,
        vote,
        max(entry, 2) AS best,
        list(entry) AS entries,
        max(entry) FILTER (WHERE is_true) AS true_entry,
        CAST(sum(cells) AS BIGINT) AS n_cells
    FROM entered
    GROUP BY run_id, image_id, vote
),
placed AS (
    SELECT
        *,
        best[1].weight AS votes,
        coalesce(best[2].weight, 0) AS runner_up_votes,
        CASE vote WHEN 'median' THEN 1 ELSE nullif(n_cells, 0) END AS whole,
        CASE WHEN true_entry IS NOT NULL
            THEN len(list_filter(entries, lambda entry: entry >= true_entry)) END AS truth_place,
        CASE WHEN truth IS NOT NULL
            THEN coalesce(true_entry.probability, 0) / nullif(n_cells, 0) END AS truth_probability
    FROM voted
),
ruled AS (
    SELECT
        p.*,
        w.value AS winner,
        u.value AS runner_up,
        votes / whole AS share,
        (votes - runner_up_votes) / whole AS margin,
        votes = runner_up_votes AS tie,
        CASE
            WHEN n_cells < r.min_cells THEN 'few cells'
            WHEN (votes - runner_up_votes) / whole < r.min_margin THEN 'close'
        END AS abstained
    FROM placed AS p
    JOIN named AS w ON w.late = best[1].late
    LEFT JOIN named AS u ON u.late = best[2].late AND runner_up_votes > 0
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
    truth_probability,
    CASE WHEN abstained IS NULL THEN winner = truth END AS correct
FROM ruled
