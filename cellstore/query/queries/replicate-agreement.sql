-- How far the wells of a treatment get the same label from a run, whatever that is: the share of
-- its wells whose label is the most frequent one. Only treatments with several wells.
-- :run (predict run) = latest  Whose labels.
-- :vote (text) = hard  hard or soft.
WITH labelled AS (
    SELECT t.name AS perturbation, v.winner, count(*) AS wells
    FROM well_votes AS v
    JOIN wells AS w ON w.id = v.well_id
    JOIN treatments AS t ON t.id = w.treatment_id
    WHERE v.run_id = $run AND v.vote = $vote AND v.winner IS NOT NULL
    GROUP BY t.name, v.winner
)
SELECT
    perturbation,
    CAST(sum(wells) AS BIGINT) AS wells,
    arg_max(winner, (wells, winner)) AS most_frequent,
    max(wells) / sum(wells) AS agreement
FROM labelled
GROUP BY perturbation
HAVING sum(wells) > 1
ORDER BY agreement, perturbation
