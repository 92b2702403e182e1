-- What the cells of an image said: one row per predict run, image and label.
-- cells counts the cells whose first choice the label was; probability is the sum of the
-- probabilities that all cells gave it (every stored rank). Only voters count.
SELECT
    v.run_id,
    v.image_id,
    ri.well_id,
    ri.subset,
    ri.truth,
    l.value AS label,
    v.cells,
    v.probability
FROM image_label_counts AS v
JOIN labels AS l ON l.id = v.label_id
JOIN run_images AS ri ON ri.run_id = v.run_id AND ri.image_id = v.image_id
