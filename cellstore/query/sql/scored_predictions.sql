-- Every answer beside its truth: one row per predict run, level (cell, image or well), vote and
-- subset of the split. unit_id is the id of the cell, image or well; image_id is null for a well.
-- A cell has one answer, its first choice, listed under vote hard; images and wells have those of
-- votes. confidence is the probability of a cell's first choice, or the winner's share of the vote.
-- truth_rank is the rank of the true label (1: the answer; null: no cell named it), and
-- truth_probability the mean probability that the cells gave it (null for a cell that does not have
-- it among its stored choices). Answers without a known truth are left out, and so are controls if
-- vote_options says so. correct is null where the vote abstained.
WITH cell_truths AS (
    SELECT p.run_id, p.cell_id, min(p.rank) AS truth_rank, max(p.probability) AS probability
    FROM eligible_predictions AS p
    JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = p.image_id
    JOIN labels AS l ON l.id = p.label_id AND l.value = ri.truth
    GROUP BY p.run_id, p.cell_id
),
true_labels AS (SELECT value, list(id) AS ids FROM labels GROUP BY value),
listed AS (
    SELECT
        run_id,
        level,
        vote,
        unit_id,
        subset,
        list(
            struct_pack(
                votes := votes,
                probability := probability,
                before := -position,
                label_id := label_id
            )
        ) AS labels
    FROM label_votes
    GROUP BY run_id, level, vote, unit_id, subset
),
voted AS (
    SELECT
        v.*,
        l.labels,
        list_filter(l.labels, lambda item: list_contains(t.ids, item.label_id))[1] AS true_label
    FROM votes AS v
    LEFT JOIN listed AS l
        ON l.run_id = v.run_id
        AND l.level = v.level
        AND l.vote = v.vote
        AND l.unit_id = v.unit_id
        AND coalesce(l.subset, v.subset) = v.subset
    LEFT JOIN true_labels AS t ON t.value = v.truth
    WHERE v.truth IS NOT NULL
)
SELECT
    p.run_id, 'cell' AS level, 'hard' AS vote, p.cell_id AS unit_id, ri.plate, ri.well, ri.site,
    ri.subset, ri.truth, l.value AS predicted, p.probability AS confidence, t.truth_rank,
    t.probability AS truth_probability, false AS tie, CAST(NULL AS VARCHAR) AS abstained,
    l.value = ri.truth AS correct, ri.control, ri.image_id, ri.well_id, ri.plate_id
FROM eligible_predictions AS p
JOIN labels AS l ON l.id = p.label_id
JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = p.image_id
LEFT JOIN cell_truths AS t ON t.run_id = p.run_id AND t.cell_id = p.cell_id
CROSS JOIN vote_options AS o
WHERE p.rank = 1 AND p.cell_id IS NOT NULL AND ri.truth IS NOT NULL AND (o.controls OR ri.control IS NULL)
UNION ALL
SELECT
    run_id, level, vote, unit_id, plate, well, site,
    subset, truth, winner AS predicted, share AS confidence,
    CASE WHEN true_label IS NOT NULL
        THEN len(list_filter(labels, lambda item: item >= true_label)) END AS truth_rank,
    coalesce(true_label.probability, 0) / nullif(n_cells, 0) AS truth_probability, tie, abstained,
    correct, control, image_id, well_id, plate_id
FROM voted
