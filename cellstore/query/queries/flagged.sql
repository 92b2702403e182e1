-- Images that a quality-control run holds to be odd, and why: the value and what was usual.
-- :run (qc run) = latest  Whose flags.
SELECT
    p.barcode AS plate, w.name AS well, i.site, f.reason, f.channel, f.value, f.low, f.high
FROM image_flags AS f
JOIN images AS i ON i.id = f.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE f.run_id = $run
ORDER BY p.barcode, w.well_row, w.well_column, i.site, f.reason, f.channel
