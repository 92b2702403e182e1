-- The labels that people gave to plates, wells, images and cells, the last first.
-- Of each person the last label of a thing counts; labels that were taken back are not listed.
-- :field (text) = nothing  Only this field.
-- :label (text) = nothing  Only this label.
-- :user (text) = nothing  Only labels of this person.
SELECT plate, well, site, cell_id, field, label, user_name, created_at, reason
FROM annotation_table
WHERE
    ($field IS NULL OR field = $field)
    AND ($label IS NULL OR label = $label)
    AND ($user IS NULL OR user_name = $user)
ORDER BY created_at DESC, annotation_id DESC
