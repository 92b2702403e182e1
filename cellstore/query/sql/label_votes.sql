-- What each label got in a vote: one row per predict run, level (image or well), vote, unit_id,
-- subset and label. vote is hard (each cell counts once, for its first choice), soft (each cell
-- counts with the probabilities it gave) or median (of these probabilities); votes is what the
-- label got: cells, summed probability, or the median. cells and probability: of its hard and its
-- soft vote. position: its place in the alphabet, from 1. Other columns as in label_counts.
WITH counted AS (
    SELECT run_id, level, vote, unit_id, subset, label_id, cells, probability,
        CASE vote WHEN 'hard' THEN CAST(cells AS DOUBLE) ELSE probability END AS votes
    FROM label_counts
    CROSS JOIN (SELECT 'hard' AS vote UNION ALL SELECT 'soft' AS vote) AS counts
    UNION ALL
    SELECT run_id, level, 'median' AS vote, unit_id, subset, label_id, cells,
        summed AS probability, probability AS votes
    FROM label_medians
)
SELECT
    c.run_id,
    c.level,
    c.vote,
    c.unit_id,
    c.subset,
    c.label_id,
    l.value AS label,
    c.votes,
    c.cells,
    c.probability,
    l.position
FROM counted AS c
JOIN (SELECT id, value, row_number() OVER (ORDER BY value, id) AS position FROM labels) AS l
    ON l.id = c.label_id
