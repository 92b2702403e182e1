-- Wells that were segmented, and in which no recipe has found a cell.
SELECT
    p.barcode AS plate, w.name AS well, t.name AS perturbation, count(DISTINCT i.id) AS images
FROM wells AS w
JOIN plates AS p ON p.id = w.plate_id
JOIN images AS i ON i.well_id = w.id
JOIN segmentations AS s ON s.image_id = i.id
LEFT JOIN treatments AS t ON t.id = w.treatment_id
GROUP BY p.barcode, w.id, w.name, w.well_row, w.well_column, t.name
HAVING sum(s.n_cells) = 0
ORDER BY p.barcode, w.well_row, w.well_column
