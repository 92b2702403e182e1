-- The label of an image, or of a well, by the vote of its cells: one row per predict run, level
-- (image or well), vote (hard, soft or median), image or well, and subset of the split. A well
-- whose images are in several subsets has a row for each. unit_id is the id of the image or well.
-- votes is what the winner got: cells, summed probability, or the median; share is that per cell
-- (the median itself), margin how far it is above the runner-up's share. tie: both got the same,
-- so that the higher summed probability decided, then the alphabet. abstained: null, few cells or
-- close, by vote_options; correct is null without a truth or where it abstained.
WITH units AS (
    SELECT
        run_id, 'image' AS level, image_id AS unit_id, subset, image_id, well_id, plate_id, plate,
        well, site, control, truth
    FROM run_images
    UNION ALL
    SELECT
        run_id, 'well' AS level, well_id AS unit_id, subset, NULL AS image_id, well_id,
        any_value(plate_id) AS plate_id, any_value(plate) AS plate, any_value(well) AS well,
        NULL AS site, any_value(control) AS control, max(truth) AS truth
    FROM run_images
    GROUP BY run_id, well_id, subset
),
shared AS (
    SELECT
        u.*,
        r.vote,
        r.winner_id,
        r.votes,
        r.runner_up_id,
        r.runner_up_votes,
        r.n_cells,
        r.votes / CASE r.vote WHEN 'median' THEN 1 ELSE nullif(r.n_cells, 0) END AS share,
        (r.votes - r.runner_up_votes)
        / CASE r.vote WHEN 'median' THEN 1 ELSE nullif(r.n_cells, 0) END AS margin
    FROM ranked_votes AS r
    JOIN units AS u
        ON u.run_id = r.run_id
        AND u.level = r.level
        AND u.unit_id = r.unit_id
        AND u.subset = coalesce(r.subset, u.subset)
),
decided AS (
    SELECT
        s.*,
        w.value AS winner,
        l.value AS runner_up,
        CASE
            WHEN s.n_cells < o.min_cells THEN 'few cells'
            WHEN s.margin < o.min_margin THEN 'close'
        END AS abstained
    FROM shared AS s
    JOIN labels AS w ON w.id = s.winner_id
    LEFT JOIN labels AS l ON l.id = s.runner_up_id
    CROSS JOIN vote_options AS o
    WHERE o.controls OR s.control IS NULL
)
SELECT
    run_id,
    level,
    vote,
    unit_id,
    plate,
    well,
    site,
    subset,
    winner,
    votes,
    share,
    runner_up,
    runner_up_votes,
    margin,
    n_cells,
    votes = runner_up_votes AS tie,
    abstained,
    truth,
    CASE WHEN abstained IS NULL THEN winner = truth END AS correct,
    control,
    image_id,
    well_id,
    plate_id
FROM decided
