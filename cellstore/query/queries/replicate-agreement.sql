-- How far the wells of a treatment get the same label from a run, whatever that is: the share of
-- its wells whose label is the most frequent one. Each dose is a treatment of its own. Only
-- treatments with several wells. A well whose images are in several subsets of the split counts
-- once, by those that test, else those outside of the split, those that validate, those that train.
-- :run (predict run) = latest  Whose labels.
-- :vote (text) = hard  hard, soft or median.
WITH by_well AS (
    SELECT
        well_id,
        arg_min(
            winner, list_position(['test', 'outside', 'validation', 'train'], subset)
        ) AS winner
    FROM votes
    WHERE run_id = $run AND level = 'well' AND vote = $vote AND winner IS NOT NULL
    GROUP BY well_id
),
labelled AS (
    SELECT t.name_with_dose, v.winner, count(*) AS wells
    FROM by_well AS v
    JOIN wells AS w ON w.id = v.well_id
    JOIN treatments AS t ON t.id = w.treatment_id
    GROUP BY t.name_with_dose, v.winner
)
SELECT
    name_with_dose,
    CAST(sum(wells) AS BIGINT) AS wells,
    arg_max(winner, (wells, winner)) AS most_frequent,
    max(wells) / sum(wells) AS agreement
FROM labelled
GROUP BY name_with_dose
HAVING sum(wells) > 1
ORDER BY agreement, name_with_dose
