-- How often the answer is right: one row per predict run, subset of the split, level and vote.
-- level and vote as in scored_predictions; n counts the answers, abstained those that were withheld
-- (not in n), accuracy is correct / n. See report for intervals and baselines.
SELECT
    run_id,
    subset,
    level,
    vote,
    count(*) FILTER (WHERE abstained IS NULL) AS n,
    count(*) FILTER (WHERE correct) AS correct,
    avg(CAST(correct AS INTEGER)) AS accuracy,
    count(*) FILTER (WHERE abstained IS NOT NULL) AS abstained
FROM scored_predictions
GROUP BY run_id, subset, level, vote
