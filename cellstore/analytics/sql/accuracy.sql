-- How often the answer is right: one row per predict run, side of the split, level and vote.
-- level and vote as in verdicts; accuracy is correct / n. See report for intervals and baselines.
SELECT
    run_id,
    subset,
    level,
    vote,
    count(*) AS n,
    count(*) FILTER (WHERE correct) AS correct,
    avg(CAST(correct AS INTEGER)) AS accuracy
FROM verdicts
GROUP BY run_id, subset, level, vote
