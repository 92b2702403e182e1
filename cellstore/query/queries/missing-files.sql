-- Image files that a table names and that have not been found.
SELECT l.plate, l.well, l.site, l.channel, l.name AS file, l.uri
FROM image_locations AS l
JOIN image_table AS i ON i.image_id = l.image_id
WHERE NOT l.seen
ORDER BY l.plate, i.well_row, i.well_column, l.site, l.position
