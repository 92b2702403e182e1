-- Every image beside every predict run: its side of the run's split and its true label.
-- One row per run (run_id) and image (image_id). subset is train, validation, test, or outside
-- where the split does not name the image; truth is the split's label, else what its well
-- has in the split's field, else null. well_in_training: the network was trained on an
-- image of this very well. control: of the well.
WITH asked AS (
    SELECT r.id AS run_id, coalesce(r.split_id, trained.split_id) AS split_id
    FROM runs AS r
    LEFT JOIN runs AS trained ON trained.id = r.parent_id
    WHERE r.stage = 'predict'
),
training_wells AS (
    SELECT DISTINCT m.split_id, i.well_id
    FROM split_members AS m
    JOIN images AS i ON i.id = m.image_id
    WHERE m.subset = 'train'
)
SELECT
    asked.run_id,
    i.id AS image_id,
    i.well_id,
    w.plate_id,
    asked.split_id,
    coalesce(m.subset, 'outside') AS subset,
    coalesce(
        l.value,
        CASE s.field
            WHEN 'perturbation' THEN t.name
            WHEN 'target' THEN t.target
            WHEN 'batch' THEN p.batch
            WHEN 'cell_line' THEN p.cell_line
            WHEN 'time_point' THEN p.time_point
            ELSE coalesce(
                json_extract_string(w.metadata, '$."' || s.field || '"'),
                json_extract_string(p.metadata, '$."' || s.field || '"')
            )
        END
    ) AS truth,
    tw.well_id IS NOT NULL AS well_in_training,
    w.control
FROM asked
CROSS JOIN images AS i
LEFT JOIN splits AS s ON s.id = asked.split_id
LEFT JOIN split_members AS m ON m.split_id = asked.split_id AND m.image_id = i.id
LEFT JOIN labels AS l ON l.id = m.label_id
LEFT JOIN wells AS w ON w.id = i.well_id
LEFT JOIN plates AS p ON p.id = w.plate_id
LEFT JOIN treatments AS t ON t.id = w.treatment_id
LEFT JOIN training_wells AS tw ON tw.split_id = asked.split_id AND tw.well_id = i.well_id
