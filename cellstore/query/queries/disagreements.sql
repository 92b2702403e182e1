-- Images that two predict runs label differently, and which of the two is right.
-- :runs (two predict runs)  The runs, with a comma between.
-- :vote (text) = hard  hard, soft or median.
SELECT
    p.barcode AS plate, w.name AS well, i.site, a.truth,
    a.winner AS first_says, a.share AS first_share,
    b.winner AS second_says, b.share AS second_share,
    CASE
        WHEN a.truth IS NULL THEN NULL
        WHEN a.winner = a.truth THEN 'first' WHEN b.winner = a.truth THEN 'second' ELSE 'none'
    END AS right_is
FROM image_votes AS a
JOIN image_votes AS b ON b.image_id = a.image_id AND b.vote = a.vote
JOIN images AS i ON i.id = a.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE
    a.run_id = $runs[1] AND b.run_id = $runs[2] AND a.vote = $vote
    AND a.abstained IS NULL AND b.abstained IS NULL
    AND a.winner IS DISTINCT FROM b.winner
ORDER BY p.barcode, w.well_row, w.well_column, i.site, i.plane, i.time_point
