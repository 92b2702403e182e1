-- Precision, recall and F1 of each label: one row per predict run, subset, level, vote and label.
-- support is how often the label is true, predicted how often it was answered. recall is null
-- for a label that is never true, precision for one that is never answered, as nothing was asked.
WITH counted AS (
    SELECT run_id, subset, level, vote, truth AS label, n AS support, 0 AS predicted,
        CASE WHEN truth = predicted THEN n ELSE 0 END AS correct
    FROM confusion
    UNION ALL
    SELECT run_id, subset, level, vote, predicted AS label, 0 AS support, n AS predicted,
        0 AS correct
    FROM confusion
)
SELECT
    run_id,
    subset,
    level,
    vote,
    label,
    CAST(sum(support) AS BIGINT) AS support,
    CAST(sum(predicted) AS BIGINT) AS predicted,
    CAST(sum(correct) AS BIGINT) AS correct,
    sum(correct) / nullif(sum(support), 0) AS recall,
    sum(correct) / nullif(sum(predicted), 0) AS precision,
    2 * sum(correct) / (sum(support) + sum(predicted)) AS f1
FROM counted
GROUP BY run_id, subset, level, vote, label
