-- What people say of plates, wells, images and cells (level, row_id) now: one row per thing, field and
-- person, with the last label that this person gave it. What was taken back is not here.
SELECT level, row_id, field, label, user_name, created_at, reason, annotation_id
FROM (
    SELECT
        a.level,
        a.row_id,
        a.field,
        a.value AS label,
        a.user_name,
        a.created_at,
        a.reason,
        a.id AS annotation_id,
        row_number() OVER (
            PARTITION BY a.level, a.row_id, a.field, a.user_name ORDER BY a.id DESC
        ) AS number
    FROM annotations AS a
    LEFT JOIN annotations AS later ON later.undoes_id = a.id
    WHERE a.kind = 'label' AND a.undoes_id IS NULL AND later.id IS NULL
) AS said
WHERE number = 1
