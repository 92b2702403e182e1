-- Images that two predict runs label differently, and which of the two is right.
-- :runs (two predict runs)  The runs, with a comma between.
-- :vote (text) = hard  hard, soft or median.
SELECT
    a.plate, a.well, a.site, a.truth,
    a.winner AS first_says, a.share AS first_share,
    b.winner AS second_says, b.share AS second_share,
    CASE
        WHEN a.truth IS NULL THEN NULL
        WHEN a.winner = a.truth THEN 'first' WHEN b.winner = a.truth THEN 'second' ELSE 'none'
    END AS right_is
FROM votes AS a
JOIN votes AS b ON b.level = a.level AND b.vote = a.vote AND b.image_id = a.image_id
JOIN image_table AS i ON i.image_id = a.image_id
WHERE
    a.run_id = $runs[1] AND b.run_id = $runs[2] AND a.level = 'image' AND a.vote = $vote
    AND a.abstained IS NULL AND b.abstained IS NULL
    AND a.winner IS DISTINCT FROM b.winner
ORDER BY i.plate, i.well_row, i.well_column, i.site, i.plane, i.time_point
