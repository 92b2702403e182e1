-- Where the file of each channel of an image is: one row per row of image_files.
-- uri is the folder and name under which it was seen, or, if it has not been seen (seen is false),
-- those that a table names; null where nothing says.
SELECT
    f.id AS image_file_id,
    f.image_id,
    p.barcode AS plate,
    w.name AS well,
    i.site,
    f.channel,
    f.position,
    f.name,
    rtrim(d.uri, '/') || '/' || f.name AS uri,
    f.sha256 IS NOT NULL AS seen
FROM image_files AS f
JOIN images AS i ON i.id = f.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN folders AS d ON d.id = f.folder_id
