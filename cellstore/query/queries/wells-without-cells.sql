-- Wells that were segmented, and in which no recipe has found a cell.
SELECT t.plate, t.well, t.treatment, count(DISTINCT i.id) AS images
FROM well_table AS t
JOIN images AS i ON i.well_id = t.well_id
JOIN segmentations AS s ON s.image_id = i.id
GROUP BY t.plate, t.well, t.well_row, t.well_column, t.treatment
HAVING sum(s.n_cells) = 0
ORDER BY t.plate, t.well_row, t.well_column
