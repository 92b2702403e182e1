-- Image files that a table names and that have not been found.
SELECT p.barcode AS plate, w.name AS well, i.site, l.channel, l.name AS file, l.uri
FROM image_locations AS l
JOIN images AS i ON i.id = l.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE NOT l.seen
ORDER BY p.barcode, w.well_row, w.well_column, i.site, l.position
