-- Where the file of each channel of an image is: one row per row of image_files.
-- uri is the place where it was seen, or, if it has not been seen (seen is false), where a table
-- says it is; null where nothing says.
SELECT
    f.id AS image_file_id,
    f.image_id,
    f.channel,
    f.position,
    f.name,
    rtrim(d.uri, '/') || '/' || f.name AS uri,
    f.sha256 IS NOT NULL AS seen
FROM image_files AS f
LEFT JOIN folders AS d ON d.id = f.folder_id
