-- Images that have changed since they were segmented: their cells are those of other bytes.
-- Mend with: cellstore segment.
SELECT
    p.barcode AS plate, w.name AS well, i.site, s.recipe_id, s.run_id, s.n_cells,
    s.created_at AS segmented_at
FROM segmentations AS s
JOIN images AS i ON i.id = s.image_id
JOIN wells AS w ON w.id = i.well_id
JOIN plates AS p ON p.id = w.plate_id
WHERE s.content_sha256 IS NOT NULL AND s.content_sha256 IS DISTINCT FROM i.content_sha256
ORDER BY p.barcode, w.well_row, w.well_column, i.site, s.recipe_id
