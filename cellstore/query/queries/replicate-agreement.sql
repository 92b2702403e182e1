-- How far the wells of a treatment get the same label from a run, whatever that is: the share of
-- its wells whose label is the most frequent one. Only treatments with several wells.
-- :run (predict run) = latest  Whose labels.
-- :vote (text) = hard  hard, soft or median.
WITH labelled AS (
    SELECT t.treatment, v.winner, count(*) AS wells
    FROM votes AS v
    JOIN well_table AS t ON t.well_id = v.well_id
    WHERE
        v.run_id = $run AND v.level = 'well' AND v.vote = $vote AND v.winner IS NOT NULL
        AND t.treatment IS NOT NULL
    GROUP BY t.treatment, v.winner
)
SELECT
    treatment,
    CAST(sum(wells) AS BIGINT) AS wells,
    arg_max(winner, (wells, winner)) AS most_frequent,
    max(wells) / sum(wells) AS agreement
FROM labelled
GROUP BY treatment
HAVING sum(wells) > 1
ORDER BY agreement, treatment
