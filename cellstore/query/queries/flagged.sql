-- Images that a quality-control run flagged, and why: the value and what was usual. A channel has
-- the name that it had when the run looked at it.
-- :run (qc run) = latest  Whose flags.
SELECT i.plate, i.well, i.site, f.reason, f.channel, f.value, f.low, f.high
FROM image_flags AS f
JOIN image_table AS i ON i.image_id = f.image_id
WHERE f.run_id = $run
ORDER BY i.plate, i.well_row, i.well_column, i.site, f.reason, f.channel
