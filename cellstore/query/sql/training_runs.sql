-- Every training beside its score: one row per train run. model is network, the name of a baseline,
-- or that of a model that was declared; family and fold say which cross-validation the split is of.
-- The score is that of the predict run that has labelled most test images of the split, of several
-- the last: images, and the share of them that is right by hard votes; balanced_accuracy is the
-- mean of that share over the true labels. See run_parameters for one row per parameter, and
-- cellstore runs for intervals.
WITH voted AS (
    SELECT
        run_id,
        truth,
        count(*) AS n,
        sum(CASE WHEN correct THEN 1 ELSE 0 END) AS n_correct
    FROM votes
    WHERE level = 'image' AND vote = 'hard' AND subset = 'test' AND correct IS NOT NULL
    GROUP BY run_id, truth
),
scored AS (
    SELECT
        v.run_id,
        r.parent_id,
        CAST(sum(v.n) AS BIGINT) AS images,
        1.0 * sum(v.n_correct) / sum(v.n) AS accuracy,
        avg(1.0 * v.n_correct / v.n) AS balanced_accuracy,
        row_number() OVER (
            PARTITION BY r.parent_id ORDER BY sum(v.n) DESC, v.run_id DESC
        ) AS position
    FROM voted AS v
    JOIN runs AS r ON r.id = v.run_id
    WHERE r.status = 'done'
    GROUP BY v.run_id, r.parent_id
),
trained AS (
    SELECT
        r.*,
        CAST(r.result ->> 'best_epoch' AS BIGINT) AS best_epoch,
        CAST(coalesce((r.result -> 'cells') ->> 'train', r.result ->> 'cells') AS BIGINT) AS cells
    FROM runs AS r
    WHERE r.stage = 'train'
)
SELECT
    t.id AS run_id,
    t.started_at,
    t.status,
    s.name AS split,
    s.family,
    s.fold,
    coalesce(p.parameters ->> 'baseline', p.parameters ->> 'declared', 'network') AS model,
    t.cells,
    epoch(t.ended_at - t.started_at) AS seconds,
    t.best_epoch,
    vl.value AS validation_loss,
    va.value AS validation_accuracy,
    x.run_id AS predict_run_id,
    x.images,
    x.accuracy,
    x.balanced_accuracy,
    p.parameters
FROM trained AS t
JOIN recipes AS p ON p.id = t.recipe_id
LEFT JOIN splits AS s ON s.id = t.split_id
LEFT JOIN run_metrics AS vl
    ON vl.run_id = t.id AND vl.epoch = t.best_epoch AND vl.name = 'validation_loss'
LEFT JOIN run_metrics AS va
    ON va.run_id = t.id AND va.epoch = t.best_epoch AND va.name = 'validation_accuracy'
LEFT JOIN scored AS x ON x.parent_id = t.id AND x.position = 1
