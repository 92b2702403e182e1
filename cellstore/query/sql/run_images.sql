-- Every image beside every predict run: its subset of the run's split and its true label.
-- One row per run (run_id) and image (image_id). subset is train, validation, test, or outside
-- where the split does not name the image; truth is the split's label, else what it or its well
-- has in the split's field, else null. well_in_training: the network was trained on an
-- image of this very well; null: that was not declared of a model from elsewhere. control: what the
-- well is a control of, else null; of a well that got another label since the split was made, what
-- the other wells of the split's label are.
WITH predicting AS (
    SELECT
        r.id AS run_id,
        coalesce(r.split_id, trained.split_id) AS split_id,
        CASE WHEN trained.origin = 'declared'
            THEN string_split(recipes.parameters ->> 'trained_on', ',')
            ELSE ['train']
        END AS trained_on
    FROM runs AS r
    LEFT JOIN runs AS trained ON trained.id = r.parent_id
    LEFT JOIN recipes ON recipes.id = trained.recipe_id
    WHERE r.stage = 'predict'
),
subsets AS (
    SELECT m.split_id, i.well_id, list(DISTINCT m.subset) AS of_well
    FROM split_members AS m
    JOIN images AS i ON i.id = m.image_id
    GROUP BY m.split_id, i.well_id
),
labelled AS (
    SELECT
        predicting.run_id,
        i.id AS image_id,
        i.well_id,
        w.plate_id,
        pl.barcode AS plate,
        w.name AS well,
        i.site,
        predicting.split_id,
        coalesce(m.subset, 'outside') AS subset,
        l.value AS frozen,
        CASE s.field
            WHEN 'perturbation' THEN t.name
            WHEN 'treatment' THEN t.name_with_dose
            WHEN 'target' THEN t.target
            WHEN 'batch' THEN pl.batch
            WHEN 'cell_line' THEN pl.cell_line
            WHEN 'time_point' THEN pl.time_point
            ELSE CASE WHEN a.image_id IS NOT NULL THEN a.label ELSE coalesce(
                (w.metadata ->> s.field),
                (pl.metadata ->> s.field)
            ) END
        END AS present,
        list_has_any(coalesce(su.of_well, []), predicting.trained_on) AS well_in_training,
        w.control
    FROM predicting
    CROSS JOIN images AS i
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS pl ON pl.id = w.plate_id
    LEFT JOIN treatments AS t ON t.id = w.treatment_id
    LEFT JOIN splits AS s ON s.id = predicting.split_id
    LEFT JOIN image_labels AS a ON a.image_id = i.id AND a.field = s.field
    LEFT JOIN split_members AS m ON m.split_id = predicting.split_id AND m.image_id = i.id
    LEFT JOIN labels AS l ON l.id = m.label_id
    LEFT JOIN subsets AS su
        ON su.split_id = predicting.split_id AND su.well_id = i.well_id
),
frozen_controls AS (
    SELECT run_id, frozen, max(control) AS control
    FROM labelled
    WHERE frozen = present
    GROUP BY run_id, frozen
)
SELECT
    i.run_id,
    i.image_id,
    i.well_id,
    i.plate_id,
    i.plate,
    i.well,
    i.site,
    i.split_id,
    i.subset,
    coalesce(i.frozen, i.present) AS truth,
    i.well_in_training,
    CASE
        WHEN i.frozen IS NULL OR i.frozen = i.present THEN i.control
        ELSE f.control
    END AS control
FROM labelled AS i
LEFT JOIN frozen_controls AS f ON f.run_id = i.run_id AND f.frozen = i.frozen
