-- Wells that were segmented, and in which no recipe has found a cell that counts. Excluded wells
-- and images are not looked at.
SELECT i.plate, i.well, i.treatment, count(DISTINCT i.image_id) AS images
FROM image_table AS i
JOIN counted_cells AS c ON c.image_id = i.image_id
WHERE i.excluded IS NULL
GROUP BY i.plate, i.well, i.treatment, i.well_row, i.well_column
HAVING sum(c.n_cells) = 0
ORDER BY i.plate, i.well_row, i.well_column
