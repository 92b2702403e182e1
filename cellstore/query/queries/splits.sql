-- Every split: its subsets with their images, wells and labels.
SELECT
    s.name AS split, s.protocol, s.field, s.group_level, m.subset,
    count(*) AS images,
    count(DISTINCT i.well_id) AS wells,
    count(DISTINCT m.label_id) AS labels,
    s.frozen_at IS NOT NULL AS frozen
FROM splits AS s
JOIN split_members AS m ON m.split_id = s.id
JOIN images AS i ON i.id = m.image_id
GROUP BY s.id, s.name, s.protocol, s.field, s.group_level, s.frozen_at, m.subset
ORDER BY s.name, m.subset
