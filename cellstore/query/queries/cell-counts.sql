-- Cells of each well by each segmentation recipe: the images that count and how many of their cells
-- count, in all and per image. excluded: how many cells of the well do not count.
-- :plate (text) = nothing  Only this plate.
SELECT
    i.plate, i.well, i.treatment, c.recipe_id AS recipe,
    count(*) - count(i.excluded) AS images,
    CAST(sum(c.n_cells) AS BIGINT) AS cells,
    CAST(sum(c.n_excluded_cells) AS BIGINT) AS excluded,
    avg(c.n_cells) FILTER (WHERE i.excluded IS NULL) AS per_image
FROM counted_cells AS c
JOIN image_table AS i ON i.image_id = c.image_id
WHERE $plate IS NULL OR i.plate = $plate
GROUP BY i.plate, i.well, i.well_row, i.well_column, i.treatment, c.recipe_id
ORDER BY i.plate, i.well_row, i.well_column, c.recipe_id
